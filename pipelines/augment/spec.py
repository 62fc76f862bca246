"""Which augmentations a training batch gets: the recipe's `augment` section."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from pipelines.errors import UserError
from pipelines.options import opt

Policy = Literal["randaugment", "trivial_augment", "three_augment"]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class AugmentSpec:
    """What is done to a training batch. Raises UserError naming `augment.FIELD` when a value is out of range."""

    flip: float = opt(0.5, "probability of a horizontal flip")
    shift: int = opt(0, "random translation by up to this many pixels in each direction, reflect padding; 0: off")
    mixup: float = opt(0.8, "alpha of mixup's Beta(alpha, alpha), Zhang et al. 2018; 0: off")
    cutmix: float = opt(1.0, "alpha of CutMix's Beta(alpha, alpha), Yun et al. 2019; 0: off")
    mix_prob: float = opt(1.0, "probability that a sample is mixed at all")
    switch: float = opt(0.5, "probability of CutMix rather than mixup where both are on")
    erase: float = opt(0.25, "probability of random erasing with normal noise, Zhong et al. 2020")
    policy: Policy = opt(
        "randaugment",
        "what changes colours and shapes: RandAugment, where randaugment_n is not 0; TrivialAugment in its wide space "
        "(Mueller & Hutter 2021); or 3-Augment (DeiT III: grayscale, solarize or blur; its color_jitter is 0.3)",
    )
    randaugment_n: int = opt(
        0, "RandAugment: operations per image, each applied with probability 0.5, as timm's rand-mM-nN-mstdS; 0: off"
    )
    randaugment_m: float = opt(9.0, "RandAugment: their magnitude, 0 to 10")
    randaugment_mstd: float = opt(0.5, "RandAugment: standard deviation of the magnitude")
    color_jitter: float = opt(
        0.0, "brightness, contrast and saturation by factors within 1 +- this; 0: off, as in timm with RandAugment"
    )
    mean: tuple[float, float, float] = opt(IMAGENET_MEAN, "mean of each channel, of pixels in [0, 1]")
    std: tuple[float, float, float] = opt(IMAGENET_STD, "standard deviation of each channel, of pixels in [0, 1]")

    def __post_init__(self) -> None:
        for name in ("flip", "mix_prob", "switch", "erase"):
            self._number(name, "a probability from 0 to 1", lambda v: 0 <= v <= 1)
        for name in ("randaugment_m", "randaugment_mstd"):
            self._number(name, "a number from 0 to 10", lambda v: 0 <= v <= 10)
        self._number("randaugment_n", "an integer from 0 (off) to 8", lambda v: isinstance(v, int) and 0 <= v <= 8)
        if self.policy not in get_args(Policy):
            raise UserError(f"augment.policy must be one of {', '.join(get_args(Policy))}, not {self.policy!r}")
        if self.policy != "randaugment" and self.randaugment_n:
            raise UserError(
                f"augment.randaugment_n must be 0 with augment.policy {self.policy}, not {self.randaugment_n}"
            )
        self._number("color_jitter", "a number from 0 (off) to 1", lambda v: 0 <= v <= 1)
        for name in ("mixup", "cutmix"):
            self._number(name, "0 (off) or an alpha from 0.01 to 100", lambda v: v == 0 or 0.01 <= v <= 100)
        self._number("shift", "a number of pixels: an integer, 0 or more", lambda v: isinstance(v, int) and v >= 0)
        self._channels("mean", "from 0 to 1 (not 0..255)", lambda x: 0 <= x <= 1)
        self._channels("std", "above 0, at most 1 (not 0..255)", lambda x: 0 < x <= 1)

    @property
    def mixes(self) -> bool:
        """Whether any sample can be mixed with its neighbour."""
        return self.mix_prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    def _number(self, name: str, wanted: str, valid: Callable[[float], bool]) -> None:
        value = getattr(self, name)
        if not _is_number(value) or not valid(value):
            raise UserError(f"augment.{name} must be {wanted}, not {value!r}")

    def _channels(self, name: str, wanted: str, valid: Callable[[float], bool]) -> None:
        value = getattr(self, name)
        three = isinstance(value, (list, tuple)) and len(value) == 3
        if not three or not all(_is_number(x) and valid(x) for x in value):
            raise UserError(f"augment.{name} must be three numbers {wanted}, not {value!r}")
        object.__setattr__(self, name, tuple(value))  # a list from YAML; the spec stays hashable


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
