"""Writes one epoch of a target cache: see target_cache.py, and target_format.py for the file.

Shapes: B batch, M teachers, W words.
"""

from __future__ import annotations

import fcntl
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.errors import UserError
from pipelines.files import sync
from std_fast.runtime.distributed import World
from std_fast.teachers.target_format import Header, epoch_path


class WriteQueue:
    """Runs the writers' jobs in a thread, in the order of `submit`. The error of a job is raised by the next call.

    Raises:
        UserError: from any method: `folder` cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._jobs: deque[Future[None]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="std_fast-targets")

    def submit(self, job: Callable[..., None], *args: Any) -> None:
        while self._jobs and self._jobs[0].done():
            self._result(self._jobs.popleft())
        self._jobs.append(self._pool.submit(job, *args))

    def _result(self, job: Future[None]) -> None:
        try:
            job.result()
        except OSError as error:
            raise UserError(
                f"distill.target_cache: {self.folder} cannot be written ({error}); free space, or give another folder"
            ) from None

    def wait(self) -> None:
        while self._jobs:
            self._result(self._jobs.popleft())

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        self.wait()


class EpochWriter:
    """Stores the targets of one epoch. Rank 0 gathers them from all ranks and writes them.

    An epoch that is not finished stays in its partial file, and the next writer of the same epoch continues it.

    Args:
        folder, header: the cache's.
        rows: positions of the epoch.
        batch: positions of a step over all ranks.

    Raises:
        UserError: another process writes this epoch, or the disk is full or cannot be written; from any method.
    """

    def __init__(
        self, folder: Path, header: Header, epoch: int, rows: int, batch: int, world: World, queue: WriteQueue
    ) -> None:
        self.folder, self.header, self.epoch = folder, header, epoch
        self.rows, self.batch, self.world, self._queue = rows, batch, world, queue
        self.path = folder / f".epoch-{epoch:05d}.{self.header.digest(epoch).hexdigest()[:8]}.partial"
        self._fd = -1
        if world.main:
            queue.submit(self._open)
            queue.wait()

    def _open(self) -> None:
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._fd).st_ino != os.stat(self.path).st_ino:  # finished by another process just now
                raise FileNotFoundError
            os.posix_fallocate(self._fd, 0, self.rows * self.header.row_bytes)  # a full disk shows here
        except OSError as error:
            os.close(self._fd)
            self._fd = -1
            if isinstance(error, (BlockingIOError, FileNotFoundError)):
                raise UserError(
                    f"{self.path}: another process is writing it; wait for it, or give another distill.target_cache"
                ) from None
            raise

    def filled(self) -> int:
        """How many positions from 0 on have their targets already (0 on other ranks than the first)."""
        if self._fd < 0:
            return 0
        shape = (self.rows, self.header.teachers, self.header.words)
        empty = ~np.asarray(np.memmap(self.path, "<u2", "r", shape=shape))[..., 0].all(1)
        return int(empty.argmax()) if empty.any() else self.rows

    def add(self, step: int, words_BMW: Tensor) -> None:
        """The words of this rank's rows of a step. Every rank must call it; the host does not wait for the device."""
        words = self.world.gather(words_BMW)
        if not self.world.main:
            return
        copied = None
        if words.is_cuda:
            host = torch.empty(words.shape, dtype=words.dtype, pin_memory=True)
            host.copy_(words, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        else:
            host = words
        self._queue.submit(self._write, step * self.batch, host, copied)

    def _write(self, first: int, words: Tensor, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        rows = words[: max(0, self.rows - first)].numpy().astype("<i2").tobytes()
        at = first * self.header.row_bytes
        while rows:
            done = os.pwrite(self._fd, rows, at)
            rows, at = rows[done:], at + done

    def end(self) -> None:
        """Ends the epoch, which gets its name if all its positions are there. Does not wait; may be called again."""
        if self._fd >= 0:
            self._queue.submit(self._end)

    def _end(self) -> None:
        if self._fd < 0:
            return
        try:
            if self.filled() < self.rows:
                return
            size = self.rows * self.header.row_bytes
            digest = self.header.digest(self.epoch)
            digest.update(np.memmap(self.path, np.uint8, "r", shape=(size,)).data)
            os.ftruncate(self._fd, size)
            os.pwrite(self._fd, digest.digest(), size)
            os.fsync(self._fd)
            os.replace(self.path, epoch_path(self.folder, self.epoch))
            sync(self.folder)
        finally:
            os.close(self._fd)
            self._fd = -1
