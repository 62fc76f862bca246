"""The form in which every source of images is listed for conversion: where each image's bytes lie, and its label.

Any process can read any image from that without unpacking anything; names inside archives are labels in messages and
never paths. What cannot be listed as an image is kept with its name and the reason.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipelines.errors import UserError, printable
from pipelines.read.base import MAX_CLASSES
from pipelines.read.manifest import normal
from pipelines.untrusted import read_bytes

CLUTTER = ("thumbs.db", "desktop.ini")
"""what file managers leave, besides hidden files"""
IMAGE_ENDINGS = ("jpg", "jpeg", "jpe", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "jp2")
MAX_TEXT = 1 << 28
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SOURCES = (
    "an image folder (SRC/CLASS/*), a tar or a folder of tars, parquet files, or CIFAR's binary files "
    "(images without classes need --labels)"
)


@dataclass
class Listing:
    """The images of a source, in its order; N of them."""

    kind: str
    names: list[str] = field(default_factory=list)
    """paths from the source's root"""
    files: list[str] = field(default_factory=list)
    """the files that hold the images' bytes; for a folder, the class folders"""
    classes: list[str] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)
    """name and reason of what should be an image and cannot be listed as one"""
    ignored: list[str] = field(default_factory=list)
    """entries that were passed over because they are no images of a class"""
    labels: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    file_numbers: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    offsets: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """-1: the image is a file of its own, called by its name within files[file_numbers]"""
    sizes: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    stamps: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """modification time, ns, of the file that holds the image"""
    archives: dict[str, int] = field(default_factory=dict)
    """stamps of the files whose parts are read while the images are converted, by their names in the source"""

    def __len__(self) -> int:
        return len(self.names)

    def place(self, index: int) -> tuple[int, str, int, int]:
        """Where an image's bytes lie: number in `files`, name within that folder ("" for a file), offset, length."""
        offset = int(self.offsets[index])
        name = os.path.basename(self.names[index]) if offset < 0 else ""
        return int(self.file_numbers[index]), name, max(0, offset), int(self.sizes[index])

    def digest(self, indices: npt.NDArray[np.int64]) -> str:
        """Identity of these images as far as it shows without reading them: names, labels, places, lengths, times."""
        digest = hashlib.sha256("\n".join(self.names[i] for i in indices).encode("utf-8", "surrogateescape"))
        for column in (self.labels, self.offsets, self.sizes, self.stamps):
            digest.update(column[indices].astype("<i8").tobytes())
        return digest.hexdigest()


class Builder:
    """Collects a listing row by row. Labels are class names or, all of them, numbers."""

    def __init__(self, kind: str, fixed_classes: list[str] | None) -> None:
        """fixed_classes: all class names in order, where the user gave them."""
        self.listing = Listing(kind)
        self.fixed_classes = fixed_classes
        self._rows: list[tuple[int, int, int, int]] = []
        self._labels: list[int | str] = []

    def file(self, path: str) -> int:
        self.listing.files.append(path)
        return len(self.listing.files) - 1

    def add(self, name: str, label: int | str, file: int, offset: int, size: int, stamp: int) -> None:
        self.listing.names.append(name)
        self._labels.append(label)
        self._rows.append((file, offset, size, stamp))

    def fault(self, name: str, reason: str) -> None:
        self.listing.faults.append((printable(name), reason))

    def done(self, src: str, classes: list[str] | None = None) -> Listing:
        """The listing; classes: names that the source itself has. Raises UserError for labels outside the classes."""
        listing = self.listing
        if not listing.names and not listing.faults:
            raise UserError(f"{printable(src)}: no images found in it; give {SOURCES}")
        columns = np.array(self._rows, np.int64).reshape(-1, 4)
        listing.file_numbers, listing.offsets, listing.sizes, listing.stamps = columns.T.copy()
        classes = None if classes is None else [printable(name) for name in classes]
        labels, fixed = self._labels, self.fixed_classes
        if fixed and classes and fixed != classes and not any(isinstance(label, str) for label in labels):
            labels = [classes[label] if 0 <= label < len(classes) else label for label in labels]  # type: ignore[index, operator]
        classes = fixed or classes
        if any(isinstance(label, str) for label in labels):
            listing.labels, classes = self._numbered([printable(str(label)) for label in labels], classes, src)
        else:
            listing.labels = np.array(labels, np.int64)
            highest = int(listing.labels.max(initial=-1))
            outside = (listing.labels < 0) | (listing.labels >= MAX_CLASSES)
            if outside.any():
                i = int(outside.argmax())
                raise UserError(
                    f"{printable(src)}: {printable(listing.names[i])} has label {labels[i]}, and labels must lie in "
                    f"0..{MAX_CLASSES - 1}; fix it"
                )
            if classes is None:
                refuse_without_zero(listing.labels.tolist(), printable(src))
                classes = [str(i) for i in range(highest + 1)]
            if highest >= len(classes):
                raise too_few(src, highest, classes)
        compared = normal(classes)
        if len(set(compared)) != len(compared):
            twice = next(name for name in compared if compared.count(name) > 1)
            raise UserError(f"{printable(src)}: two classes are called {twice!r}; rename one")
        listing.classes = classes
        return listing

    @staticmethod
    def _numbered(names: list[str], classes: list[str] | None, src: str) -> tuple[npt.NDArray[np.int64], list[str]]:
        """Numbers of the classes called so, and all classes. Names that are numbers, none of them a class's name, are
        those of classes, as in a label file. Raises UserError for a name that is not among them."""
        classes = classes or sorted(set(names))
        number, names = {name: i for i, name in enumerate(normal(classes))}, normal(names)
        unknown = sorted(set(names) - number.keys())
        if len(unknown) == len(set(names)) and all(name.isascii() and name.isdecimal() for name in unknown):
            highest = max(map(int, unknown))
            if highest >= len(classes):
                raise too_few(src, highest, classes)
            return np.array([int(name) for name in names], np.int64), classes
        if unknown:
            raise UserError(
                f"{printable(src)}: class {unknown[0]!r} ({len(unknown)} such) is not among the {len(classes)} "
                "classes given; fix the list of classes or the source"
            )
        return np.array([number[name] for name in names], np.int64), classes


def refuse_without_zero(labels: Sequence[int], where: str) -> None:
    """Raises UserError for numbers of classes without names that begin at another than 0."""
    if min(labels, default=0) > 0:
        raise UserError(
            f"{where}: numbers begin at {min(labels)}; if it is ImageNet's ground truth, give the devkit "
            "(ILSVRC2012_devkit_t12.tar.gz), which holds the class of each; where it is a part of a data set, "
            "convert all parts together; otherwise number from 0, or give --classes, whose first line names number 0"
        )


def too_few(src: str, highest: int, classes: list[str]) -> UserError:
    return UserError(
        f"{printable(src)}: has label {highest}, but only {len(classes)} classes are named; "
        "fix the labels or give --classes with all names"
    )


def has_image_ending(name: str) -> bool:
    return "." in name and name.lower().rpartition(".")[2] in IMAGE_ENDINGS


def is_clutter(name: str) -> bool:
    """Hidden files and what file managers leave."""
    return name.startswith(".") or name.lower() in CLUTTER


def in_order(names: list[str], where: str) -> list[str]:
    """Images in the order of their names, for labels that stand without names. Raises UserError where i10 may come
    before i2 or after it."""
    as_text = sorted(names)
    as_numbers = sorted(as_text, key=lambda name: re.sub(r"\d+", lambda digits: digits[0].zfill(64), name))
    if as_text != as_numbers:
        text, number = next(pair for pair in zip(as_text, as_numbers, strict=True) if pair[0] != pair[1])
        raise UserError(
            f"{where}: the order of the names is not certain ({printable(text)} comes before {printable(number)} as "
            "text, after it by number); write NAME and LABEL on each line"
        )
    return as_text


def read_text(path: str) -> str:
    """A list that the user gave. Raises UserError."""
    try:
        return read_bytes(path, MAX_TEXT).decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{printable(path)}: cannot be read as text ({reason}); give a text file in UTF-8") from None
