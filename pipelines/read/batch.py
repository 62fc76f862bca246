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
from pipelines.read.crops import CropSpec
from pipelines.read.order import Plan, Shard

if TYPE_CHECKING:
    from pipelines.read.source import Source

RESAMPLES = ("auto", "area", "bilinear", "bicubic")
ON_CORRUPT = ("stop", "replace", "leave_out")


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
class LoaderSpec:
    """What determines a loader's batches, and how they are made (device, threads, ahead). Raises UserError (range)."""

    path: str | tuple[str, ...]
    """a beton, an image folder, or several betons of one dataset (see `source.open_source`)"""
    image_size: int
    global_batch: int
    _: KW_ONLY
    shuffle: bool
    drop_last: bool
    crop: CropSpec
    shard: Shard = field(default_factory=Shard)
    seed: int = 0
    device: str = "cpu"
    threads: int = 0
    """decoding threads; 0 = as many as there are cores for this process"""
    ahead: int = 2
    """batches prepared beyond the one in use: bounds the loader's memory"""
    resample: str = "auto"
    """"auto" is antialiased bilinear in every backend, "bicubic" is antialiased too; "area", the mean over the pixel's
    footprint, is in ffcv only: the others refuse it by name.
    """
    on_corrupt: str = "stop"
    """what becomes of a sample that cannot be decoded: "stop" raises, "replace" shows another one, "leave_out" none
    (see `intact`)
    """
    corrupt_limit: int = 100
    """so many different ones; one more raises all the same"""
    hw_decoder_load: float | None = None
    """dali on a GPU: share of the images that its JPEG engine decodes, 0 to 1; None: the best of a short sweep"""

    def __post_init__(self) -> None:
        for name, lowest in (
            ("image_size", 1),
            ("global_batch", 1),
            ("threads", 0),
            ("ahead", 1),
            ("corrupt_limit", 1),
        ):
            if getattr(self, name) < lowest:
                raise UserError(f"{name} {getattr(self, name)} must be {lowest} or more")
        if self.hw_decoder_load is not None and not 0 <= self.hw_decoder_load <= 1:
            raise UserError(f"hw_decoder_load {self.hw_decoder_load} must lie in 0..1")
        for name, known in (("resample", RESAMPLES), ("on_corrupt", ON_CORRUPT)):
            if getattr(self, name) not in known:
                raise UserError(f"{name} {getattr(self, name)!r} is unknown: choose one of {', '.join(known)}")

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
