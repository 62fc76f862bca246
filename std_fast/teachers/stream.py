"""The stream of training batches: read, augment, attach the teacher targets.

    loader.epoch(e) -> Batch (uint8) -> Augment -> TrainBatch -> TargetSource -> TrainBatch with targets -> step

Targets come in four ways: `TargetSource` (none: a plain run), `LabelSource` (the data set's labels), `TeacherSource`
(the teachers run on each batch), `CachedSource` (read from the target cache, or computed and written to it).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import torch

from pipelines.augment.device import Augment, TrainBatch
from pipelines.errors import UserError
from pipelines.read.batch import Batch, Loader
from std_fast.config.recipe import Distill
from std_fast.method.losses import TeacherTargets
from std_fast.runtime.budget import Ledger
from std_fast.runtime.speed import Stopwatch
from std_fast.teachers.epoch_writer import EpochWriter
from std_fast.teachers.overlap import Overlap, Prepared
from std_fast.teachers.target_cache import TargetCache
from std_fast.teachers.target_format import pack
from std_fast.teachers.teacher import Teachers


class TargetSource:
    """Where the targets of an epoch's batches come from; this one has none. Every rank makes the same calls."""

    @property
    def runs_teachers(self) -> bool:
        """Whether `targets` runs the teachers in this epoch: work for a stream of its own."""
        return False

    def open(self, epoch: int) -> None:
        """Before the first batch of an epoch is prepared."""

    def targets(self, batch: TrainBatch) -> TeacherTargets | None:
        """Targets of a batch that is being prepared, perhaps on another stream than the student's."""
        return None

    def deliver(self, batch: TrainBatch) -> None:
        """The batch, with its targets, is about to be trained on: on the student's stream."""

    def close(self) -> None:
        """After the last batch of an epoch, or in its middle. May be repeated."""


class LabelSource(TargetSource):
    """The data set's labels in place of M teachers' hard labels; of a mixed image that with the larger share."""

    def __init__(self, num_teachers: int) -> None:
        self.num_teachers = num_teachers

    def targets(self, batch: TrainBatch) -> TeacherTargets:
        return TeacherTargets(batch.main_labels()[:, None].expand(-1, self.num_teachers), None)


class TeacherSource(TargetSource):
    """The teachers see exactly the images that the student will see."""

    def __init__(self, teachers: Teachers, autocast: Callable[[], AbstractContextManager]) -> None:
        self.teachers, self.autocast = teachers, autocast

    @property
    def runs_teachers(self) -> bool:
        return True

    def targets(self, batch: TrainBatch) -> TeacherTargets:
        with self.autocast():
            return self.teachers(batch.images)


class CachedSource(TargetSource):
    """Targets of the epochs that the cache holds; those of others are computed by the teachers and written to it.

    Raises:
        UserError: from `open`: the epoch is damaged, or missing and there are no teachers; from any method: the cache
            cannot be written.
    """

    def __init__(self, cache: TargetCache, teachers: TeacherSource | None) -> None:
        self.cache, self.teachers = cache, teachers
        self._words: np.ndarray | None = None
        self._writer: EpochWriter | None = None

    @property
    def runs_teachers(self) -> bool:
        return self._words is None

    def open(self, epoch: int) -> None:
        self._words = self.cache.find(epoch)
        if self._words is not None:
            return
        if self.teachers is None:
            raise UserError(
                f"distill.target_cache: {self.cache.folder} does not hold epoch {epoch}; run `std-fast teach` for it"
            )
        self._writer = self.cache.writer(epoch)

    def targets(self, batch: TrainBatch) -> TeacherTargets:
        if self._words is not None:
            return self.cache.read(self._words, batch)
        assert self.teachers is not None
        return self.teachers.targets(batch)

    def deliver(self, batch: TrainBatch) -> None:
        if self._writer is not None:
            self._writer.add(batch.step, pack(batch.targets))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.end()
        self._writer = None


def target_source(
    distill: Distill,
    teachers: Teachers | None,
    cache: TargetCache | None,
    autocast: Callable[[], AbstractContextManager],
) -> TargetSource:
    """Where the targets of a run come from."""
    if distill.mode == "std" and distill.labels == "ground_truth":
        return LabelSource(distill.num_teachers)
    source = None if teachers is None else TeacherSource(teachers, autocast)
    if cache is not None:
        return CachedSource(cache, source)
    return source or TargetSource()


class BatchStream:
    """Training batches with their targets, without end, from any step on.

    On a GPU where teachers run, `Overlap` decides whether batch t+1 is prepared beside step t; otherwise nothing of it
    is read before it is asked for. The last batch of an epoch is not followed by a preparation. `close`, also in the
    middle of an epoch, drops what was prepared and leaves no thread blocked; `seek` does it too.

    Args:
        views: epoch e has the images (order, crops, augmentation) of epoch e mod views; 0: always new ones.
        overlap: None: nothing is prepared ahead.
        watch: gets the time of a step's parts "augment" and "teacher".
        ledger: gets the time of waiting for the loader as "data".
    """

    def __init__(
        self,
        loader: Loader,
        augment: Augment,
        targets: TargetSource | None = None,
        overlap: Overlap | None = None,
        views: int = 0,
        watch: Stopwatch | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self.loader, self.augment, self.source = loader, augment, targets or TargetSource()
        self._serial = Overlap("off", torch.device("cpu"))
        self.overlap, self.views = overlap or self._serial, views
        self.ledger = ledger or Ledger()
        self.watch = watch or Stopwatch(torch.device("cpu"), self.ledger)
        self._place = 0  # of the next batch to be prepared, in the entire training
        self._epoch: Generator[Batch] | None = None
        self._next: Prepared | None = None

    def seek(self, step: int) -> None:
        """Continues with the batch that follows `step` steps."""
        self.close()
        self._place = step

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> TrainBatch:
        """The next batch; its tensors may be used on the current stream."""
        prepared, self._next = self._next or self._prepare(), None
        overlap = self._overlap
        batch = overlap.receive(prepared)
        if overlap.ahead() and self._epoch is not None:
            self._next = self._prepare()
        self.source.deliver(batch)
        if self._epoch is None and self._next is None:  # it was the last of its epoch
            self.source.close()
        return batch

    @property
    def _overlap(self) -> Overlap:
        return self.overlap if self.source.runs_teachers else self._serial

    def _prepare(self) -> Prepared:
        if self._epoch is None:
            self._open()
        return self._overlap.prepare(self._make)

    def _open(self) -> None:
        epoch, start = divmod(self._place, self.loader.steps_per_epoch)
        shown = epoch % self.views if self.views else epoch
        self._epoch = self.loader.epoch(shown, start)
        self.source.open(shown)

    @torch.no_grad()
    def _make(self) -> TrainBatch:
        """Reads, augments and attaches targets."""
        epoch, self._place = self._place // self.loader.steps_per_epoch, self._place + 1
        raw = self._read()
        with self.watch.part("augment", self._place):
            batch = self.augment(raw)
        with self.watch.part("teacher", self._place) if self.source.runs_teachers else nullcontext():
            targets = self.source.targets(batch)
        return replace(batch, epoch=epoch, targets=targets)  # stochastic depth draws anew where views repeat

    def _read(self) -> Batch:
        epoch = self._epoch
        assert epoch is not None
        with self.ledger.during("data"):
            raw = next(epoch)
            if self._place % self.loader.steps_per_epoch == 0:  # the last one
                self._epoch = None
                epoch.close()
        return raw

    def close(self) -> None:
        """Ends the epoch. May be repeated; the stream can be used again."""
        epoch = self._epoch
        self._epoch = self._next = None
        self.source.close()
        if epoch is not None:
            epoch.close()
