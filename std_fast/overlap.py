"""From raw batches to batches with the teachers' answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from pipelines.augment import Augment, Mixed
from pipelines.batch import Batch
from std_fast.losses import TeacherAnswers
from std_fast.teachers import Teachers


@torch.no_grad()
def _prepare(
    batch: Batch, augment: Augment, teachers: Teachers | None, autocast: Callable
) -> tuple[Mixed, TeacherAnswers | None]:
    mixed = augment(batch)
    if teachers is None:
        return mixed, None
    with autocast():
        return mixed, teachers(mixed.images)


def taught(
    batches: Iterable[Batch], augment: Augment, teachers: Teachers | None, autocast: Callable
) -> Iterator[tuple[Mixed, TeacherAnswers | None]]:
    """Augments each batch and asks the teachers, who see exactly the images that the student will see."""
    for batch in batches:
        yield _prepare(batch, augment, teachers, autocast)
