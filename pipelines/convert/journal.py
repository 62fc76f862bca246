"""What a conversion has done so far, on disk, so that one killed at any moment continues where it stopped.

A working folder beside the final file holds the lock, the data (already laid out as the final beton) and the journal:
one line per finished task, appended only after its data is on the disk. A resumed conversion accepts a
line when its own checksum, the sources it names and the checksum of its data all agree, and continues after the
last such line.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import shutil
import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO

import numpy as np

from pipelines.convert.beton_writer import Packer, runs
from pipelines.convert.workers import SAMPLE_TYPE, DoneTask
from pipelines.errors import UserError, printable

COMMIT_SECONDS = 1.0
COMMIT_BYTES = 1 << 28
LOCK_ATTEMPTS = 100


class WorkFolder:
    """`.NAME.converting` beside the final file, locked against a second writer as long as this object is open."""

    def __init__(self, dst: str) -> None:
        """Raises UserError when the folder cannot be made or another process holds it."""
        folder, name = os.path.split(os.path.abspath(dst))
        self.path = os.path.join(folder, f".{name}.converting")
        lock = os.path.join(self.path, "lock")
        for attempt in range(LOCK_ATTEMPTS):
            try:
                os.makedirs(self.path, exist_ok=True)
                self._lock: IO[bytes] = open(lock, "ab")
            except OSError as error:
                if isinstance(error, FileNotFoundError) and attempt + 1 < LOCK_ATTEMPTS:
                    continue  # removed just now by its last owner
                raise UserError(
                    f"{printable(dst)}: cannot write there ({error.strerror}); choose another place"
                ) from None
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._lock.close()
                if not isinstance(error, BlockingIOError):  # a network disk without locks
                    raise UserError(
                        f"{printable(dst)}: cannot be locked there ({error.strerror}); choose another disk"
                    ) from None
                raise UserError(
                    f"{printable(dst)}: another process is converting to it; wait for it or choose another name"
                ) from None
            try:
                if os.path.samestat(os.stat(lock), os.fstat(self._lock.fileno())):
                    return
            except FileNotFoundError:
                pass
            self._lock.close()  # its last owner removed it between our opening and locking it
        raise UserError(f"{printable(dst)}: its working folder comes and goes; see what else writes there")

    def file(self, name: str) -> str:
        return os.path.join(self.path, name)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Gives the lock up; the folder goes if nothing worth keeping is in it."""
        if os.path.exists(self.path) and set(os.listdir(self.path)) <= {"lock"}:
            self.remove()
        self._lock.close()


class ConvertJournal:
    """The record of finished tasks, and the data file that it describes."""

    def __init__(self, folder: WorkFolder, identity: str) -> None:
        """identity: of all that every task depends on; a journal of another identity is started anew."""
        self.data_fd = os.open(folder.file("data"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._file = open(folder.file("journal"), "a+b")
        self._identity = identity
        self._thread = ThreadPoolExecutor(1)
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._last = time.monotonic()
        self._running: Future[None] | None = None

    def resume(self, digests: list[str], packer: Packer) -> list[DoneTask]:
        """Finished tasks from the first on, without payloads, as far as they hold; digests: of each task's sources. The
        rest is cut off; `packer` stands behind them."""
        self._file.seek(0)
        done: list[DoneTask] = []
        good = 0
        for number, line in enumerate(self._file):
            entry = _parse(line)
            if number == 0:
                if entry is None or entry.get("identity") != self._identity:
                    break
            elif number > len(digests) or (task := self._check(entry, number - 1, digests[number - 1], packer)) is None:
                break
            else:
                done.append(task)
            good += len(line)
        self._file.truncate(good)
        os.ftruncate(self.data_fd, packer.end if done else 0)
        if not good:
            self._pending.append(_line({"identity": self._identity}))
        return done

    def _check(self, entry: dict | None, number: int, digest: str, packer: Packer) -> DoneTask | None:
        """The task of a journal's line, None when its sources have changed or its data is not as it was written."""
        if entry is None or entry.get("task") != number or entry.get("sources") != digest:
            return None
        samples = np.frombuffer(base64.b64decode(entry["samples"]), SAMPLE_TYPE)
        before = packer.end
        addresses = packer.place(samples["size"])
        found = hashlib.sha256()
        for address, length in runs(addresses, samples["size"]):
            found.update(os.pread(self.data_fd, length, address))
        if found.hexdigest() != entry["sha256"]:
            packer.end = before
            return None
        faults = [(int(source), str(reason)) for source, reason in entry["faults"]]
        return DoneTask(number, samples, b"", entry["sha256"], faults, entry["how"])

    def add(self, done: DoneTask, digest: str) -> None:
        """Records a task whose payload has been written. A thread writes it to the disk each second, data first.
        Raises OSError of an earlier write."""
        entry = {
            "task": done.number,
            "sources": digest,
            "samples": base64.b64encode(done.samples.tobytes()).decode(),
            "sha256": done.sha256,
            "faults": done.faults,
            "how": done.how,
        }
        self._pending.append(_line(entry))
        self._pending_bytes += len(done.payload)
        if self._pending_bytes > COMMIT_BYTES or time.monotonic() - self._last > COMMIT_SECONDS:
            self.commit(wait=False)

    def commit(self, wait: bool = True) -> None:
        """Brings data, then journal, to the disk. Raises OSError."""
        if self._running is not None:
            self._running.result()
        lines, self._pending, self._pending_bytes = self._pending, [], 0
        self._running = self._thread.submit(self._write, b"".join(lines))
        if wait:
            self._running.result()
        self._last = time.monotonic()

    def _write(self, lines: bytes) -> None:
        os.fsync(self.data_fd)
        self._file.write(lines)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._thread.shutdown()
        os.close(self.data_fd)
        self._file.close()


def _line(entry: dict) -> bytes:
    text = json.dumps(entry, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> dict | None:
    """None for a line that was cut short or damaged."""
    checksum, _, text = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
        return None
    return json.loads(text)
