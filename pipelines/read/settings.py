"""Settings that a recipe's `data` section and a loader's specification have in common, declared once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from pipelines.errors import UserError
from pipelines.options import opt
from pipelines.read.crops import CropSpec

Resample = Literal["auto", "area", "bilinear", "bicubic"]
Backend = Literal["auto", "ffcv", "dali", "torch", "resident"]
OnCorrupt = Literal["stop", "skip"]
LARGEST_SIDE = 4096  # pixels of an image that a model sees
SMALLEST = {"image_size": 8, "aug_repeats": 1, "threads": 0, "ahead": 1, "corrupt_limit": 1}


@dataclass(frozen=True, kw_only=True)
class ReadSettings:
    """How images are read, cropped and resized. Raises UserError naming `data.FIELD` for a value out of range."""

    image_size: int = opt(224, "side of the images that the student sees, in pixels")
    crop: CropSpec = opt(CropSpec("random_resized"), "how training crops are drawn")
    resample: Resample = opt(
        "auto",
        "how training crops are resized; auto: bilinear, antialiased; area: mean over a pixel's footprint, as FFCV's "
        "own loader does it, with backend ffcv only",
    )
    aug_repeats: int = opt(
        1,
        "repeated augmentation (DeiT: 3): an epoch, no longer than without, shows each of its images so many times, "
        "augmented anew",
    )
    one_part: bool = opt(False, "accept a beton that is one part of several of a conversion, without the others")
    threads: int = opt(0, "decoding threads; 0: all cores that this process may use")
    ahead: int = opt(2, "batches prepared beyond the one in use; bounds the loader's memory")
    on_corrupt: OnCorrupt = opt(
        "stop",
        "when an image cannot be decoded: `stop`; or `skip` it: in training the next good one of the dataset is shown "
        "in its place, in evaluation it is not counted",
    )
    corrupt_limit: int = opt(100, "so many different images are skipped by a process, at one more it stops")
    hw_decoder_load: float | None = opt(
        None,
        "dali on a GPU: share of the images that its JPEG engine decodes, 0 to 1; default: a short sweep decides, once "
        "per machine and dataset",
    )

    def __post_init__(self) -> None:
        for name, smallest in SMALLEST.items():
            if getattr(self, name) < smallest:
                raise UserError(f"data.{name}: {getattr(self, name)} is too small; use {smallest} or more")
        if self.image_size > LARGEST_SIDE:
            raise UserError(f"data.image_size: {self.image_size} is too large; use {LARGEST_SIDE} pixels or less")
        load = self.hw_decoder_load
        if load is not None and not 0 <= load <= 1:
            raise UserError(f"data.hw_decoder_load: {load} must lie in 0..1")
        for name, known in (("resample", get_args(Resample)), ("on_corrupt", get_args(OnCorrupt))):
            if getattr(self, name) not in known:
                raise UserError(f"data.{name}: {getattr(self, name)!r} is unknown; use one of {', '.join(known)}")

    def shared(self, **changes: Any) -> dict[str, Any]:
        """These settings, and no others of a subclass, as keyword arguments, with `changes`."""
        return {f.name: getattr(self, f.name) for f in fields(ReadSettings)} | changes
