"""Device-side augmentation: a uint8 batch becomes a normalised, erased and mixed float batch.

Each operation processes the full batch, with parameters per sample that are pure functions of (seed, epoch, position):
see DESIGN.md, rules 1 to 3. The order is that of DeiT and timm: shift, flip, RandAugment (or another of policies.py)
and colour jitter on bytes, then normalise, erase, mix.

Shapes: B batch, H height, W width, R = 3 W: one image row with its channels interleaved; D draws of random numbers.
Operations work on `[B, H, R]`, a view of a channels-last image with a long innermost dimension: this is fast on a CPU,
and a compiler fuses it as well as `[B, 3, H, W]`.

Parameters that become pixel indices are computed in float64, so that a CPU and a GPU round to the same boxes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipelines import rng
from pipelines.augment.policies import three_augment, trivial_augment
from pipelines.augment.randaugment import color_jitter, randaugment
from pipelines.augment.spec import AugmentSpec
from pipelines.errors import UserError
from pipelines.read.batch import Batch
from pipelines.rng import Purpose

ERASE_SHARE, ERASE_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)  # of timm's RandomErasing: least and largest
BETA_CELLS = 4096  # of the inverse distribution function; see beta_table
NOISE_POOL = 1 << 20  # normal numbers from which erased boxes are filled


# Four uniform numbers per sample, each float64 [B] in [0, 1), for each (purpose, draw) that a spec needs.
Uniforms = dict[tuple[Purpose, int], tuple[Tensor, ...]]


@dataclass(frozen=True)
class TrainBatch:
    """A batch ready for training; everything but epoch and step is on the device.

    images     float [B, 3, H, W], channels_last, normalised
    labels_a   int64 [B], the sample's own label
    labels_b   int64 [B], its neighbour's label
    lam        float32 [B], weight of labels_a; 1 - lam is the weight of labels_b
    positions  int64 [B], position in the epoch's order
    targets    what the teachers give for these images (std_fast.method.losses.TeacherTargets); None without teachers
    """

    images: Tensor
    labels_a: Tensor
    labels_b: Tensor
    lam: Tensor
    positions: Tensor
    epoch: int
    step: int
    targets: Any = None

    def main_labels(self) -> Tensor:
        """int64 [B]: of a mixed image the label with the larger share."""
        return torch.where(self.lam >= 0.5, self.labels_a, self.labels_b)


class Augment(nn.Module):
    """Shift, flip, recolour, normalise, erase and mix a batch on its device, without a host synchronisation.

    Sample i mixes with row i XOR 1, `x_i = lam_i x_i + (1 - lam_i) x_(i XOR 1)`: its neighbour in the epoch's order,
    which is a random partner. Where this differs from timm (1.0.31; for RandAugment see randaugment.py):
    - lam, the cutmix box and the choice between mixup and cutmix are drawn per sample (timm's default: once per batch;
      its mode "elem" is ours);
    - the partner is the neighbour, not the sample at the mirrored place of the batch, so that it does not depend on
      batch size or number of GPUs;
    - an erasing box that does not fit is clipped to one pixel less than the image; timm draws again (0.5 % of boxes at
      the default scale);
    - erased pixels are read from a fixed pool of 2^20 normal numbers at an offset per sample, so noise is a pure
      function of the sample; two boxes share numbers only where their stretches of the pool overlap.

    Hazards: call `.to(device)` first; `compile` compiles the tensor part only, and epoch enters it as a tensor, so
    neither a new epoch nor a new step compiles again (a new batch shape does).

    Args: spec, the run's seed.
    """

    counter_D1: Tensor
    scale_C: Tensor
    bias_C: Tensor
    fill_C: Tensor
    noise: Tensor
    mixup_table: Tensor
    cutmix_table: Tensor

    def __init__(self, spec: AugmentSpec, seed: int) -> None:
        super().__init__()
        self.spec, self.seed = spec, seed
        self._transform: Callable[..., tuple[Tensor, Tensor, Tensor]] = self._transform_batch
        self.draws = _draws(spec)
        mean, std = np.asarray(spec.mean), np.asarray(spec.std)
        self._constant(
            "counter_D1", np.asarray([int(purpose) | draw << 16 for purpose, draw in self.draws], np.int64)[:, None]
        )
        self._constant("scale_C", (1 / (255 * std)).astype(np.float32))
        self._constant("bias_C", (-mean / std).astype(np.float32))
        self._constant("fill_C", np.asarray([round(255 * m) for m in spec.mean], np.uint8))  # timm's img_mean
        if spec.erase > 0:
            self._constant("noise", noise_pool(seed, NOISE_POOL))
        if spec.mixes and spec.mixup > 0:
            self._constant("mixup_table", beta_table(spec.mixup))
        if spec.mixes and spec.cutmix > 0:
            self._constant("cutmix_table", beta_table(spec.cutmix))

    def _constant(self, name: str, value: np.ndarray) -> None:
        self.register_buffer(name, torch.from_numpy(value), persistent=False)  # a function of spec and seed: not saved

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the tensor part with torch.compile's arguments (fullgraph unless told otherwise)."""
        self._transform = torch.compile(self._transform_batch, *args, **{"fullgraph": True, **kwargs})

    def forward(self, batch: Batch) -> TrainBatch:
        """Augment uint8 [B, 3, H, W] for training. Raises UserError when the shape cannot be shifted or mixed."""
        images = batch.images
        rows, height, width = len(images), images.shape[2], images.shape[3]
        if self.spec.mixes and rows % 2:
            raise UserError(f"augment.mixup and augment.cutmix need an even batch on each device, not {rows}")
        if self.spec.shift >= min(height, width):
            raise UserError(f"augment.shift must be smaller than the image ({height}x{width}), not {self.spec.shift}")
        # A fill kernel, not a copy from the host: nothing waits, and the compiled graph does not see a new constant.
        epoch = torch.full((), batch.epoch, dtype=torch.int64, device=images.device)
        mixed, labels_b, lam = self._transform(images, batch.labels, batch.positions, epoch)
        return TrainBatch(mixed, batch.labels, labels_b, lam, batch.positions, batch.epoch, batch.step)

    def normalise_only(self, images: Tensor) -> Tensor:
        """For evaluation: uint8 [B, 3, H, W] -> `(x / 255 - mean) / std` in float32, channels_last."""
        return _from_rows(self._normalise(_to_rows(images)))

    def _transform_batch(
        self, images: Tensor, labels: Tensor, positions: Tensor, epoch: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> images [B, 3, H, W], labels_b [B], lam float32 [B]."""
        u = self._uniforms(positions, epoch)
        x_BHR = self._normalise(self._recolour(self._move(_to_rows(images), u), u))
        if self.spec.erase > 0:
            x_BHR = self._erase(x_BHR, u)
        lam = torch.ones(len(labels), dtype=torch.float32, device=labels.device)
        labels_b = labels
        if self.spec.mixes:
            x_BHR, lam = self._mix(x_BHR, u)
            labels_b = _neighbour(labels)
        return _from_rows(x_BHR), labels_b, lam

    def _uniforms(self, positions: Tensor, epoch: Tensor) -> Uniforms:
        """All the random numbers of a batch: what `rng.uniform` gives for every draw, in one pass over [D, B] counters.

        One pass is ten rounds of a few operations, whatever D is: D times fewer kernels when eager, and D times less to
        compile.
        """
        words = rng.words(self.seed, epoch, positions, self.counter_D1)
        columns = [((word >> 8).double() * 2.0**-24).unbind(0) for word in words]
        return {draw: tuple(column[d] for column in columns) for d, draw in enumerate(self.draws)}

    def _normalise(self, x_BHR: Tensor) -> Tensor:
        width = x_BHR.shape[2] // 3
        return x_BHR.float().mul_(self.scale_C.repeat(width)).add_(self.bias_C.repeat(width))

    def _move(self, x_BHR: Tensor, u: Uniforms) -> Tensor:
        """Shift with reflect padding, then flip: both only choose which byte is read."""
        spec, (B, H, R) = self.spec, x_BHR.shape
        x_W = torch.arange(R // 3, device=x_BHR.device)
        column_BW = x_W.expand(B, -1)
        if spec.flip > 0:
            flipped = u[Purpose.FLIP, 0][0] < spec.flip
            column_BW = torch.where(flipped[:, None], R // 3 - 1 - x_W, x_W)
        if spec.shift > 0:
            dy, dx, *_ = u[Purpose.SHIFT, 0]
            span = 2 * spec.shift + 1
            row_BH = torch.arange(H, device=x_BHR.device) + ((dy * span).long() - spec.shift)[:, None]
            row_BH = _reflect(row_BH, H)
            x_BHR = x_BHR.gather(1, row_BH[:, :, None].expand(B, H, R))
            column_BW = _reflect(column_BW + ((dx * span).long() - spec.shift)[:, None], R // 3)
        if spec.flip > 0 or spec.shift > 0:
            index_BR = (column_BW[:, :, None] * 3 + torch.arange(3, device=x_BHR.device)).view(B, R)
            x_BHR = x_BHR.gather(2, index_BR[:, None, :].expand(B, H, R))
        return x_BHR

    def _recolour(self, x_BHR: Tensor, u: Uniforms) -> Tensor:
        """The spec's policy and colour jitter, on [B, 3, H, W] in planes: bytes to bytes."""
        spec = self.spec
        if spec.policy == "randaugment" and spec.randaugment_n == 0 and spec.color_jitter == 0:
            return x_BHR
        images = _from_rows(x_BHR).contiguous()
        if spec.randaugment_n > 0:
            draws = [u[Purpose.RANDAUGMENT, i] for i in range(spec.randaugment_n)]
            images = randaugment(images, draws, spec.randaugment_m, spec.randaugment_mstd, self.fill_C)
        elif spec.policy == "trivial_augment":
            images = trivial_augment(images, u[Purpose.TRIVIAL_AUGMENT, 0])
        elif spec.policy == "three_augment":
            images = three_augment(images, u[Purpose.THREE_AUGMENT, 0])
        if spec.color_jitter > 0:
            images = color_jitter(images, u[Purpose.JITTER, 0], spec.color_jitter)
        return _to_rows(images)

    def _erase(self, x_BHR: Tensor, u: Uniforms) -> Tensor:
        B, H, R = x_BHR.shape
        gate, share, aspect, offset = u[Purpose.ERASE, 0]
        y, x, *_ = u[Purpose.ERASE, 1]
        boxes = erase_boxes(share, aspect, y, x, H, R // 3)
        noise = self.noise
        if H * R >= len(noise):  # an image larger than the pool: the pool repeats
            noise = noise.repeat(H * R // len(noise) + 2)
        # A window per sample through an overlapping view: one contiguous read each, and no index per pixel.
        windows = noise.unfold(0, H * R, 1)
        noise_BHR = windows.index_select(0, (offset * len(windows)).long()).view(B, H, R)
        erased = _inside(boxes, H, R) & (gate < self.spec.erase)[:, None, None]
        return torch.where(erased, noise_BHR, x_BHR)

    def _mix(self, x_BHR: Tensor, u: Uniforms) -> tuple[Tensor, Tensor]:
        spec, (_, H, R) = self.spec, x_BHR.shape
        gate, choice, beta, _ = u[Purpose.MIX, 0]
        mixed = gate < spec.mix_prob
        if spec.cutmix == 0:
            lam = torch.where(mixed, inverse_cdf(self.mixup_table, beta), 1.0).float()
            weight_BHR = lam[:, None, None]
        else:
            y, x, *_ = u[Purpose.MIX, 1]
            boxes = cutmix_boxes(inverse_cdf(self.cutmix_table, beta), y, x, H, R // 3)
            top, left, bottom, right = boxes
            share = 1 - ((bottom - top) * (right - left)).double() / (H * (R // 3))
            cut = choice < spec.switch if spec.mixup > 0 else torch.ones_like(mixed)
            blend = inverse_cdf(self.mixup_table, beta) if spec.mixup > 0 else share
            lam = torch.where(mixed, torch.where(cut, share, blend), 1.0).float()
            # One weight per pixel serves both: 0 or 1 for cutmix, lam for mixup, 1 where nothing is mixed.
            weight = torch.where(cut & mixed, 1.0, lam)[:, None, None]
            weight_BHR = torch.where(_inside(boxes, H, R) & (cut & mixed)[:, None, None], 0.0, weight)
        return torch.lerp(_neighbour(x_BHR), x_BHR, weight_BHR), lam


def _draws(spec: AugmentSpec) -> tuple[tuple[Purpose, int], ...]:
    """The random numbers that a spec needs."""
    wanted = {
        (Purpose.FLIP, 0): spec.flip > 0,
        (Purpose.SHIFT, 0): spec.shift > 0,
        **{(Purpose.RANDAUGMENT, i): True for i in range(spec.randaugment_n)},
        (Purpose.TRIVIAL_AUGMENT, 0): spec.policy == "trivial_augment",
        (Purpose.THREE_AUGMENT, 0): spec.policy == "three_augment",
        (Purpose.JITTER, 0): spec.color_jitter > 0,
        (Purpose.ERASE, 0): spec.erase > 0,
        (Purpose.ERASE, 1): spec.erase > 0,
        (Purpose.MIX, 0): spec.mixes,
        (Purpose.MIX, 1): spec.mixes and spec.cutmix > 0,
    }
    return tuple(draw for draw, needed in wanted.items() if needed)


def erase_boxes(
    share: Tensor, aspect: Tensor, y: Tensor, x: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Erasing boxes (top, left, bottom, right), int64 [B], from uniforms float64 [B], as timm's RandomErasing does.

    Share of the image's area uniform in ERASE_SHARE, aspect log-uniform in ERASE_ASPECT; a side that does not fit is
    clipped to one pixel less.
    """
    area = (ERASE_SHARE[0] + share * (ERASE_SHARE[1] - ERASE_SHARE[0])) * (height * width)
    low, high = math.log(ERASE_ASPECT[0]), math.log(ERASE_ASPECT[1])
    ratio = torch.exp(low + aspect * (high - low))
    h = torch.sqrt(area * ratio).round().long().clamp(max=height - 1)
    w = torch.sqrt(area / ratio).round().long().clamp(max=width - 1)
    top, left = (y * (height - h + 1)).long(), (x * (width - w + 1)).long()
    return top, left, top + h, left + w


def cutmix_boxes(lam: Tensor, y: Tensor, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cutmix boxes (top, left, bottom, right), int64 [B], clipped to the image, as timm's `rand_bbox` draws them."""
    ratio = torch.sqrt(1 - lam)
    h, w = (height * ratio).long(), (width * ratio).long()
    cy, cx = (y * height).long(), (x * width).long()
    return (
        (cy - h // 2).clamp(min=0),
        (cx - w // 2).clamp(min=0),
        (cy + (h + 1) // 2).clamp(max=height),
        (cx + (w + 1) // 2).clamp(max=width),
    )


def beta_table(alpha: float) -> np.ndarray:
    """Inverse distribution function of Beta(alpha, alpha) at BETA_CELLS + 1 even steps of probability, float64."""
    from scipy.special import betaincinv

    return betaincinv(alpha, alpha, np.linspace(0, 1, BETA_CELLS + 1))


def inverse_cdf(table: Tensor, u: Tensor) -> Tensor:
    """Linear interpolation of an inverse distribution function (float64, even steps over [0, 1]) at u in [0, 1)."""
    place = u * (len(table) - 1)
    cell = place.long()
    low = table[cell]
    return low + (table[cell + 1] - low) * (place - cell)


def noise_pool(seed: int, count: int) -> np.ndarray:
    """`count` standard normal numbers, float32: Box and Muller's transform of the counter-based uniforms."""
    u = rng.uniform(seed, 0, np.arange(-(-count // 4)), Purpose.ERASE_NOISE).astype(np.float64)
    radius = np.sqrt(-2 * np.log1p(-u[:, :2]))
    angle = 2 * np.pi * u[:, 2:]
    return (
        np.concatenate((radius * np.cos(angle), radius * np.sin(angle)), axis=1).reshape(-1)[:count].astype(np.float32)
    )


def _to_rows(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, H, R]; a view when the images are channels_last."""
    B, _, H, W = images.shape
    return images.permute(0, 2, 3, 1).reshape(B, H, W * 3)


def _from_rows(x_BHR: Tensor) -> Tensor:
    """[B, H, R] -> [B, 3, H, W], channels_last."""
    B, H, R = x_BHR.shape
    return x_BHR.view(B, H, R // 3, 3).permute(0, 3, 1, 2)


def _neighbour(x: Tensor) -> Tensor:
    """Row i XOR 1 of every row i."""
    pairs = x.view(-1, 2, *x.shape[1:])
    return torch.stack((pairs[:, 1], pairs[:, 0]), 1).view(x.shape)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Index beyond an edge by less than `size` -> its mirror image, the edge pixel not repeated."""
    return size - 1 - (size - 1 - index.abs()).abs()


def _inside(boxes: tuple[Tensor, Tensor, Tensor, Tensor], height: int, row: int) -> Tensor:
    """Boxes (top, left, bottom, right) in pixels -> bool [B, H, R]."""
    top, left, bottom, right = (edge[:, None] for edge in boxes)
    y_H, x_R = torch.arange(height, device=top.device), torch.arange(row, device=top.device)
    y_BH = (y_H >= top) & (y_H < bottom)
    x_BR = (x_R >= left * 3) & (x_R < right * 3)
    return y_BH[:, :, None] & x_BR[:, None, :]
