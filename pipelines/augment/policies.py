"""TrivialAugment and 3-Augment for a batch of bytes on its device, each image with its own operation.

Both draw one operation per image, uniformly. The arithmetic is that of randaugment.py: integer per pixel, PIL's.
Against torchvision on PIL's images, tests/unit/test_policies.py holds TrivialAugment's operations to the differences
that randaugment.py states, and 3-Augment's to none.

Shapes: B batch, H height, W width. Images are uint8 [B, 3, H, W], contiguous; per-image parameters are [B].
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pipelines.augment.randaugment import ENHANCED, NO_OP, Op, apply_pair, grayscale, on_rows, select

TRIVIAL_OPS = (
    NO_OP, Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.ROTATE, Op.BRIGHTNESS, Op.COLOR, Op.CONTRAST,
    Op.SHARPNESS, Op.POSTERIZE, Op.SOLARIZE, Op.AUTO_CONTRAST, Op.EQUALIZE,
)  # fmt: skip
"""of torchvision's TrivialAugmentWide, in its order, which never changes: stored targets depend on it"""
TRIVIAL_STEPS = 30  # its strengths are 0 to 30, of which 30 is the largest
BLUR_RADIUS = (0.1, 2.0)  # smallest and largest of 3-Augment, in pixels
_BLUR_BITS = 24  # of a weight of the blur; PIL's


def trivial_augment(images: Tensor, uniforms: tuple[Tensor, ...]) -> Tensor:
    """TrivialAugment in its wide space (Mueller and Hutter 2021), as torchvision's TrivialAugmentWide with bilinear
    interpolation: what geometry reads outside of the image is black.

    uniforms: four float64 [B] in [0, 1): the operation, the sign and the strength.
    """
    height, width = images.shape[2:]
    op, strength, sign = trivial_sample(uniforms)
    black = torch.zeros(3, dtype=torch.uint8, device=images.device)
    return apply_pair(images, [(op, trivial_amounts(op, strength, sign, height, width))], black)


def trivial_sample(u: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Uniforms [B] -> operation int64, strength int64 in 0..30, sign +1 or -1."""
    slot = (u[0] * len(TRIVIAL_OPS)).long()
    op = torch.full_like(slot, NO_OP)
    for place, kind in enumerate(TRIVIAL_OPS):
        op = torch.where(slot == place, int(kind), op)
    return op, (u[2] * (TRIVIAL_STEPS + 1)).long(), torch.where(u[1] > 0.5, 1.0, -1.0)


def trivial_amounts(op: Tensor, strength: Tensor, sign: Tensor, height: int, width: int) -> Tensor:
    """float64 [B]: `amounts` of randaugment.py for TrivialAugment's strengths.

    Values are those of the exact fractions. torchvision's float32 tables fall beside an integer at a few strengths:
    it moves an image by 15 pixels of 16 at strength 15, and does not invert a pixel that equals solarize's threshold
    at 11 strengths.
    """
    share = strength.double() / TRIVIAL_STEPS
    signed = sign * share
    shift = -(sign * (strength * 32 // TRIVIAL_STEPS))  # pixels, of images of any size
    by_op = {
        **dict.fromkeys((Op.SHEAR_X, Op.SHEAR_Y), 0.99 * signed),
        **dict.fromkeys((Op.TRANSLATE_X, Op.TRANSLATE_Y), shift),
        Op.ROTATE: 135.0 * signed,
        **dict.fromkeys((*ENHANCED, Op.SHARPNESS), 1 + 0.99 * signed),
        Op.POSTERIZE: (strength / 5).round(),  # bits cleared, 0 to 6
        Op.SOLARIZE: (255 * (TRIVIAL_STEPS - strength) + TRIVIAL_STEPS - 1) // TRIVIAL_STEPS,  # rounded up
    }
    return select(op, by_op)


def three_augment(images: Tensor, uniforms: tuple[Tensor, ...]) -> Tensor:
    """3-Augment (DeiT III, Touvron et al. 2022, and its code, augment.py): grayscale, solarize, or a Gaussian blur.

    uniforms: four float64 [B] in [0, 1): which of the three, and the radius of the blur.
    """
    which = (uniforms[0] * 3).long()
    x = images.int()
    kind = which[:, None, None, None]
    solarized = torch.where(x < 128, x, 255 - x)
    changed = torch.where(kind == 0, grayscale(x)[:, None], torch.where(kind == 1, solarized, x)).to(torch.uint8)
    low, high = BLUR_RADIUS
    radius = torch.where(which == 2, low + (high - low) * uniforms[1], 0.0)
    return on_rows(which == 2, gaussian_blur, changed, radius)


def gaussian_blur(images: Tensor, radius: Tensor) -> Tensor:
    """PIL's ImageFilter.GaussianBlur(radius): three passes along the rows, then three along the columns, each a mean
    over a box whose ends count in part (Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by
    extended box filtering").

    radius: float64 [B] in 0..2 (a box then has five pixels at most); 0 changes nothing.
    """
    variance = radius * radius / 3  # of one pass
    inner = ((torch.sqrt(12 * variance + 1) - 1) / 2).floor()  # pixels that count fully on either side: 0 or 1
    part = (2 * inner + 1) * (inner * (inner + 1) - 3 * variance) / (6 * (variance - (inner + 1) ** 2))
    one = 1 << _BLUR_BITS
    full = (one / (2 * (inner + part) + 1)).long()
    rest = (one - (2 * inner + 1).long() * full) // 2
    near = torch.where(inner > 0, full, rest)
    far = torch.where(inner > 0, rest, 0)
    weights = [w[:, None, None, None] for w in (far, near, full, near, far)]
    for axis in (3, 3, 3, 2, 2, 2):
        place, last = torch.arange(images.shape[axis], device=images.device), images.shape[axis] - 1
        shifted = [images.index_select(axis, (place + k).clamp(0, last)) for k in range(-2, 3)]  # edge pixels repeat
        total = functools.reduce(torch.add, [w * pixels for w, pixels in zip(weights, shifted, strict=True)])
        images = ((total + (one >> 1)) >> _BLUR_BITS).to(torch.uint8)
    return images
