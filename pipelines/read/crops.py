"""Crop boxes: which part of each stored image becomes the model's input.

A box is (top, left, height, width) in pixels of the stored image, int32, inside the image, at least 1 by 1. Boxes are
computed on the host in float64, a batch at a time. Backends only crop and resize, so all of them see the same crops.

Shapes: B batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.errors import FieldError
from pipelines.options import opt

Sizes = npt.NDArray[np.integer]
Boxes = npt.NDArray[np.int32]

KINDS = ("random_resized", "center", "full")
_TRIES = 10  # torchvision's number


def random_resized_crop(
    heights: Sizes,
    widths: Sizes,
    seed: int,
    epoch: int,
    positions: npt.NDArray[np.int64],
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Boxes:
    """Random boxes [B, 4]: area a fraction in `scale` of the image, width/height log-uniform in `ratio`.

    The algorithm is torchvision's (`transforms.RandomResizedCrop.get_params`): ten tries, then the largest central box
    whose ratio is allowed. Try t takes the four words of draw t of the sample's CROP counter: area, ratio, top, left.
    """
    from pipelines import rng  # and with it torch: a recipe is checked without

    heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    boxes = _central_within(heights, widths, ratio)
    todo = np.arange(len(heights))
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for draw in range(_TRIES):
        height, width = heights[todo], widths[todo]
        u = rng.uniform(seed, epoch, positions[todo], rng.Purpose.CROP, draw).astype(np.float64)
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u[:, 0])
        aspect = np.exp(log_low + (log_high - log_low) * u[:, 1])
        w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)
        top = (u[:, 2] * (height - h + 1)).astype(np.int64)
        left = (u[:, 3] * (width - w + 1)).astype(np.int64)
        boxes[todo[fits]] = np.stack([top, left, h, w], axis=1)[fits]
        todo = todo[~fits]
        if not todo.size:
            break
    return boxes


def _central_within(heights: Sizes, widths: Sizes, ratio: tuple[float, float]) -> Boxes:
    """The largest central boxes [B, 4] whose width/height lies in `ratio`."""
    h = np.minimum(heights, np.maximum(np.rint(widths / ratio[0]), 1)).astype(np.int64)
    w = np.minimum(widths, np.maximum(np.rint(heights * ratio[1]), 1)).astype(np.int64)
    return _central(heights, widths, h, w)


def _central(heights: Sizes, widths: Sizes, h: Sizes, w: Sizes) -> Boxes:
    return np.stack([(heights - h) // 2, (widths - w) // 2, h, w], axis=1).astype(np.int32)


@dataclass(frozen=True)
class CropSpec:
    """How boxes are drawn. Raises FieldError for a value out of range."""

    kind: str = opt("random_resized", f"one of {', '.join(KINDS)}")
    scale: tuple[float, float] = opt((0.08, 1.0), "random_resized: least and largest share of the image's area")
    ratio: tuple[float, float] = opt((3 / 4, 4 / 3), "random_resized: least and largest width/height")
    fraction: float = opt(0.875, "center: side of the square, as a share of the image's shorter side")

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise FieldError("crop", "kind", f"{self.kind!r} is unknown; choose one of {', '.join(KINDS)}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise FieldError("crop", "scale", f"{self.scale} must be two increasing numbers in (0, 1]")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise FieldError("crop", "ratio", f"{self.ratio} must be two increasing positive numbers")
        if not 0 < self.fraction <= 1:
            raise FieldError("crop", "fraction", f"{self.fraction} must lie in (0, 1]")

    def boxes(self, heights: Sizes, widths: Sizes, seed: int, epoch: int, positions: npt.NDArray[np.int64]) -> Boxes:
        """Boxes int32 [B, 4] for images of these sizes at these positions of the epoch.

        `center` cuts squares of side round(fraction * shorter side), up to rounding what timm evaluates: resize the
        shorter side to image_size / fraction, then cut the central image_size square. `full` covers each image;
        resizing stretches it to the model's square.
        """
        if self.kind == "random_resized":
            return random_resized_crop(heights, widths, seed, epoch, positions, self.scale, self.ratio)
        heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
        if self.kind == "full":
            return _central(heights, widths, heights, widths)
        side = np.maximum(np.rint(self.fraction * np.minimum(heights, widths)), 1).astype(np.int64)
        return _central(heights, widths, side, side)
