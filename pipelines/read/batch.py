"""What every loader promises: the batch, the specification that determines it, and the loader's interface.

Shapes: B batch (of this shard), H = W image size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch

from pipelines.errors import UserError
from pipelines.read.order import Plan, Shard
from pipelines.read.settings import ReadSettings

if TYPE_CHECKING:
    from pipelines.read.source import Source


@dataclass(frozen=True)
class Batch:
    """One step's samples. It owns its memory: nothing changes under the consumer when the loader goes on.

    A place without a sample (the end of an evaluation, a corrupt image in it) has position -1, index -1, label -1 and
    a black image.
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


@dataclass(frozen=True)
class LoaderSpec(ReadSettings):
    """What determines a loader's batches, and how they are made (device, threads, ahead).

    Raises UserError for a value out of range. on_corrupt `skip` shows another sample where `shuffle` is set, and leaves
    the place empty where it is not (see `corrupt`).
    """

    path: str | tuple[str, ...]
    """a beton, an image folder, or all betons of one dataset (see `source.open_source`)"""
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

    def plan(self, num_samples: int) -> Plan:
        """Which positions each step takes, for a dataset of this many samples."""
        return Plan(num_samples, self.global_batch, self.shard, self.seed, self.shuffle, self.drop_last)


class Loader(Protocol):
    """A source read in the plan's order. A context manager; `close` is idempotent and leaves no thread behind."""

    spec: LoaderSpec
    source: Source
    plan: Plan
    num_classes: int
    steps_per_epoch: int
    corrupt: dict[int, int]
    """samples that turned out to be corrupt -> those shown in their place, -1 for none; grows while it reads"""
    wait_seconds: float
    """host seconds that the consumer has spent waiting for data so far"""

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches of steps start_step..steps_per_epoch-1. Closing the generator early leaves no thread blocked; a
        further call is legal.
        """
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Loader: ...

    def __exit__(self, *exc_info: object) -> None: ...
