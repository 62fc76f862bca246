"""Datasets on disk: FFCV betons (one, or several of one dataset) and image folders, as encoded bytes, sizes and labels.

A beton is read without FFCV, and every offset, size and count in it is checked against the file before anything is read
through it: native decoders may trust what a source hands out. It is read by `pread`, not through a memory map: where a
file shrinks or a disk fails, a map ends the process (SIGBUS), and the copy costs next to nothing beside the decoding.
The format, version 2, from FFCV's types.py, writer.py and fields:
    header (24 bytes) | field descriptors | metadata, one row per sample | padding to a page | data in pages |
    allocation table to the end
A metadata row is a C-aligned struct of one part per field; an image's part holds (mode, width, height, address), its
length stands in the allocation table as (sample, address, size).
Shapes: B indices asked for, N samples.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from pipelines.errors import CorruptImage, DataError, UserError, printable
from pipelines.read.remote import cached, is_url
from pipelines.untrusted import open_regular, read_bytes, read_json

if TYPE_CHECKING:
    import PIL.Image

log = logging.getLogger("std_fast")

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""what counts as an image in a folder, in any case: torchvision's list and .gif"""
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""what PIL may take a file for, whatever its name; its other readers are not for strangers (EPS runs a program)"""
MAX_SIDE = 65500  # libjpeg's limit
MAX_PIXELS = 178_956_970  # the size at which PIL refuses an image as a decompression bomb
MAX_BYTES = 1 << 28  # of an encoded image
MAX_CLASSES = 1 << 20
MAX_FIELDS = 256  # of a beton; FFCV's own have two

VERSION = 2
HEADER_TYPE = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD_TYPE = np.dtype([("type_id", "<u1"), ("name", "<u1", (16,)), ("arguments", "<u1", (1024,))])
TABLE_TYPE = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE_TYPE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
_BYTES_TYPE = np.dtype([("ptr", "<u8"), ("size", "<u8")])
INT_ID, IMAGE_ID = 1, 2
METADATA_TYPES = {
    0: np.dtype("<f8"),  # FloatField
    INT_ID: np.dtype("<i8"),
    IMAGE_ID: IMAGE_TYPE,
    3: _BYTES_TYPE,  # BytesField
    4: np.dtype("<u8"),  # NDArrayField
    5: _BYTES_TYPE,  # JSONField
    6: np.dtype("<u8"),  # TorchTensorField
}
JPEG_MODE, RAW_MODE = 0, 1


class Source(Protocol):
    """A dataset on disk. Indices run from 0 to num_samples - 1."""

    path: str
    kind: str
    """"beton" or "folder" """
    num_samples: int
    labels: Integers
    """int64 [N], 0..num_classes-1"""
    class_names: list[str] | None
    num_classes: int

    def sizes(self, indices: npt.NDArray[np.integer]) -> tuple[Integers, Integers]:
        """Heights and widths in pixels, int64 [B] each, of the upright images (after EXIF rotation).

        Raises DataError for an image that cannot be read.
        """
        ...

    def read(self, index: int) -> Bytes:
        """The sample's bytes, read-only uint8: an encoded image, or height*width*3 RGB values (raw mode of a beton).

        Raises DataError when they cannot be read.
        """
        ...

    def is_jpeg(self, index: int) -> bool:
        """Whether `read` gives a JPEG. Raises DataError for an image that cannot be read."""
        ...

    def name(self, index: int) -> str:
        """The sample in a message: its file, or its beton and number."""
        ...

    def fingerprint(self) -> str:
        """Hex digest of the dataset's identity; it changes with names, order, labels and lengths. No image is read."""
        ...


def open_source(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Source:
    """Opens a beton, an image folder (SRC/CLASS/*), or several betons as one dataset.

    Several betons are a sequence of paths, or one path with *, ? or [] in it. They follow each other in the given
    order, the matches of a pattern in the order of their names. A URL is that of a beton which `std-fast warm` has
    brought into the cache; with {0..3} in it, of several.
    Raises UserError when there is nothing there, it is neither kind, a class is empty, a beton's structure does not
    hold, or betons differ in classes.
    """
    if isinstance(path, (str, os.PathLike)):
        only = os.fspath(path)
        if is_url(only):
            return open_source(cached(only))
        if os.path.isdir(only):
            return FolderSource(only)
        if os.path.exists(only) or not glob.has_magic(only):
            return BetonSource(only)
        paths = sorted(p for p in glob.glob(only) if not p.endswith(".json"))
        if not paths:
            raise UserError(f"{printable(only)}: no file matches this pattern; give betons made by `std-fast convert`")
    else:
        given = [os.fspath(p) for p in path]
        paths = [file for p in given for file in (cached(p) if is_url(p) else [p])]
        if not paths:
            raise UserError("data: the list of betons is empty; give at least one path")
    return BetonSource(paths[0]) if len(paths) == 1 else JoinedSource([BetonSource(p) for p in paths])


class BetonSource:
    """One beton. All checks are made on opening; see the module's docstring.

    Besides the Source interface, per sample: heights, widths (uint16 [N]), jpeg (bool [N]: JPEG, else raw RGB),
    pointers (uint64 [N], offsets into the file) and byte_sizes (int64 [N]).
    """

    kind = "beton"

    def __init__(self, path: str) -> None:
        self.path = path
        self.data = _File(path)
        header, metadata, table, image, label = _parse(path, self.data)

        self.num_samples = len(metadata)
        self.heights, self.widths = metadata[image]["height"].copy(), metadata[image]["width"].copy()
        self.pointers = metadata[image]["data_ptr"].copy()
        self.labels = metadata[label].astype(np.int64)
        self.jpeg = metadata[image]["mode"] == JPEG_MODE
        pixels = self.heights.astype(np.int64) * self.widths
        self._refuse(
            ~np.isin(metadata[image]["mode"], (JPEG_MODE, RAW_MODE)), "is stored in a mode that is neither jpg nor raw"
        )
        self._refuse((self.heights == 0) | (self.widths == 0), "has no height or no width")
        self._refuse(
            (self.heights > MAX_SIDE) | (self.widths > MAX_SIDE) | (pixels > MAX_PIXELS),
            "claims an absurd size in pixels",
        )
        self._refuse((self.labels < 0) | (self.labels >= MAX_CLASSES), f"has a label outside 0..{MAX_CLASSES - 1}")
        self._start, self._end = header.nbytes + metadata.nbytes, self.data.size - table.nbytes
        self.byte_sizes = self._byte_sizes(table)
        self._refuse(~self.jpeg & (self.byte_sizes != 3 * pixels), "is raw, but its length is not height x width x 3")

        self.class_names = _manifest_classes(path)
        self.num_classes = int(self.labels.max()) + 1
        if self.class_names is not None:
            if self.num_classes > len(self.class_names):
                raise UserError(
                    f"{printable(path)}.json: names {len(self.class_names)} classes, but the beton has label "
                    f"{self.num_classes - 1}; delete it if it belongs to another file, or {_MEND}"
                )
            self.num_classes = len(self.class_names)

    def _refuse(self, bad: npt.NDArray[np.bool_], what: str) -> None:
        """Raises DataError that names the first bad sample, if there is any; bad: bool [N]."""
        if bad.any():
            raise DataError(f"{self.name(int(bad.argmax()))} {what} ({int(bad.sum())} such); {_MEND}")

    def _byte_sizes(self, table: npt.NDArray[Any]) -> Integers:
        """Length of each image's data, int64 [N]; first all allocations are known to lie in the data, apart."""
        start, end = self._start, self._end
        table = table[table["size"] > 0]
        if not len(table):
            raise _broken(self.path, "its allocation table is empty")
        table = table[np.argsort(table["ptr"], kind="stable")]
        first, size = table["ptr"], table["size"]
        outside = (first < start) | (first > end) | (size > end - np.minimum(first, np.uint64(end)))
        if outside.any():
            raise _broken(
                self.path, f"{outside.sum()} of its allocations lie outside its data (bytes {start} to {end})"
            )
        if (first[:-1] + size[:-1] > first[1:]).any():
            raise _broken(self.path, "some of its allocations overlap")
        slot = np.minimum(np.searchsorted(first, self.pointers), len(table) - 1)
        self._refuse(first[slot] != self.pointers, "has data at an address that the allocation table lacks")
        other = table["sample_id"][slot] != np.arange(self.num_samples)
        self._refuse(other, "has data that the allocation table gives to another sample")
        return size[slot].astype(np.int64)

    def sizes(self, indices: npt.NDArray[np.integer]) -> tuple[Integers, Integers]:
        return self.heights[indices].astype(np.int64), self.widths[indices].astype(np.int64)

    def read(self, index: int) -> Bytes:
        start = int(self.pointers[index])
        return self.data[start : start + int(self.byte_sizes[index])]

    def is_jpeg(self, index: int) -> bool:
        return bool(self.jpeg[index])

    def name(self, index: int) -> str:
        return f"{printable(self.path)}: sample {index}"

    def fingerprint(self) -> str:
        """Digest of all but the images: file size, header, metadata (labels, sizes, addresses), allocation table."""
        digest = hashlib.sha256(b"beton %d\n" % self.data.size)
        digest.update(self.data[: self._start].data)
        digest.update(self.data[self._end :].data)
        return digest.hexdigest()


class JoinedSource:
    """Several betons of one dataset, one after the other. Raises UserError where classes differ or one comes twice."""

    kind = "beton"

    def __init__(self, parts: list[BetonSource]) -> None:
        self.parts = parts
        self.path = f"{parts[0].path} and {len(parts) - 1} more"
        seen: set[str] = set()
        for part in parts:
            if part.class_names != parts[0].class_names:
                raise UserError(
                    f"{printable(part.path)}: other classes than {printable(parts[0].path)}; convert both from one "
                    "dataset with `std-fast convert --shard i/n`, and keep the manifests (.json) beside them"
                )
            if os.path.realpath(part.path) in seen:
                raise UserError(f"{printable(part.path)}: given twice; name each beton once")
            seen.add(os.path.realpath(part.path))
        self._starts = np.cumsum([0] + [part.num_samples for part in parts])
        self.num_samples = int(self._starts[-1])
        self.labels = np.concatenate([part.labels for part in parts])
        self.class_names = parts[0].class_names
        self.num_classes = max(part.num_classes for part in parts)
        self.heights, self.widths, self.jpeg, self.byte_sizes = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("heights", "widths", "jpeg", "byte_sizes")
        )

    def _part(self, index: int) -> tuple[BetonSource, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[number], index - int(self._starts[number])

    def sizes(self, indices: npt.NDArray[np.integer]) -> tuple[Integers, Integers]:
        return self.heights[indices].astype(np.int64), self.widths[indices].astype(np.int64)

    def read(self, index: int) -> Bytes:
        part, local = self._part(index)
        return part.read(local)

    def is_jpeg(self, index: int) -> bool:
        return bool(self.jpeg[index])

    def name(self, index: int) -> str:
        part, local = self._part(index)
        return part.name(local)

    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join(part.fingerprint() for part in self.parts).encode()).hexdigest()


class FolderSource:
    """An image folder: SRC/CLASS/IMAGE. Classes are numbered by name, images follow each other by class and name.

    Hidden entries are passed over; files with other endings and folders within a class too, with a warning. There is no
    descent below a class, so that links that lead in circles do no harm. Files are opened when they are asked for.
    """

    kind = "folder"

    def __init__(self, path: str) -> None:
        self.path = path
        names: list[str] = []
        files: list[str] = []
        counts: list[int] = []
        ignored: list[str] = []
        for entry in _visible(path):
            if not _is_folder(entry):
                ignored.append(entry.path)
                continue
            images = []
            for inner in _visible(entry.path):
                if _is_folder(inner) or not inner.name.lower().endswith(EXTENSIONS):
                    ignored.append(inner.path)
                else:
                    images.append(os.path.join(entry.name, inner.name))
            if not images:
                raise UserError(
                    f"{printable(entry.path)}: no image in this class; add images "
                    f"({' '.join(EXTENSIONS)}) directly in it or remove the folder"
                )
            names.append(printable(entry.name))
            files += images
            counts.append(len(images))
        if not counts:
            raise UserError(f"{printable(path)}: no class folders in it; put the images in {printable(path)}/CLASS/")
        if ignored:
            example = printable(ignored[0])
            log.warning(
                "%s: passed over %d entries that are no images, e.g. %s", printable(path), len(ignored), example
            )
        self.class_names: list[str] | None = names
        self._files = files
        self.num_samples = len(files)
        self.num_classes = len(counts)
        self.labels = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        self._heights = np.zeros(len(files), np.int32)  # 0: not looked at yet
        self._widths = np.zeros(len(files), np.int32)
        self._jpeg = np.zeros(len(files), np.bool_)

    def file(self, index: int) -> str:
        """Path of the sample's image."""
        return os.path.join(self.path, self._files[index])

    def _look(self, index: int) -> None:
        """Reads the image's header, once."""
        if self._heights[index]:
            return
        import PIL.Image

        try:
            with open_regular(self.file(index)) as file, PIL.Image.open(file, formats=FORMATS) as image:
                width, height = image.size
                if not width or not height:
                    raise ValueError("it has no pixels")
                if orientation(image) >= 5:
                    width, height = height, width
                self._jpeg[index] = image.format in ("JPEG", "MPO")
        except Exception as error:  # PIL's readers raise errors of every kind on what is not an image
            if getattr(error, "errno", None) is not None:
                raise self._unreadable(index, error) from error
            raise CorruptImage(str(self._unreadable(index, error))) from error
        self._widths[index] = width
        self._heights[index] = height  # last: it says that the others are known

    def _unreadable(self, index: int, error: object) -> DataError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return DataError(f"{self.name(index)}: not a readable image ({reason}); mend or remove it")

    def sizes(self, indices: npt.NDArray[np.integer]) -> tuple[Integers, Integers]:
        for index in indices:
            self._look(int(index))
        return self._heights[indices].astype(np.int64), self._widths[indices].astype(np.int64)

    def read(self, index: int) -> Bytes:
        try:
            data = read_bytes(self.file(index), MAX_BYTES)
        except OSError as error:
            raise self._unreadable(index, error.strerror) from error
        if not data:
            raise CorruptImage(str(self._unreadable(index, "the file is empty")))
        return np.frombuffer(data, np.uint8)

    def is_jpeg(self, index: int) -> bool:
        self._look(index)
        return bool(self._jpeg[index])

    def name(self, index: int) -> str:
        return printable(self.file(index))

    def fingerprint(self) -> str:
        """Digest of the files' names, in order, and their lengths in bytes."""
        digest = hashlib.sha256(b"folder\n")
        for index, file in enumerate(self._files):
            try:
                size = os.stat(self.file(index)).st_size
            except OSError as error:
                raise self._unreadable(index, error.strerror) from error
            digest.update(os.fsencode(file) + b"\0%d\n" % size)
        return digest.hexdigest()


def orientation(image: PIL.Image.Image) -> int:
    """EXIF orientation, 1..8, of an opened image; 5..8 swap its sides. 1 for none or broken EXIF, as in browsers."""
    if image.format == "TIFF":  # PIL turns these itself, and tells the size after the turn
        return 1
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # a broken EXIF block raises errors of many kinds, and the picture is still good
        return 1
    return value if value in range(1, 9) else 1


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image turned as its EXIF orientation asks, of the size that `sizes` gives."""
    from PIL.Image import Transpose as T

    turns = {
        2: T.FLIP_LEFT_RIGHT,
        3: T.ROTATE_180,
        4: T.FLIP_TOP_BOTTOM,
        5: T.TRANSPOSE,
        6: T.ROTATE_270,
        7: T.TRANSVERSE,
        8: T.ROTATE_90,
    }
    turn = turns.get(orientation(image))
    return image if turn is None else image.transpose(turn)


_MEND = "convert it again with `std-fast convert`"


def _broken(path: str, what: str) -> UserError:
    return UserError(f"{printable(path)}: {what}; {_MEND}")


class _File:
    """A regular file that holds at least a beton's header; `file[start:stop]` reads these bytes.

    Raises UserError when it cannot be opened, DataError when it cannot be read or is shorter than it was.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._file = open_regular(path)
        except (OSError, ValueError) as error:  # ValueError: the path has a null byte
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(
                f"{printable(path)}: cannot be opened ({reason}); give a beton or an image folder"
            ) from error
        weakref.finalize(self, self._file.close)
        self.size = os.fstat(self._file.fileno()).st_size
        if self.size < HEADER_TYPE.itemsize:
            raise _broken(path, f"not an FFCV beton: only {self.size} bytes")

    def __getitem__(self, part: slice) -> Bytes:
        start, stop, _ = part.indices(self.size)
        pieces: list[bytes] = []
        while start < stop:  # a call reads 2 GiB at most
            try:
                pieces.append(os.pread(self._file.fileno(), stop - start, start))
            except OSError as error:
                raise DataError(
                    f"{printable(self.path)}: cannot be read at byte {start} ({error.strerror}); look at the disk"
                ) from error
            if not pieces[-1]:
                raise DataError(
                    f"{printable(self.path)}: became shorter while it was in use; restore it and start again"
                )
            start += len(pieces[-1])
        return np.frombuffer(pieces[0] if len(pieces) == 1 else b"".join(pieces), np.uint8)


def _parse(path: str, data: _File) -> tuple[Bytes, npt.NDArray[Any], npt.NDArray[Any], str, str]:
    """Views: header with descriptors, metadata [N], allocation table; and the metadata's columns of image and label.

    Raises UserError unless the three lie within the file, in this order, and the fields are there.
    """
    header = data[: HEADER_TYPE.itemsize].view(HEADER_TYPE)[0]
    version, num_fields, page_size, num_samples, table_start = (int(header[name]) for name in HEADER_TYPE.names or ())
    if version != VERSION or not num_fields or not page_size or page_size & (page_size - 1):
        raise UserError(
            f"{printable(path)}: not an FFCV beton of version {VERSION}; make one with `std-fast convert SRC DST.beton`"
        )
    metadata_start = HEADER_TYPE.itemsize + num_fields * FIELD_TYPE.itemsize
    if metadata_start > data.size:
        raise _broken(path, f"too short ({data.size} bytes) for the {num_fields} fields that its header announces")
    if num_fields > MAX_FIELDS:
        raise _broken(path, f"announces {num_fields} fields, more than the {MAX_FIELDS} that any needs")
    if not table_start:
        raise _broken(path, "its writing was never completed")
    if not num_samples:
        raise _broken(path, "holds no samples")

    fields = data[HEADER_TYPE.itemsize : metadata_start].view(FIELD_TYPE)
    columns: dict[str, tuple[str, int]] = {}
    parts = []
    for number, field in enumerate(fields):
        name = printable(field["name"].tobytes().split(b"\0")[0].decode("ascii", "backslashreplace"))
        type_id = int(field["type_id"])
        if type_id not in METADATA_TYPES:
            raise UserError(
                f"{printable(path)}: field {name!r} is of a custom type ({type_id}), which only its author "
                f"can read; {_MEND}"
            )
        if name in columns:
            raise _broken(path, f"has two fields named {name!r}")
        columns[name] = (f"f{number}", type_id)
        parts.append(("", METADATA_TYPES[type_id]))
    for name, type_id, kind in (("image", IMAGE_ID, "RGBImageField"), ("label", INT_ID, "IntField")):
        if name not in columns or columns[name][1] != type_id:
            raise _broken(path, f"lacks a field {name!r} of FFCV's {kind} (its fields: {', '.join(list(columns)[:8])})")

    row = np.dtype(parts, align=True)
    metadata_end = metadata_start + num_samples * row.itemsize
    if metadata_end > data.size:
        raise _broken(path, f"announces {num_samples} samples, more than its {data.size} bytes can hold")
    if not metadata_end <= table_start <= data.size or (data.size - table_start) % TABLE_TYPE.itemsize:
        what = f"its allocation table (byte {table_start} to the end, {data.size}) is cut off or outside the file"
        raise _broken(path, what)
    metadata, table = data[metadata_start:metadata_end].view(row), data[table_start:].view(TABLE_TYPE)
    return data[:metadata_start], metadata, table, columns["image"][0], columns["label"][0]


def _manifest_classes(path: str) -> list[str] | None:
    """`classes` of the manifest PATH.json, None where there is no manifest. Raises UserError when it cannot be read."""
    manifest = path + ".json"
    if not os.path.exists(manifest):
        return None
    try:
        classes = read_json(manifest)["classes"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        what = f"not a manifest ({type(error).__name__}: {error})"
        raise UserError(f"{printable(manifest)}: {what}; delete it, or {_MEND}") from error
    names = printable_names(classes)
    if names is None:
        raise UserError(f"{printable(manifest)}: `classes` must be a list of different names; delete it, or {_MEND}")
    return names


def printable_names(names: Any) -> list[str] | None:
    """Class names from elsewhere as text that can be shown; None unless it is a list of different names."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    shown = [printable(name) for name in names]
    return shown if len(set(shown)) == len(shown) else None


def _visible(path: str) -> list[os.DirEntry[str]]:
    """Entries of a folder by name, without hidden ones. Raises UserError when it cannot be listed."""
    try:
        with os.scandir(path) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"{printable(path)}: cannot be listed ({error.strerror}); mend its permissions or remove it"
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself; as an image it will be reported by name when it is read
        return False
