"""A small dataset decoded once and kept on the device: batches are cut from memory by two matrix products.

For datasets whose images are far cheaper to keep than to decode (CIFAR, digits, ImageNet at 64 pixels). All images lie
in one tensor, padded to the largest; a crop's resize to the output is separable, so it is W_rows @ image @ W_columns^T
with a weight matrix per sample, built on the device. The filter is the other backends' (antialiased bilinear or
bicubic); results differ from theirs by 1 of 255 in some pixels, because they round to 8 bits between the two passes.

Shapes: N samples, B batch (of this shard), S image size, H, W largest stored height and width.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipelines.errors import CorruptImage, UserError
from pipelines.loaders.prefetch import available_cores
from pipelines.read.batch import Batch, LoaderSpec
from pipelines.read.corrupt import CorruptTracker
from pipelines.read.decode import decode_rgb
from pipelines.read.order import indices_at
from pipelines.read.source import Integers, Source

_CHUNK = 256
_CUBIC = {"auto": False, "bilinear": False, "bicubic": True}


def decoded_bytes(source: Source) -> int:
    """Memory of the whole dataset as this backend keeps it. Looks at every image of a folder."""
    heights, widths = source.sizes(np.arange(source.num_samples))
    return 3 * source.num_samples * int(heights.max()) * int(widths.max())


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device (of the host's memory for a CPU; a large number where that cannot be known)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            known = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
        return known["MemAvailable"]
    except (OSError, KeyError):
        return 1 << 62


class ResidentLoader:
    """A `batch.Loader` from memory. Raises UserError when the dataset would fill more than half of what is free on the
    device, or for a resample that it lacks (area); DataError for an image that cannot be decoded.

    Reading takes place on construction. Batches are made when they are asked for: on a GPU in the consumer's stream,
    without waiting for the device.
    """

    def __init__(self, spec: LoaderSpec, source: Source) -> None:
        if spec.resample not in _CUBIC:
            raise UserError(
                f"resample: {spec.resample!r} is not in the resident backend; choose one of {', '.join(_CUBIC)}"
            )
        self.spec = spec
        self.source = source
        self.plan = spec.plan(source.num_samples)
        self.num_classes = source.num_classes
        self.steps_per_epoch = self.plan.steps_per_epoch
        self.wait_seconds = 0.0
        self.device = torch.device(spec.device)
        self.intact = CorruptTracker(spec, source)
        self.corrupt = self.intact.found
        self._shown = np.arange(source.num_samples)  # instead of each sample; -1: none
        self._heights, self._widths = self._sizes()
        needed = 3 * source.num_samples * int(self._heights.max()) * int(self._widths.max())
        free = free_memory(self.device)
        if needed > free // 2:
            raise UserError(
                f"backend: resident would keep {needed / 2**30:.1f} GiB of pixels on {self.device}, where "
                f"{free / 2**30:.1f} GiB are free; choose ffcv or torch"
            )
        self._images: torch.Tensor | None = torch.from_numpy(self._read()).to(self.device)
        self._labels = torch.from_numpy(source.labels).to(self.device)

    def _sizes(self) -> tuple[Integers, Integers]:
        """Of all samples; 1 for a corrupt one."""
        everything = np.arange(self.source.num_samples)
        try:
            return self.source.sizes(everything)
        except CorruptImage:
            heights, widths = np.ones_like(everything), np.ones_like(everything)
            for index in everything:
                try:
                    heights[index : index + 1], widths[index : index + 1] = self.source.sizes(everything[[index]])
                except CorruptImage as error:
                    self._shown[index] = self.intact.substitute(int(index), error)
            return heights, widths

    def _read(self) -> npt.NDArray[np.uint8]:
        """All images, uint8 [N, H, W, 3], zero outside."""
        source = self.source
        heights, widths = self._heights, self._widths
        images = np.zeros((source.num_samples, int(heights.max()), int(widths.max()), 3), np.uint8)

        def decode(start: int) -> None:
            for index in range(start, min(start + _CHUNK, source.num_samples)):
                if self._shown[index] != index:
                    continue
                try:
                    images[index, : heights[index], : widths[index]] = decode_rgb(source, index)
                except CorruptImage as error:
                    self._shown[index] = self.intact.substitute(index, error)

        with ThreadPoolExecutor(self.spec.threads or available_cores()) as pool:
            parts = [pool.submit(decode, start) for start in range(0, source.num_samples, _CHUNK)]
            try:
                for part in parts:
                    part.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return images

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """See `batch.Loader`. Raises UserError when `start_step` lies outside the epoch or the loader is closed."""
        if self._images is None:
            raise UserError("this loader is closed: open another one")
        if not 0 <= start_step <= self.steps_per_epoch:
            raise UserError(f"start_step {start_step} must lie in 0..{self.steps_per_epoch}")
        return self._run(self._images, epoch, start_step)

    def _run(self, images: torch.Tensor, epoch: int, start_step: int) -> Iterator[Batch]:
        order = self.plan.order(epoch)
        for step in range(start_step, self.steps_per_epoch):
            started = time.perf_counter()
            batch = self._batch(images, order, epoch, step)
            self.wait_seconds += time.perf_counter() - started
            yield batch

    def _batch(self, images: torch.Tensor, order: npt.NDArray[np.int64], epoch: int, step: int) -> Batch:
        positions = self.plan.positions(step)
        indices = indices_at(order, positions)
        indices = np.where(indices < 0, -1, self._shown[indices])
        positions = np.where(indices < 0, -1, positions)
        chosen = np.maximum(indices, 0)
        heights, widths = self._heights[chosen], self._widths[chosen]
        boxes = self.spec.crop.boxes(heights, widths, self.spec.seed, epoch, np.maximum(positions, 0))
        keys = self._to_device(np.column_stack([indices, positions, boxes]).astype(np.int64))
        there = keys[:, 0] >= 0
        samples = images[keys[:, 0].clamp(min=0)]
        size = self.spec.image_size
        if images.shape[1:3] != (size, size) or (boxes != (0, 0, size, size)).any():
            samples = cut(samples, keys[:, 2:], size, _CUBIC[self.spec.resample])
        if (indices < 0).any():
            samples = samples * there[:, None, None, None]
        labels = torch.where(there, self._labels[keys[:, 0].clamp(min=0)], -1)
        return Batch(samples.permute(0, 3, 1, 2), labels, keys[:, 1], indices, epoch, step)

    def _to_device(self, values: npt.NDArray[np.int64]) -> torch.Tensor:
        host = torch.from_numpy(values)
        return host if self.device.type == "cpu" else host.pin_memory().to(self.device, non_blocking=True)

    def close(self) -> None:
        self._images = None

    def __enter__(self) -> ResidentLoader:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()


def cut(images: torch.Tensor, boxes: torch.Tensor, size: int, cubic: bool) -> torch.Tensor:
    """Crops and resizes: uint8 [B, H, W, 3], boxes int64 [B, 4] (top, left, height, width) -> uint8 [B, S, S, 3]."""
    rows = filter_weights(boxes[:, 0], boxes[:, 2], images.shape[1], size, cubic)
    columns = filter_weights(boxes[:, 1], boxes[:, 3], images.shape[2], size, cubic)
    planes = images.permute(0, 3, 1, 2).float()
    resized = rows[:, None] @ (planes @ columns[:, None].mT)
    return (resized + 0.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def filter_weights(start: torch.Tensor, length: torch.Tensor, limit: int, size: int, cubic: bool) -> torch.Tensor:
    """Weights of `limit` stored values for `size` outputs that cover start..start+length: float32 [B, S, limit].

    A triangle, or Keys' cubic with a = -0.5, stretched to the scale when reducing (antialiasing), as in PIL
    (Resample.c) and torch (`interpolate`, antialias=True). Nothing outside the range has weight. start, length:
    int64 [B].
    """
    scale = (length / size)[:, None, None]
    at = torch.arange(limit, device=start.device)
    centre = start[:, None, None] + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    x = ((at + 0.5 - centre) / scale.clamp(min=1)).abs()
    if cubic:
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    else:
        weights = (1 - x).clamp(min=0)
    inside = (at >= start[:, None, None]) & (at < (start + length)[:, None, None])
    weights = weights * inside
    return weights / weights.sum(dim=2, keepdim=True)
