"""Stored teacher targets: computed once for each position of an epoch, read by all later runs.

By DESIGN.md's rule 1 a batch is a pure function of seed, epoch and position, so the targets stored for (epoch,
position) belong to exactly the image that any later run with the same data settings has there: other students and
optimizers train from them bit for bit as with running teachers.

The files are described in target_format.py. Shapes: N positions of an epoch, B batch, M teachers, W words.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.augment.device import TrainBatch
from pipelines.errors import UserError
from pipelines.files import write_atomic
from pipelines.untrusted import open_regular
from std_fast import __version__
from std_fast.config.legacy import cache_file
from std_fast.config.recipe import Distill, Duration
from std_fast.method.losses import TeacherTargets
from std_fast.runtime.distributed import SINGLE_PROCESS, World
from std_fast.teachers.epoch_writer import EpochWriter, WriteQueue
from std_fast.teachers.fingerprint import check_same
from std_fast.teachers.target_format import (
    DIGEST_BYTES,
    FORMAT,
    Header,
    epoch_path,
    fault_of,
    header_for,
    read_header,
    unpack,
)

log = logging.getLogger("std_fast")


def epochs_needed(length: Duration, steps_per_epoch: int, batch: int, views: int) -> int | None:
    """How many different epochs a run shows; None for a budget of GPU-hours without views.

    Args:
        length, batch: `run.length` and `run.batch`.
        views: `distill.views`.
    """
    if length.unit == "gpu-hours":
        return views or None
    epochs = max(1, -(-length.steps(steps_per_epoch, batch) // steps_per_epoch))
    return min(epochs, views or epochs)


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
        self._queue = WriteQueue(folder)

    def path(self, epoch: int) -> Path:
        return epoch_path(self.folder, epoch)

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
        digest = h.digest(epoch)
        digest.update(words.reshape(-1).data)
        if digest.digest() != data[size:]:
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
        where = self.folder, self.header, epoch
        self._writers[epoch] = EpochWriter(*where, self.rows, self.batch, self.world, self._queue)
        return self._writers[epoch]

    def wait(self) -> None:
        """Waits until everything given to writers is on the disk. Raises UserError when it cannot be written."""
        self._queue.wait()

    def close(self) -> None:
        """Ends all writers, waits for them, and ends the thread."""
        try:
            for writer in self._writers.values():
                writer.end()
        finally:
            self._queue.close()


def open_target_cache(
    distill: Distill, fingerprint: dict[str, Any], rows: int, batch: int, world: World = SINGLE_PROCESS
) -> TargetCache:
    """The target cache of a recipe's section `distill`, created where there is none yet.

    Args:
        fingerprint: what the run's targets depend on, see `fingerprint.fingerprint`.
        rows: positions of an epoch that will be read or written.
        batch: positions of a step over all ranks.

    Raises:
        UserError: the folder is no target cache, was made with other settings, or cannot be made.
    """
    folder = Path(distill.target_cache)
    if world.main and _holds_nothing(folder):
        _create(folder, header_for(distill, fingerprint))
    world.wait_for_all()
    header = read_header(folder)
    check_same(folder, header.fingerprint, fingerprint)
    return TargetCache(folder, header, rows, batch, distill.labels == "soft", world)


def _holds_nothing(folder: Path) -> bool:
    """Whether the folder has no header, or one without targets, as a start that failed leaves it."""
    if not cache_file(folder / "targets.json").exists():
        return True
    read_header(folder)  # refuses a file of something else, which is not ours to replace
    return not any(name.lstrip(".").startswith("epoch-") for name in os.listdir(folder))


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
