"""Gradient accumulation: a process's share of a batch in micro-batches, of a size that is given or that fits in memory.

Shapes: B images of a process's share, N parts (the micro-batches of all ranks), D STD modules.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipelines.augment.device import TrainBatch
from pipelines.errors import UserError
from std_fast.config.recipe import Recipe
from std_fast.method.losses import TeacherTargets
from std_fast.method.student import Student
from std_fast.models.drop_path import GROUP
from std_fast.runtime.distributed import SINGLE_PROCESS, World
from std_fast.runtime.memory import ran_out

T = TypeVar("T")
log = logging.getLogger("std_fast")


@dataclass
class MicroBatch:
    """How many images a process forwards and backwards at a time.

    With `auto`, a pass that runs out of memory is repeated with the next smaller size, and so are all that follow. Of
    several processes none may then wait for gradients of one that ran out: a step of a new kind is a trial, in which
    nothing is sent before all hosts have agreed that it fits. A kind that has fitted runs out later
    only where another process takes memory; that ends the run, as without `auto`.

    Args:
        size: images; 0: the complete share.
        unit: sizes are multiples of it.
        auto: whether the size may shrink.
    """

    size: int = 0
    unit: int = 4
    auto: bool = False
    world: World = SINGLE_PROCESS
    fitted: set[Hashable] = field(default_factory=set)
    """kinds of steps that have fitted"""

    def resume(self, found: int) -> None:
        """Before the first step: continues with the size that `auto` had found, where it still divides the share."""
        if self.auto and found in sizes(self.size, self.unit):
            self.size = found

    def split(self, batch: TrainBatch) -> list[TrainBatch]:
        """The micro-batches, in order: views, nothing is copied."""
        images = len(batch.positions)
        if not self.size or self.size == images:
            return [batch]
        return [rows(batch, start, start + self.size) for start in range(0, images, self.size)]

    def is_trial(self, kind: Hashable) -> bool:
        """Whether nothing may be sent in a step of this kind before `fit` returns."""
        return self.world.size > 1 and kind not in self.fitted

    def fit(self, call: Callable[[], T], undo: Callable[[], None], kind: Hashable, images: int) -> T:
        """With `auto`: what `call` returns; after `undo` again, at a smaller size, where memory runs out on any rank.

        Args:
            kind: what decides the memory of the step besides the size.
            images: B.
        """
        while True:
            short = False
            try:
                result = call()
            except Exception as error:
                smaller = self._smaller(images)
                agreeable = self.world.size == 1 or self.is_trial(kind)
                if not (smaller and agreeable and ran_out(error)):
                    raise
                short = True  # the error is forgotten here, and with it the memory that its frames hold
            if self.is_trial(kind):
                short = self.world.any(short)
            if not short:
                self.fitted.add(kind)
                return result
            undo()
            before, self.size = self.size or images, self._smaller(images)
            self.fitted.clear()
            log.warning(
                "run.micro_batch: memory ran out with %d images in a pass; gradients now add up over %d passes of %d",
                before,
                images // self.size,
                self.size,
            )
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _smaller(self, images: int) -> int:
        """The largest size of at most half; 0 where there is none."""
        return max((n for n in sizes(images, self.unit) if 2 * n <= (self.size or images)), default=0)


def micro_batch_of(recipe: Recipe, world: World = SINGLE_PROCESS) -> MicroBatch:
    """What `run.micro_batch` means for this number of processes. UserError: it does not divide a process's share."""
    wanted, share = recipe.run.micro_batch, recipe.run.batch // world.size
    unit = GROUP if recipe.student.drop_path_mode == "subset" else 4  # rows that belong together: see drop_path, mine
    allowed = sizes(share, unit)
    if wanted == "auto":
        return MicroBatch(share, unit, True, world)
    if wanted and wanted not in allowed:
        nearest = max((n for n in allowed if n <= wanted), default=min(allowed))
        raise UserError(
            f"run.micro_batch: {wanted} must divide the {share} images of each process and be a multiple of {unit}; "
            f"take {nearest}"
        )
    return MicroBatch(int(wanted), unit, False, world)


def sizes(images: int, unit: int) -> list[int]:
    """Sizes of micro-batches that divide so many images evenly, ascending."""
    return [n for n in range(unit, images + 1, unit) if images % n == 0]


def rows(batch: TrainBatch, start: int, stop: int) -> TrainBatch:
    """Some consecutive images of a batch with all that belongs to them, as views."""
    few: dict[str, Any] = {
        f.name: value[start:stop] for f in fields(batch) if isinstance(value := getattr(batch, f.name), Tensor)
    }
    if batch.targets is not None:
        few["targets"] = TeacherTargets._make(x if x is None else x[start:stop] for x in batch.targets)
    return replace(batch, **few)


@contextmanager
def mine_over(
    micro_batches: Sequence[TrainBatch], student: Student, terms: Callable[[TrainBatch], Tensor], world: World
) -> Iterator[None]:
    """Inside, MINE's bound is that of the micro-batches of all ranks together, as are its gradients.

    log-mean-exp is no mean over micro-batches: its gradient needs the value over all of them first. So the student
    runs once more over each, without gradients.

    Args:
        terms: `Student.mine_terms` of a micro-batch.
    """
    psi = next(student.mine.parameters())
    dtype = torch.promote_types(psi.dtype, torch.float32)
    mines = student.statistics()
    terms_ND2 = torch.zeros(len(micro_batches), len(mines), 2, device=psi.device, dtype=dtype)
    try:
        with torch.no_grad():
            for row_D2, micro in zip(terms_ND2, micro_batches, strict=True):
                row_D2.copy_(terms(micro))
    finally:  # the other ranks wait for it, also where memory runs out
        terms_ND2 = world.gather(terms_ND2)
    try:
        for mine, terms_N2 in zip(mines, terms_ND2.unbind(1), strict=True):
            mine.begin_parts(terms_N2)
        yield
    finally:
        for mine in mines:
            mine.end_parts()
