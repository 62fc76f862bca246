"""The lock of a run's folder: one process at a time trains into it, also where it is removed or renamed meanwhile."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
from io import FileIO
from pathlib import Path

from pipelines.errors import UserError

log = logging.getLogger("std_fast")


class FolderLock:
    """`.lock` in a run's folder, held until `close`. It holds a random word, by which a copy of the folder, as on a
    larger disk, is told from the folder of another run.

    Raises:
        UserError: another process holds it, or there cannot be such a folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._path, self._word = folder, folder / ".lock", secrets.token_bytes(16)
        self._file = self._take()

    def _take(self) -> FileIO:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"run.out: {self.folder} is a file, or lies below one; name a folder") from None
        file = open(self._path, "ab", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(f"{self.folder}: another process is training into it; give another --run.out") from None
        except OSError as error:  # such as Lustre, where it is mounted without flock
            log.warning("%s: cannot be locked there (%s): start no second run into it", self.folder, error.strerror)
        try:
            file.truncate(0)
            file.write(self._word)
        except OSError:
            file.close()
            raise
        return file

    def held(self) -> bool:
        """Whether the folder of this path is the one that was locked. May be asked from another thread."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False
        except OSError:  # of a disk that does not answer: the write that follows will tell
            return True

    def keep(self) -> None:
        """Before a file is written: a folder that is gone is made anew, a copy that took its place is locked.

        Raises:
            UserError: the folder was removed or renamed, and another run has made one of its name.
        """
        if self.held():
            return
        if self._path.exists() and self._path.read_bytes() not in (b"", self._word):
            raise UserError(
                f"{self.folder}: was removed or renamed, and another run has begun in a new one of its name; this run "
                "ends and writes nothing there; one that was renamed continues with --resume --run.out FOLDER"
            )
        before, self._file = self._file, self._take()
        before.close()

    def close(self) -> None:
        self._file.close()
