"""Stored teacher targets: computed once for each position of an epoch, read by all later runs.

By DESIGN.md's rule 1 a batch is a pure function of seed, epoch and position, so the targets stored for (epoch,
position) belong to exactly the image that any later run with the same data settings has there: other students and
optimizers train from them bit for bit as with running teachers.

The files are described in target_format.py. Shapes: N positions of an epoch, B batch, M teachers, W words.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.augment.device import TrainBatch
from pipelines.errors import UserError
from pipelines.files import sync, write_atomic
from pipelines.read.batch import Loader
from pipelines.untrusted import open_regular
from std_fast import __version__
from std_fast.config.legacy import cache_file
from std_fast.config.recipe import Duration, Recipe
from std_fast.method.losses import TeacherTargets
from std_fast.runtime.distributed import SINGLE_PROCESS, World
from std_fast.teachers.fingerprint import check_same, fingerprint
from std_fast.teachers.target_format import (
    DIGEST_BYTES,
    FORMAT,
    Header,
    fault_of,
    header_for,
    read_header,
    unpack,
)

log = logging.getLogger("std_fast")


def epochs_needed(recipe: Recipe, steps_per_epoch: int) -> int | None:
    """How many different epochs a run shows; None for a budget of GPU-hours without views."""
    length = Duration.parse(recipe.run.length)
    if length.unit == "gpu-hours":
        return recipe.distill.views or None
    epochs = max(1, -(-length.steps(steps_per_epoch, recipe.run.batch) // steps_per_epoch))
    return min(epochs, recipe.distill.views or epochs)


class TargetCache:
    """The folder of stored targets that a run uses.

    A thread writes the files, after waiting for the copies from the device; its errors are raised by the next call.

    Args:
        rows: positions of an epoch that the run needs, from 0 on.
        batch: positions of a step over all ranks.
        soft: whether `read` gives the distribution too.
    """

    def __init__(
        self, folder: Path, header: Header, rows: int, batch: int, soft: bool, world: World = SINGLE_PROCESS
    ) -> None:
        self.folder, self.header, self.world = folder, header, world
        self.rows, self.batch, self.soft = rows, batch, soft
        self._words: dict[int, np.ndarray] = {}
        self._writers: dict[int, EpochWriter] = {}
        self._jobs: deque[Future[None]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="std_fast-targets")

    def path(self, epoch: int) -> Path:
        return cache_file(self.folder / f"epoch-{epoch:05d}.targets")

    def stored(self, epoch: int) -> bool:
        """Whether the epoch is there, for as many positions as are needed."""
        try:
            return os.stat(self.path(epoch)).st_size >= self.rows * self.header.row_bytes + DIGEST_BYTES
        except OSError:
            return False

    def missing(self, epochs: int) -> list[int]:
        return [epoch for epoch in range(epochs) if not self.stored(epoch)]

    # -- reading ------------------------------------------------------------------------------------------------------

    def open(self, epoch: int) -> np.ndarray:
        """Words of a stored epoch, uint16 `[N, M, W]`, with digest and contents checked.

        The last one stays in memory (a few MB for each million images and teacher). A memory map would end the process
        where the file shrinks or the disk fails.

        Raises:
            UserError: the file is missing or damaged.
        """
        if epoch not in self._words:
            self._words = {epoch: self._load(epoch)}
        return self._words[epoch]

    def _load(self, epoch: int) -> np.ndarray:
        h, path = self.header, self.path(epoch)
        fix = "run `std-fast teach` to make it again"
        try:
            with open_regular(path) as file:
                data = file.read()
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); {fix}") from None
        size = len(data) - DIGEST_BYTES
        if size <= 0 or size % h.row_bytes:
            raise UserError(f"{path}: is cut short; {fix}")
        words = np.frombuffer(data, "<u2", size // 2).reshape(-1, h.teachers, h.words)
        expected = data[size:]
        digest = h.digest(epoch)
        digest.update(words.reshape(-1).data)
        if digest.digest() != expected:
            raise UserError(f"{path}: its digest does not match: the file is damaged, or of another cache; {fix}")
        if fault := fault_of(words, h.classes):
            raise UserError(f"{path}: holds {fault}; {fix}")
        return words

    def find(self, epoch: int) -> np.ndarray | None:
        """Words of an epoch, as `open` gives them; None where it is not stored. Every rank must call it.

        Raises:
            UserError: the epoch is damaged, or what was written before could not be.
        """
        if epoch in self._writers:
            self.wait()
        return self.open(epoch) if self.world.broadcast(epoch in self._words or self.stored(epoch)) else None

    def read(self, words: np.ndarray, batch: TrainBatch) -> TeacherTargets:
        """Targets of this rank's rows of a batch, from its epoch's words; the host does not wait for the device."""
        B = len(batch.positions)
        first = batch.step * self.batch + self.world.rank * B
        rows = torch.from_numpy(words[first : first + B].astype(np.uint16).view(np.int16))
        if batch.positions.is_cuda:
            rows = rows.pin_memory().to(batch.positions.device, non_blocking=True)
        return unpack(rows, self.soft)

    # -- writing ------------------------------------------------------------------------------------------------------

    def writer(self, epoch: int) -> EpochWriter:
        """See `EpochWriter`; every rank must call it."""
        writer = self._writers[epoch] = EpochWriter(self, epoch)
        return writer

    def submit(self, job: Callable[..., None], *args: Any) -> None:
        """Runs `job` of a writer in the thread, in the order of the calls."""
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
        """Waits until everything given to writers is on the disk. Raises UserError when it cannot be written."""
        while self._jobs:
            self._result(self._jobs.popleft())

    def close(self) -> None:
        """Ends all writers, waits for them, and ends the thread."""
        try:
            for writer in self._writers.values():
                writer.end()
        finally:
            self._pool.shutdown(wait=True)
        self.wait()


class EpochWriter:
    """Stores the targets of one epoch. Rank 0 gathers them from all ranks and writes them.

    An epoch that is not finished stays in its partial file, and the next writer of the same epoch continues it.

    Raises:
        UserError: another process writes this epoch, or the disk is full or cannot be written; from any method.
    """

    def __init__(self, store: TargetCache, epoch: int) -> None:
        self.store, self.epoch, self.header = store, epoch, store.header
        self.path = store.folder / f".epoch-{epoch:05d}.{self.header.digest(epoch).hexdigest()[:8]}.partial"
        self._fd = -1
        if store.world.main:
            store.submit(self._open)
            store.wait()

    def _open(self) -> None:
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._fd).st_ino != os.stat(self.path).st_ino:  # finished by another process just now
                raise FileNotFoundError
            os.posix_fallocate(self._fd, 0, self.store.rows * self.header.row_bytes)  # a full disk shows here
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
        shape = (self.store.rows, self.header.teachers, self.header.words)
        empty = ~np.asarray(np.memmap(self.path, "<u2", "r", shape=shape))[..., 0].all(1)
        return int(empty.argmax()) if empty.any() else self.store.rows

    def add(self, step: int, words_BMW: Tensor) -> None:
        """The words of this rank's rows of a step. Every rank must call it; the host does not wait for the device."""
        words = self.store.world.gather(words_BMW)
        if not self.store.world.main:
            return
        copied = None
        if words.is_cuda:
            host = torch.empty(words.shape, dtype=words.dtype, pin_memory=True)
            host.copy_(words, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        else:
            host = words
        self.store.submit(self._write, step * self.store.batch, host, copied)

    def _write(self, first: int, words: Tensor, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        rows = words[: max(0, self.store.rows - first)].numpy().astype("<i2").tobytes()
        at = first * self.header.row_bytes
        while rows:
            done = os.pwrite(self._fd, rows, at)
            rows, at = rows[done:], at + done

    def end(self) -> None:
        """Ends the epoch, which gets its name if all its positions are there. Does not wait; may be called again."""
        if self._fd >= 0:
            self.store.submit(self._end)

    def _end(self) -> None:
        if self._fd < 0:
            return
        try:
            if self.filled() < self.store.rows:
                return
            size = self.store.rows * self.header.row_bytes
            digest = self.header.digest(self.epoch)
            digest.update(np.memmap(self.path, np.uint8, "r", shape=(size,)).data)
            os.ftruncate(self._fd, size)
            os.pwrite(self._fd, digest.digest(), size)
            os.fsync(self._fd)
            os.replace(self.path, self.store.path(self.epoch))
            sync(self.store.folder)
        finally:
            os.close(self._fd)
            self._fd = -1


def open_target_cache(
    recipe: Recipe, loader: Loader, precision: str, rows: int, world: World = SINGLE_PROCESS
) -> TargetCache | None:
    """The target cache of a recipe, created where there is none yet; None when the recipe names none.

    Args:
        rows: positions of an epoch that will be read or written.

    Raises:
        UserError: the folder is no target cache, was made with other settings, or cannot be made.
    """
    if not recipe.distill.target_cache:
        return None
    folder = Path(recipe.distill.target_cache)
    values = fingerprint(recipe, loader, precision)
    if world.main and not cache_file(folder / "targets.json").exists():
        _create(folder, header_for(recipe, values))
    world.wait_for_all()
    header = read_header(folder)
    check_same(folder, header.fingerprint, values)
    return TargetCache(folder, header, rows, recipe.run.batch, recipe.distill.labels == "soft", world)


def _create(folder: Path, header: Header) -> None:
    data = {
        "format": FORMAT,
        "fingerprint": header.fingerprint,
        "classes": header.classes,
        "teachers": header.teachers,
        "top_k": header.top_k,
        "made_with": {"std_fast": __version__, "torch": torch.__version__},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "targets.json", json.dumps(data, indent=1))
    except OSError as error:
        raise UserError(f"distill.target_cache: {folder} cannot be made ({error}); give another folder") from None
