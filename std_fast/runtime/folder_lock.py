"""The lock of a run's folder: one process at a time trains into it, also where it is removed or renamed meanwhile."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
from io import FileIO
from pathlib import Path

from pipelines.errors import UserError

log = logging.getLogger("std_fast")


def check_free(folder: Path) -> None:
    """UserError where another process trains into the folder. Writes nothing, so it needs no room and no permission."""
    with contextlib.suppress(OSError), open(folder / ".lock", "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, which NFS grants for a file opened to read
        except BlockingIOError:
            raise UserError(_in_use(folder)) from None


def _in_use(folder: Path) -> str:
    return f"{folder}: another process is training into it; give another --run.out"


class FolderLock:
    """`.lock` in a run's folder, held until `close`. It holds a random word of the run that began there last, by which
    a copy of the folder, as on a larger disk, is told from the folder of another run.

    Until `claim` nothing is written into it, so that a command which is refused leaves the folder to its run.

    Raises:
        UserError: another process holds it, or there cannot be such a folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._path = folder, folder / ".lock"
        try:
            self._file = self._take()
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"run.out: {folder} is a file, or lies below one; name a folder") from None
        except BlockingIOError:
            raise UserError(_in_use(folder)) from None
        self._word = self._path.read_bytes()

    def _take(self) -> FileIO:
        """The file, locked. Raises OSError; BlockingIOError where another process holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = open(self._path, "ab", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # SMB may say the latter
            file.close()
            raise BlockingIOError(*error.args) from None
        except OSError as error:  # such as Lustre, where it is mounted without flock
            log.warning("%s: cannot be locked there (%s): start no second run into it", self.folder, error.strerror)
        return file

    def claim(self) -> None:
        """As a run begins: another one that took the folder for its own, as of a copy, ends. Raises OSError."""
        self._word = secrets.token_bytes(16)
        self._write(self._file)

    def _write(self, file: FileIO) -> None:
        file.truncate(0)
        file.write(self._word)

    def held(self) -> bool:
        """Whether the folder of this path is the one that was locked. May be asked from another thread."""
        try:
            if not os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno())):
                return False
            # the word too: some disks lock on each machine alone; empty: between the calls of `_write`
            return self._path.read_bytes() in (b"", self._word)
        except (FileNotFoundError, ValueError):  # ValueError: `keep` has just closed the file, in the other thread
            return False
        except OSError as error:  # of a disk that does not answer: the write that follows will tell
            return error.errno != errno.ESTALE  # by which NFS says that another machine removed the file

    def keep(self) -> None:
        """Before a file is written: a folder that is gone is made anew, a copy that took its place is locked.

        Raises:
            UserError: another run has begun in the folder, or in a new one of its name.
            OSError: the folder cannot be made or locked now; a later call may succeed.
        """
        if self.held():
            return
        found = self._path.read_bytes() if self._path.exists() else b""
        if found not in (b"", self._word):
            raise UserError(
                f"{self.folder}: another run has begun in it or, if it was removed or renamed, in a new one of its "
                "name; this run ends and writes nothing there; one that was renamed continues with --resume --run.out "
                "FOLDER"
            )
        try:
            file = self._take()
        except BlockingIOError as error:
            if found:  # a copy, in which another command has begun nothing yet, and may be refused
                return
            raise BlockingIOError(error.errno, "another command is starting a run there", str(self.folder)) from None
        try:
            if found != self._word:
                self._write(file)
        except OSError:
            file.close()
            raise
        before, self._file = self._file, file
        with contextlib.suppress(OSError):
            before.close()

    def close(self) -> None:
        self._file.close()
