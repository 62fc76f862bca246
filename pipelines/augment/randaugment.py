"""RandAugment and colour jitter for a batch of bytes on its device, each image with its own operations.

The operations, their probability and their magnitudes are those of timm's `rand-mM-nN-mstdS-inc1` (timm 1.0.31,
`timm.data.auto_augment`; Cubuk et al. 2020), the arithmetic is PIL's. What is done per pixel is integer arithmetic, so
that eager and compiled code, CPU and GPU give the same bytes from the same parameters.

Two consecutive operations of every image are one `apply_pair`: value, geometry, value. An operation on values in first
place runs before the geometry and one in second place after it, so the sampled order holds; two geometric operations
become one resampling of their product. What an image did not draw is an identity: a table of 0..255, a factor 1, the
unit matrix. policies.py has other ways to draw the same operations.

An operation alone, against PIL as timm applies it (largest difference of values 0..255, and share of values that
differ; tests/unit/test_randaugment.py):

| operations | how | difference | in at most |
|---|---|---|---|
| Invert, Posterize, Solarize, SolarizeAdd, Equalize | table [B, 3, 256] | 0 | |
| AutoContrast | table; PIL's float product may fall just short of an integer | 1 | 1 % |
| Color, Contrast, Brightness, Sharpness | blend with gray, mean gray, black, blurred; factor of 22 bits | 1 | 0.3 % |
| Rotate, ShearX, ShearY, TranslateXRel, TranslateYRel | one bilinear resampling, weights of 11 bits | 1 | 3 % |

Colour jitter is three of these blends: 2 levels, in at most 2 %. A sequence is exactly its operations one after the
other, with one exception: two geometric operations of one pair are resampled once, not twice, which blurs less (a pixel
whose source falls outside of the frame after either is still filled). A difference of 1 can grow in a later operation.

Differences from timm by choice: interpolation is always bilinear (timm draws bilinear or bicubic unless told), and
posterize with no bits left (level 10) is black, as with older Pillows (Pillow 13 raises an error there).

Shapes: B batch, H height, W width. Images are uint8 [B, 3, H, W], contiguous; per-image parameters are [B].
"""

from __future__ import annotations

import enum
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Op(enum.IntEnum):
    """timm's `_RAND_INCREASING_TRANSFORMS`, in its order. Numbers never change: stored targets depend on them."""

    AUTO_CONTRAST = 0
    EQUALIZE = 1
    INVERT = 2
    ROTATE = 3
    POSTERIZE = 4
    SOLARIZE = 5
    SOLARIZE_ADD = 6
    COLOR = 7
    CONTRAST = 8
    BRIGHTNESS = 9
    SHARPNESS = 10
    SHEAR_X = 11
    SHEAR_Y = 12
    TRANSLATE_X = 13
    TRANSLATE_Y = 14


TABLED = (Op.AUTO_CONTRAST, Op.EQUALIZE, Op.INVERT, Op.POSTERIZE, Op.SOLARIZE, Op.SOLARIZE_ADD)
ENHANCED = (Op.COLOR, Op.CONTRAST, Op.BRIGHTNESS)
GEOMETRIC = (Op.ROTATE, Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y)
NUM_OPS = len(Op)
NO_OP = NUM_OPS  # what an image has drawn when the operation is skipped
MAX_LEVEL = 10.0
_BLEND_BITS = 22  # of a blend factor up to 2: times 255 it still fits int32
_COORDINATE_BITS = 32  # of a source coordinate, in int64
_WEIGHT_BITS = 11  # of a bilinear weight: 255 times two of them fits int32


def randaugment(
    images: Tensor, uniforms: list[tuple[Tensor, ...]], magnitude: float, std: float, fill: Tensor
) -> Tensor:
    """As many operations per image as `uniforms` has entries, each four float64 [B] in [0, 1).

    fill: uint8 [3], the colour shown where geometry reads outside of the image.
    """
    height, width = images.shape[2:]
    sampled = [sample(u, magnitude, std) for u in uniforms]
    drawn = [(op, amounts(op, level, sign, height, width)) for op, level, sign in sampled]
    for i in range(0, len(drawn), 2):
        images = apply_pair(images, drawn[i : i + 2], fill)
    return images


def color_jitter(images: Tensor, uniforms: tuple[Tensor, ...], strength: float) -> Tensor:
    """torchvision's ColorJitter(strength, strength, strength), its order of the three drawn per image, as timm uses it.

    uniforms: four float64 [B] in [0, 1): the order and the factors of saturation, contrast and brightness.
    strength: factors are uniform in [1 - strength, 1 + strength]; 0..1.
    """
    factors = torch.stack([1 + strength * (2 * u - 1) for u in uniforms[1:]])
    order = (uniforms[0] * 6).long()
    first = order // 2
    second = (first + 1 + order % 2) % 3
    for which in (first, second, 3 - first - second):  # 0, 1, 2 stand for COLOR, CONTRAST, BRIGHTNESS
        images = _enhance(images, Op.COLOR.value + which, factors.gather(0, which[None])[0])
    return images


def sample(u: tuple[Tensor, ...], magnitude: float, std: float) -> tuple[Tensor, Tensor, Tensor]:
    """Four uniforms [B] -> operation int64 (NO_OP for half of the images: timm's p), level in 0..10, sign +1 or -1."""
    slot = (u[0] * (2 * NUM_OPS)).long()
    normal = torch.sqrt(-2 * torch.log1p(-u[2])) * torch.cos(2 * math.pi * u[3])  # Box and Muller
    return slot.clamp(max=NO_OP), (magnitude + std * normal).clamp(0, MAX_LEVEL), torch.where(u[1] > 0.5, -1.0, 1.0)


def amounts(op: Tensor, level: Tensor, sign: Tensor, height: int, width: int) -> Tensor:
    """float64 [B]: what `apply_pair` wants to know of each image's operation, from timm's level 0..10 and sign.

    Bits cleared by posterize, threshold of solarize, what solarize adds, factors of the four enhancements, degrees
    anticlockwise, shear, pixels of a translation; 0 where the operation has none.
    """
    amount = sign * level
    # 'no change' is 1; moving away towards 0.1 or 1.9 increases the enhancement (timm's *Increasing)
    factor = (1 + amount * 0.09).clamp(min=0.1)
    by_op = {
        Op.POSTERIZE: 8 - (4 - (level / 10 * 4).long()),  # 4 at level 0, 8 at level 10
        Op.SOLARIZE: 256 - (level / 10 * 256).long(),
        Op.SOLARIZE_ADD: (level / 10 * 110).long(),
        **dict.fromkeys((*ENHANCED, Op.SHARPNESS), factor),
        Op.ROTATE: 3.0 * amount,
        **dict.fromkeys((Op.SHEAR_X, Op.SHEAR_Y), 0.03 * amount),
        Op.TRANSLATE_X: 0.045 * width * amount,
        Op.TRANSLATE_Y: 0.045 * height * amount,
    }
    return select(op, by_op)


def select(op: Tensor, by_op: Mapping[Op, Tensor]) -> Tensor:
    """float64 [B]: of each image the value of its operation, 0 where it has none."""
    chosen = torch.zeros(op.shape, dtype=torch.float64, device=op.device)
    for kind, value in by_op.items():
        chosen = torch.where(op == kind.value, value.double(), chosen)
    return chosen


def apply_pair(images: Tensor, drawn: list[tuple[Tensor, Tensor]], fill: Tensor) -> Tensor:
    """One or two operations per image, in their order: int64 [B] and their `amounts`. See the head of this file."""
    height, width = images.shape[2:]
    images = apply_value(images, *drawn[0])
    moved = functools.reduce(torch.logical_or, [_is_any(op, GEOMETRIC) for op, _ in drawn])
    matrices = [affine(*one, height, width) for one in drawn]
    images = on_rows(moved, lambda x, *m: warp(x, m, fill), images, *matrices)
    return apply_value(images, *drawn[1]) if len(drawn) == 2 else images


# -- operations on values ----------------------------------------------------------------------------------------------


def apply_value(images: Tensor, op: Tensor, amount: Tensor) -> Tensor:
    """The operation of each image if it is one on values; an image with a geometric one, or none, passes unchanged."""
    images = on_rows(_is_any(op, TABLED), _look_up, images, op, amount.long())
    enhanced, sharpened = _is_any(op, ENHANCED), _is_any(op, (Op.SHARPNESS,))
    images = on_rows(enhanced, _enhance, images, op, torch.where(enhanced, amount, 1.0))
    return on_rows(sharpened, _sharpen, images, torch.where(sharpened, amount, 1.0))


def _is_any(op: Tensor, kinds: tuple[Op, ...]) -> Tensor:
    return functools.reduce(torch.logical_or, [op == kind.value for kind in kinds])


def on_rows(needed: Tensor, operation: Callable[..., Tensor], images: Tensor, *parameters: Tensor) -> Tensor:
    """`operation(images, *parameters)`, which leaves images as they are where `needed` (bool [B]) is false.

    Compiled, or on a GPU, all images go through it: a fused pass is cheaper than the wait to learn which need it. Eager
    on the CPU, where the values are at hand, only those do.
    """
    if torch.compiler.is_compiling() or images.device.type != "cpu":
        return operation(images, *parameters)
    rows = needed.nonzero()[:, 0]
    return images.index_copy(0, rows, operation(images[rows], *(p[rows] for p in parameters)))


def _look_up(images: Tensor, op: Tensor, amount: Tensor) -> Tensor:
    return value_tables(images, op, amount).gather(2, images.flatten(2).long()).view(images.shape)


def value_tables(images: Tensor, op: Tensor, amount: Tensor) -> Tensor:
    """uint8 [B, 3, 256]: the pointwise operation of each image as a table; the identity for the others.

    amount: int64 [B].
    """
    B, value = len(images), torch.arange(256, device=images.device)
    amount = amount[:, None, None]
    histogram = torch.zeros(B, 3, 256, dtype=torch.int32, device=images.device)
    pixels = images.flatten(2).long()
    histogram = histogram.scatter_add(
        2, pixels, torch.ones((), dtype=torch.int32, device=images.device).expand_as(pixels)
    )
    histogram = histogram.long()

    present = histogram > 0
    low = torch.where(present, value, 255).amin(2, keepdim=True)
    high = torch.where(present, value, 0).amax(2, keepdim=True)
    stretched = ((value - low) * 255).clamp(min=0) // (high - low).clamp(min=1)
    autocontrast = torch.where(high > low, stretched, value)

    cumulative = histogram.cumsum(2)
    step = (cumulative[:, :, -1:] - histogram.gather(2, high)) // 255
    spread = (step // 2 + cumulative - histogram) // step.clamp(min=1)
    equalized = torch.where(step > 0, spread, value)

    cleared = amount.clamp(0, 8)  # of another operation it may be anything
    posterized = (value >> cleared) << cleared
    solarized = torch.where(value < amount, value, 255 - value)
    added = torch.where(value < 128, value + amount, value)

    tables = {
        Op.AUTO_CONTRAST: autocontrast,
        Op.EQUALIZE: equalized,
        Op.INVERT: 255 - value,
        Op.POSTERIZE: posterized,
        Op.SOLARIZE: solarized,
        Op.SOLARIZE_ADD: added,
    }
    table = value.expand(B, 3, 256)
    for kind, candidate in tables.items():
        table = torch.where((op == kind.value)[:, None, None], candidate, table)
    return table.clamp(0, 255).to(torch.uint8)


def _enhance(images: Tensor, op: Tensor, factor: Tensor) -> Tensor:
    """PIL's ImageEnhance.Color, Contrast or Brightness, by op; factor 1 is the identity whatever the op."""
    x = images.int()
    gray = grayscale(x)
    count = images.shape[2] * images.shape[3]
    mean = ((2 * gray.sum((1, 2)) + count) // (2 * count)).int()
    op = op[:, None, None]
    flat = torch.where(op == Op.CONTRAST.value, mean[:, None, None], 0)
    degenerate = torch.where(op == Op.COLOR.value, gray, flat)
    return _blend(degenerate[:, None], x, factor)


def grayscale(x: Tensor) -> Tensor:
    """PIL's convert("L") of int32 [B, 3, H, W] -> int32 [B, H, W]."""
    red, green, blue = x.unbind(1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _sharpen(images: Tensor, factor: Tensor) -> Tensor:
    """PIL's ImageEnhance.Sharpness."""
    x = images.int()
    return _blend(blur(x), x, factor)


def _blend(degenerate: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """PIL's Image.blend: `degenerate + factor * (x - degenerate)`; int32 -> uint8, cut to integers in 0..255."""
    # A factor rounded to 22 bits may put an integer just below itself: a 2^-15 of a level more puts it back.
    fixed = (factor * (1 << _BLEND_BITS)).round().int()[:, None, None, None]
    blended = (degenerate << _BLEND_BITS) + fixed * (x - degenerate) + (1 << (_BLEND_BITS - 15))
    return (blended >> _BLEND_BITS).clamp(0, 255).to(torch.uint8)


def blur(x: Tensor) -> Tensor:
    """PIL's ImageFilter.SMOOTH of int32 [B, 3, H, W]: 3 x 3 mean, centre of weight 5, edges as they are."""
    if min(x.shape[2:]) < 3:
        return x
    rows = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
    inner = x[:, :, 1:-1, 1:-1]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner
    smooth = (total + 6) // 13
    return x + F.pad(smooth - inner, (1, 1, 1, 1))


# -- geometry ----------------------------------------------------------------------------------------------------------


def affine(op: Tensor, amount: Tensor, height: int, width: int) -> Tensor:
    """float64 [B, 2, 3]: pixel coordinates (x, y, 1) of the result -> of the source, as PIL's AFFINE; else the unit."""
    angle = torch.where(op == Op.ROTATE.value, torch.deg2rad(-amount), 0.0)
    cos, sin = torch.cos(angle), torch.sin(angle)
    shear_x, shear_y, move_x, move_y = (
        torch.where(op == kind.value, amount, 0.0) for kind in (Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y)
    )
    centre_x, centre_y = width / 2, height / 2
    offset_x = centre_x - cos * centre_x - sin * centre_y + move_x
    offset_y = centre_y + sin * centre_x - cos * centre_y + move_y
    return torch.stack((cos, sin + shear_x, offset_x, shear_y - sin, cos, offset_y), 1).view(-1, 2, 3)


def warp(images: Tensor, matrices: Sequence[Tensor], fill: Tensor) -> Tensor:
    """Resample once, bilinear as PIL, through the product of `matrices` (float64 [B, 2, 3], in order of application).

    A pixel shows `fill` when it would be outside of the frame after any of the operations, as when they ran one by one.
    """
    B, _, H, W = images.shape
    products = itertools.accumulate(reversed(matrices), lambda later, earlier: _compose(earlier, later))
    sources = [_source(product, H, W) for product in products]
    frame_x, frame_y = W << _COORDINATE_BITS, H << _COORDINATE_BITS
    within = [(x >= 0) & (x < frame_x) & (y >= 0) & (y < frame_y) for x, y in sources]
    inside = functools.reduce(torch.logical_and, within)
    x, y = sources[-1]
    half, mask = 1 << (_COORDINATE_BITS - 1), (1 << _WEIGHT_BITS) - 1
    x, y = x - half, y - half  # from coordinates to the index of the pixel whose centre is up and left
    right = ((x >> (_COORDINATE_BITS - _WEIGHT_BITS)) & mask).int()[:, None]
    down = ((y >> (_COORDINATE_BITS - _WEIGHT_BITS)) & mask).int()[:, None]
    x0, y0 = x >> _COORDINATE_BITS, y >> _COORDINATE_BITS
    left_column, right_column = x0.clamp(0, W - 1), (x0 + 1).clamp(0, W - 1)
    top_row, bottom_row = y0.clamp(0, H - 1) * W, (y0 + 1).clamp(0, H - 1) * W
    pixels = images.flatten(2)

    def read(row: Tensor, column: Tensor) -> Tensor:
        index = (row + column).view(B, 1, H * W).expand(B, 3, H * W)
        return pixels.gather(2, index).view(images.shape).int()

    one = 1 << _WEIGHT_BITS
    top = read(top_row, left_column) * (one - right) + read(top_row, right_column) * right
    bottom = read(bottom_row, left_column) * (one - right) + read(bottom_row, right_column) * right
    values = (top * (one - down) + bottom * down) >> (2 * _WEIGHT_BITS)
    return torch.where(inside[:, None], values, fill[:, None, None]).to(torch.uint8)


def _compose(first: Tensor, second: Tensor) -> Tensor:
    """[B, 2, 3] x [B, 2, 3]: the source in `first` of the source in `second`."""
    return torch.cat((first[:, :, :2] @ second[:, :, :2], first[:, :, :2] @ second[:, :, 2:] + first[:, :, 2:]), 2)


def _source(matrix: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Source coordinates (x, y) of every pixel centre, int64 [B, H, W] in units of 2^-32 pixel."""
    scaled = matrix * 2.0**_COORDINATE_BITS
    x = torch.arange(width, device=matrix.device) + 0.5
    y = torch.arange(height, device=matrix.device) + 0.5
    columns = (scaled[:, :, :1] * x).round().long()  # [B, 2, W]
    rows = (scaled[:, :, 1:2] * y + scaled[:, :, 2:]).round().long()  # [B, 2, H]
    source = rows[:, :, :, None] + columns[:, :, None, :]
    return source[:, 0], source[:, 1]
