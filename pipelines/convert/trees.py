"""The files of a source, wherever they are: entries of a folder, parts of a file, and copies on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from pipelines.convert.listing import Builder
from pipelines.convert.tar_index import FileReader, Reader
from pipelines.errors import UserError, printable
from pipelines.read.folder import scan

MAX_PARTS = 100_000
log = logging.getLogger("std_fast")


class Entry(NamedTuple):
    name: str
    is_folder: bool
    size: int
    stamp: int
    """changes when the file does: modification time, ns, or a digest of what a server sends"""
    fault: str
    """why it is neither a folder nor a file that can be read; "" if it is one"""


class Tree(Protocol):
    """A folder of a source and what is below it. Paths are relative to it, with `/` between the parts."""

    root: str
    named: bool
    """whether it is files that the user named, rather than all of a folder"""
    source: str
    """the source in messages: the one file that is named, else the root"""

    def children(self, path: str = "") -> list[Entry]:
        """Entries of a folder by name. Raises UserError when it cannot be listed."""
        ...

    def place(self, path: str) -> str:
        """Path or URL of a folder or file: what `Listing.files` holds."""
        ...

    def is_copied(self, path: str) -> bool:
        """Whether the file was copied to this machine, where `place` is."""
        ...

    def open(self, path: str) -> contextlib.AbstractContextManager[Reader]:
        """For reading parts of a file. Raises UserError."""
        ...

    def local(self, path: str) -> str:
        """Path of the file, or of a copy of it, on this machine. Raises UserError."""
        ...


class LocalTree:
    """A folder on this machine; `only`: the names that are looked at in it, where not all are."""

    def __init__(self, root: str, only: list[str] | None = None) -> None:
        self.root, self._only = root, only
        self.named = only is not None
        self.source = os.path.join(root, only[0]) if only and len(only) == 1 else root

    def children(self, path: str = "") -> list[Entry]:
        folder = self.place(path)
        if self._only is not None and not path:
            return [_entry(folder, name) for name in self._only]
        return [_entry(folder, entry.name) for entry in scan(folder)]

    def place(self, path: str) -> str:
        return os.path.join(self.root, path) if path else self.root

    def is_copied(self, path: str) -> bool:
        return False

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[Reader]:
        place = self.place(path)
        try:
            fd = os.open(place, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{printable(place)}: cannot be opened ({error.strerror}); fix its permissions") from None
        try:
            yield FileReader(fd)
        finally:
            os.close(fd)

    def local(self, path: str) -> str:
        return self.place(path)


def add_missing_parts(tree: Tree, entries: list[Entry], builder: Builder) -> None:
    """Files called PART-of-PARTS (train-00003-of-00014.parquet) that a folder lacks are faults. Gaps between files that
    only have numbers (train-000003.tar) are warned of: parts of a data set are used on purpose, and where more numbers
    are missing than there, they are none of parts (n01440764.tar)."""
    if tree.named:
        return
    found: dict[tuple[str, str, str], set[str]] = {}
    numbered: dict[tuple[str, str], set[str]] = {}
    for entry in entries:
        match = re.fullmatch(r"(.*?)(\d+)-of-(\d+)(\D*)", entry.name)
        if match:
            found.setdefault((match[1], match[3], match[4]), set()).add(match[2])
        elif match := re.fullmatch(r"(.*?)(\d+)(\.\w+)", entry.name):
            numbered.setdefault((match[1], match[3]), set()).add(match[2])
    for (before, total, after), parts in found.items():
        width = len(next(iter(parts)))
        for number in range(min(int(total), MAX_PARTS)):
            if (part := str(number).zfill(width)) not in parts:
                builder.fault(f"{before}{part}-of-{total}{after}", "this file of the data set is missing")
    for (before, after), parts in numbered.items():
        numbers, width = set(map(int, parts)), min(map(len, parts))
        first, last = min(numbers), max(numbers)
        count = last - first + 1 - len(numbers)
        if 0 < count <= len(numbers):
            gap = next(number for number in range(first, last) if number not in numbers)
            log.warning(
                "%s: %d of the files between %s and %s are not there, e.g. %s: add them, unless a part is wanted",
                *(printable(tree.root), count),
                *(printable(f"{before}{str(number).zfill(width)}{after}") for number in (first, last, gap)),
            )


def _entry(folder: str, name: str) -> Entry:
    try:
        status = os.stat(os.path.join(folder, name))  # links are followed
    except OSError as error:
        return Entry(name, False, 0, 0, f"cannot be read: {error.strerror}")
    if stat.S_ISDIR(status.st_mode):
        return Entry(name, True, 0, 0, "")
    fault = "" if stat.S_ISREG(status.st_mode) else "neither a file nor a folder"
    return Entry(name, False, status.st_size, status.st_mtime_ns, fault)
