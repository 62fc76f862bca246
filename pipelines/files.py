"""Files that are replaced in one piece or grow by complete records, what waits for the disk, and digests."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path


@contextmanager
def replacing(path: Path, flush: bool = False) -> Iterator[Path]:
    """A name beside `path` to write a file under; when the block ends well it gets the name `path`.

    Readers find the old file or the new one, never a part. When the block raises, the draft is removed and `path` stays
    as it is; a process that is killed leaves the draft, `.NAME.PID.partial`.

    Args:
        flush: wait until file and name are on the disk, so that they outlive a machine that loses power.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield draft
        if flush:
            sync(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    if flush:
        sync(path.parent)


def write_atomic(path: Path, text: str) -> None:
    """Replaces a file by `text`, in UTF-8, in one piece; see `replacing`. Raises OSError where it cannot be written."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def sync(path: str | Path) -> None:
    """Waits until a file's content, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: str | Path) -> str:
    """Hex digest of a file's content. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


class AppendFile:
    """A file that records are appended to, each of them complete or not at all.

    Args:
        head: what the file begins with; it is written with the first record.
    """

    def __init__(self, path: Path, head: bytes = b"") -> None:
        self._path, self._head = path, head
        self._file: FileIO | None = None

    def _open(self) -> FileIO:
        """The file at the path: a new one where it was removed, or its folder renamed."""
        if self._file is not None:
            try:
                if os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno())):
                    return self._file
            except OSError as error:  # ESTALE: removed by another machine, on NFS
                if error.errno not in (errno.ENOENT, errno.ESTALE):
                    raise
            before, self._file = self._file, None
            with suppress(OSError):
                before.close()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "ab", buffering=0)
        return self._file

    def append(self, record: bytes) -> None:
        """Raises OSError where the record cannot be written; nothing of it then stays in the file."""
        file = self._open()
        end = os.fstat(file.fileno()).st_size
        record = record if end else self._head + record
        try:
            if file.write(record) != len(record):  # the last bytes of a disk
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(file.fileno(), end)
            raise

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
