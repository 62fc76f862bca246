"""Image files: a list of them, or a folder SRC/CLASS/IMAGE."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipelines.errors import CorruptImage, DataError, UserError, printable
from pipelines.read.base import MAX_BYTES, Bytes, Integers
from pipelines.read.exif import orientation
from pipelines.read.manifest import normal
from pipelines.untrusted import open_regular, read_bytes

log = logging.getLogger("std_fast")

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""endings of image files, in lower or upper case: torchvision's list and .gif"""
NOT_CLASSES = ("__macosx", "@eadir", "lost+found", "$recycle.bin", ".git", ".ipynb_checkpoints", ".cache")
"""folders that tools leave, even where they hold images; in lower case"""
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""formats that PIL may recognise in a file, whatever its name; its other readers do not see untrusted files (EPS runs a
program)"""


class FileSource:
    """A list of image files, without classes: each has label 0. They are opened at their first use.

    folder: that the paths start from; empty for the working directory.
    """

    kind = "folder"
    class_names: list[str] | None = None
    num_classes = 1

    def __init__(self, files: Sequence[str], folder: str = "") -> None:
        self.path = folder or f"{len(files)} images"
        self._folder, self._files = folder, list(files)
        self.num_samples = len(files)
        self.labels = np.zeros(len(files), np.int64)
        self._heights = np.zeros(len(files), np.int32)  # 0: not read yet
        self._widths = np.zeros(len(files), np.int32)
        self._jpeg = np.zeros(len(files), np.bool_)

    def file(self, index: int) -> str:
        """Path of the sample's image."""
        return os.path.join(self._folder, self._files[index])

    def _read_header(self, index: int) -> None:
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
        except PIL.UnidentifiedImageError:
            raise CorruptImage(str(self._unreadable(index, f"in no known format: {', '.join(FORMATS)}"))) from None
        except Exception as error:  # PIL's readers raise errors of every kind on other files
            if getattr(error, "errno", None) is not None:
                raise self._unreadable(index, error) from error
            raise CorruptImage(str(self._unreadable(index, error))) from error
        self._widths[index] = width
        self._heights[index] = height  # last: other threads take a height as a sign that the rest is set

    def _unreadable(self, index: int, error: object) -> DataError:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        return DataError(f"{self.name(index)}: not a readable image ({reason}); replace or remove it")

    def sizes(self, indices: npt.NDArray[np.integer]) -> tuple[Integers, Integers]:
        for index in indices:
            self._read_header(int(index))
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
        self._read_header(index)
        return bool(self._jpeg[index])

    def name(self, index: int) -> str:
        return printable(self.file(index))

    def fingerprint(self) -> str:
        """Digest of the files' names, in order and in any Unicode normal form, and their lengths in bytes."""
        digest = hashlib.sha256(b"folder\n")
        for index, file in enumerate(normal(self._files)):
            try:
                size = os.stat(self.file(index)).st_size
            except OSError as error:
                raise self._unreadable(index, error.strerror) from error
            digest.update(os.fsencode(file) + b"\0%d\n" % size)
        return digest.hexdigest()


class FolderSource(FileSource):
    """An image folder: SRC/CLASS/IMAGE. Classes are numbered by name, images are ordered by class and name.

    Hidden entries are skipped; so are, with a warning, NOT_CLASSES, files with other endings and folders within a
    class, which are not opened, so that circular links do no harm.
    """

    def __init__(self, path: str) -> None:
        names: list[str] = []
        files: list[str] = []
        counts: list[int] = []
        ignored: list[str] = []
        for entry in scan(path, hidden=False):
            if entry.name.lower() in NOT_CLASSES or not _is_folder(entry):
                ignored.append(entry.path)
                continue
            images = []
            for inner in scan(entry.path, hidden=False):
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
            log.warning("%s: skipped %d entries that are not images, e.g. %s", printable(path), len(ignored), example)
        super().__init__(files, path)
        self.class_names = names
        self.num_classes = len(counts)
        self.labels = np.repeat(np.arange(len(counts), dtype=np.int64), counts)


def scan(path: str, hidden: bool = True) -> list[os.DirEntry[str]]:
    """Entries of a folder by name, with or without hidden ones. Raises UserError when it cannot be listed."""
    try:
        with os.scandir(path) as entries:
            return sorted((e for e in entries if hidden or not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"{printable(path)}: cannot be listed ({error.strerror}); change its permissions or remove it"
        ) from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: if it is named as an image, reading it raises an error that names it
        return False
