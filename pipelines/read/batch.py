"""The batch, the specification that determines it, and the interface of every loader.

Shapes: B batch (of this shard), H = W image size, N samples of the dataset.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch

from pipelines.errors import DataError, UserError
from pipelines.read.crops import Boxes
from pipelines.read.order import BatchSampler, Shard, indices_at
from pipelines.read.settings import ReadSettings

if TYPE_CHECKING:
    from pipelines.read.base import Integers, Source


@dataclass(frozen=True)
class Batch:
    """One step's samples. It owns its memory: the loader never writes into it again.

    A row without a sample (past the end of an evaluation, or a corrupt image in it) has position -1, index -1, label -1
    and a black image.
    """

    images: torch.Tensor
    """uint8 [B, 3, H, W], RGB, channels_last, on the device"""
    labels: torch.Tensor
    """int64 [B] on the device"""
    positions: torch.Tensor
    """int64 [B] on the device: places in the epoch's order, the key of every random number of the sample"""
    indices: npt.NDArray[np.int64]
    """int64 [B] on the host: places in the dataset"""
    epoch: int
    step: int
    """within the epoch"""


@dataclass
class BatchSlots:
    """The rows of a batch before it is read: which samples, of which size, cut where. All on the host.

    Rows past the end of the dataset (position -1) come last; the first `count` rows have a size and a box.
    """

    epoch: int
    step: int
    positions: Integers
    """[B], -1: past the end"""
    indices: Integers
    """[B], -1: no sample"""
    heights: Integers
    """[count], of the stored images"""
    widths: Integers
    boxes: Boxes
    """int32 [count, 4]"""

    @classmethod
    def at(cls, sampler: BatchSampler, order: Integers, epoch: int, step: int) -> BatchSlots:
        """The rows of a step, sizes and boxes not filled in. order: the epoch's, int64 [N]."""
        positions = sampler.positions(step)
        count = int((positions >= 0).sum())
        sides, boxes = np.empty((2, count), np.int64), np.empty((count, 4), np.int32)
        return cls(epoch, step, positions, indices_at(order, positions), sides[0], sides[1], boxes)

    @property
    def count(self) -> int:
        """Rows before the end of the dataset."""
        return len(self.boxes)

    def keys(self, labels: Integers) -> Integers:
        """Labels and positions of the rows, int64 [2, B], -1 where there is no sample. labels: of the dataset, [N]."""
        empty = self.indices < 0
        return np.stack([np.where(empty, -1, labels[self.indices]), np.where(empty, -1, self.positions)])


@dataclass(frozen=True)
class LoaderSpec(ReadSettings):
    """What determines a loader's batches, and how they are made (device, threads, ahead).

    Raises UserError for a value out of range. on_corrupt `skip` shows another sample where `shuffle` is set, and leaves
    the row empty where it is not (see `corrupt`).
    """

    path: str | tuple[str, ...]
    """a beton, an image folder, or all betons of one conversion (see `source.open_source`)"""
    global_batch: int
    """samples per step over all processes"""
    _: KW_ONLY
    shuffle: bool
    drop_last: bool
    shard: Shard = field(default_factory=Shard)
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.global_batch < 1:
            raise UserError(f"run.batch: {self.global_batch} is too small; use 1 or more")

    def sampler(self, num_samples: int) -> BatchSampler:
        """The positions of each step, for a dataset of this many samples."""
        return BatchSampler(
            num_samples, self.global_batch, self.shard, self.seed, self.shuffle, self.drop_last, self.aug_repeats
        )


class Loader(Protocol):
    """A source read in the sampler's order. A context manager; `close` is idempotent and leaves no thread behind."""

    backend: str
    """its name in `data.backend`"""
    spec: LoaderSpec
    source: Source
    sampler: BatchSampler
    num_classes: int
    steps_per_epoch: int
    corrupt: dict[int, int]
    """samples found to be corrupt -> those shown in their place, -1 for none; grows while the loader reads"""
    wait_seconds: float
    """host seconds that the consumer has spent waiting for data so far"""
    fault: DataError | None
    """what one of the next steps will raise, where that is known already"""

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Batch]:
        """Batches of steps start_step..steps_per_epoch-1. Closing the generator early leaves no thread blocked; a
        further call is legal.
        """
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Loader: ...

    def __exit__(self, *exc_info: object) -> None: ...
