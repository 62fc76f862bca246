"""FFCV's betons, read without FFCV.

Every offset, size and count in a file is checked against the file before anything is read through it, because native
decoders trust what a source returns. Files are read by `pread`, not through a memory map: where a file shrinks or a
disk fails, a map ends the process (SIGBUS), and the copy takes little time beside the decoding.
The format, version 2, from FFCV's types.py, writer.py and fields:
    header (24 bytes) | field descriptors | metadata, one row per sample | padding to a page | data in pages |
    allocation table to the end
A metadata row is a C-aligned struct of one part per field; an image's part holds (mode, width, height, address), its
length stands in the allocation table as (sample, address, size).
Shapes: B indices asked for, N samples.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import DataError, UserError, printable
from pipelines.read.base import MAX_CLASSES, MAX_PIXELS, MAX_SIDE, Bytes, Integers
from pipelines.read.manifest import CONVERT_AGAIN, read_manifest
from pipelines.untrusted import open_regular

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


class BetonSource:
    """One beton. The constructor makes all checks; see the module's docstring.

    Besides the Source interface, per sample: heights, widths (uint16 [N]), jpeg (bool [N]: JPEG, else raw RGB),
    pointers (uint64 [N], offsets into the file) and byte_sizes (int64 [N]). From the manifest: shard and conversion
    (see `Manifest`).
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
            "claims more pixels than any image has",
        )
        self._refuse((self.labels < 0) | (self.labels >= MAX_CLASSES), f"has a label outside 0..{MAX_CLASSES - 1}")
        self._start, self._end = header.nbytes + metadata.nbytes, self.data.size - table.nbytes
        self.byte_sizes = self._byte_sizes(table)
        self._refuse(~self.jpeg & (self.byte_sizes != 3 * pixels), "is raw, but its length is not height x width x 3")

        manifest = read_manifest(path)
        self.class_names = None if manifest is None else manifest.classes
        self.shard = None if manifest is None else manifest.shard
        self.conversion = None if manifest is None else manifest.conversion
        self.num_classes = int(self.labels.max()) + 1
        if self.class_names is not None:
            if self.num_classes > len(self.class_names):
                raise UserError(
                    f"{printable(path)}.json: names {len(self.class_names)} classes, but the beton has label "
                    f"{self.num_classes - 1}; delete it if it belongs to another file, or {CONVERT_AGAIN}"
                )
            self.num_classes = len(self.class_names)

    def _refuse(self, bad: npt.NDArray[np.bool_], what: str) -> None:
        """Raises DataError that names the first bad sample, if there is any; bad: bool [N]."""
        if bad.any():
            raise DataError(f"{self.name(int(bad.argmax()))} {what} ({int(bad.sum())} such); {CONVERT_AGAIN}")

    def _byte_sizes(self, table: npt.NDArray[Any]) -> Integers:
        """Length of each image's data, int64 [N], after checking that all allocations lie within the data, apart."""
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
        self._refuse(first[slot] != self.pointers, "has data at an address that is not in the allocation table")
        other = table["sample_id"][slot] != np.arange(self.num_samples)
        self._refuse(other, "has data that belongs to another sample in the allocation table")
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


def _broken(path: str, what: str) -> UserError:
    return UserError(f"{printable(path)}: {what}; {CONVERT_AGAIN}")


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
            fix = "give a .beton" if os.path.isdir(path) else "give a beton or an image folder"
            raise UserError(f"{printable(path)}: cannot be opened ({reason}); {fix}") from error
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
                    f"{printable(self.path)}: cannot be read at byte {start} ({error.strerror}); check the disk"
                ) from error
            if not pieces[-1]:
                raise DataError(
                    f"{printable(self.path)}: became shorter while it was in use; restore it and start again"
                )
            start += len(pieces[-1])
        return np.frombuffer(pieces[0] if len(pieces) == 1 else b"".join(pieces), np.uint8)


def _parse(path: str, data: _File) -> tuple[Bytes, npt.NDArray[Any], npt.NDArray[Any], str, str]:
    """Views: header with descriptors, metadata [N], allocation table; and the metadata's columns of image and label.

    Raises UserError unless the three lie within the file, in this order, and the two fields exist.
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
                f"can read; {CONVERT_AGAIN}"
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
