"""The members of an uncompressed tar as offsets into the file: nothing is unpacked, no name reaches the file system.

Reads ustar, GNU (long names, sizes in base 256) and pax headers, after POSIX.1-2008 (pax, "ustar Interchange Format")
and GNU tar's manual ("Basic Tar Format"). A tar that lies within another one is read in place too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple, Protocol

BLOCK = 512
MAX_HEADER = 1 << 20  # bytes of a long name or a pax header

_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a pipe",
    b"S": "a sparse file",
    b"M": "the rest of a file on another volume",
}


class Member(NamedTuple):
    name: str
    offset: int
    """of the first byte of the member's data, in the file that holds the tar"""
    size: int
    fault: str
    """why the member must not be read; "" for a regular file"""


class Reader(Protocol):
    """Reads parts of a file that may lie on another machine."""

    size: int

    def pread(self, length: int, offset: int) -> bytes:
        """At most `length` bytes from `offset` on, fewer at the end. Raises OSError or UserError."""
        ...


class FileReader:
    """A Reader of an open file."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size = os.fstat(fd).st_size

    def pread(self, length: int, offset: int) -> bytes:
        return os.pread(self._fd, length, offset)


class TarDamaged(Exception):
    """The tar cannot be read on; the message says why."""


def members(file: int | Reader, start: int = 0, size: int | None = None) -> Iterator[Member]:
    """Regular files of the tar in bytes start..start+size of a file (a descriptor or a Reader), and what else it holds
    as members with a fault (directories are left out). Raises TarDamaged where the tar is cut short or is none."""
    reader = FileReader(file) if isinstance(file, int) else file
    end = reader.size if size is None else start + size
    at, long_name, pax = start, "", dict[str, str]()
    while True:
        block = reader.pread(BLOCK, at) if at + BLOCK <= end else b""
        if len(block) < BLOCK:
            raise TarDamaged("the archive is cut short: its end mark is missing")
        if block == bytes(BLOCK):
            return
        if _number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * 0x20:
            raise TarDamaged(f"no tar header at byte {at}: not a tar, or damaged")
        kind = block[156:157]
        length = _number(block[124:136])
        if kind in (b"L", b"K", b"x", b"g"):
            if not 0 <= length <= MAX_HEADER:
                raise TarDamaged(f"a header of {length} bytes at byte {at}: more than any name needs")
            extra = reader.pread(length, at + BLOCK)
            if kind == b"L":
                long_name = _text(extra)
            elif kind == b"x":
                pax = _pax(extra, at)
            at += BLOCK + _padded(length)
            continue
        name = pax.get("path") or long_name or _ustar_name(block)
        try:
            length = int(pax.get("size", length))
        except ValueError:
            length = -1
        if length < 0:
            raise TarDamaged(f"a size that is no size at byte {at}")
        sparse = any(key.startswith("GNU.sparse") for key in pax)
        long_name, pax = "", {}
        holds_data = kind not in (b"1", b"2", b"3", b"4", b"5", b"6")
        if holds_data and at + BLOCK + length > end:
            raise TarDamaged(f"the archive is cut short within {name}")
        if kind != b"5":
            fault = _KINDS[b"S"] if sparse else _KINDS.get(kind, "") or _path_fault(name)
            yield Member(name, at + BLOCK, length, f"{fault} in an archive: not read" if fault else "")
        at += BLOCK + (_padded(length) if holds_data else 0)


def _padded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _number(raw: bytes) -> int:
    """A size or checksum: octal, or base 256 where the first bit is set."""
    if raw[0] & 0x80:
        return int.from_bytes(bytes([raw[0] & 0x7F]) + raw[1:], "big")
    try:
        return int(raw.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return -1


def _ustar_name(block: bytes) -> str:
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(block[:100])}" if prefix else _text(block[:100])


def _pax(raw: bytes, at: int) -> dict[str, str]:
    """Records of the form `LENGTH KEY=VALUE\\n`."""
    records = {}
    start = 0
    while start < len(raw) and raw[start]:
        space = raw.find(b" ", start, start + 8)
        length = raw[start:space] if space > 0 else b""
        end = start + int(length) if length.isdigit() else 0
        if not space + 1 < end <= len(raw):
            raise TarDamaged(f"a damaged pax header at byte {at}")
        key, _, value = raw[space + 1 : end - 1].partition(b"=")
        records[_text(key)] = value.decode("utf-8", "surrogateescape")
        start = end
    return records


def _path_fault(name: str) -> str:
    if name.startswith("/") or ".." in name.split("/"):
        return "a path that leads out of the archive"
    return "" if name and "\0" not in name else "a file without a usable name"
