"""A small dataset decoded once and kept on the device: batches are cut from memory by two matrix products.

For datasets whose images are far cheaper to keep than to decode (CIFAR, digits, ImageNet at 64 pixels). All images lie
in one tensor, padded to the largest; a crop's resize to the output is separable, so it is W_rows @ image @ W_columns^T
with two filter matrices per sample. The filter is the other backends' (antialiased bilinear or bicubic); results differ
from theirs by 1 of 255 in some pixels, because they round to 8 bits between the two passes.

Shapes: N samples, B batch (of this shard), S image size, H, W largest stored height and width.
"""

from __future__ import annotations

import re
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from pipelines.errors import CorruptImage, UserError
from pipelines.loaders.base import LoaderBase, assemble
from pipelines.read.base import Integers, Source
from pipelines.read.batch import Batch, BatchSlots, LoaderSpec
from pipelines.read.decode import decode_rgb

_CHUNK = 256  # images that a thread decodes at a time
TABLE_BYTES = 64 << 20  # largest table of filter weights


def padded_bytes(heights: Integers, widths: Integers) -> int:
    """Memory of images of these sizes, int64 [N] each, as this backend keeps them: padded to the largest."""
    return 3 * len(heights) * int(heights.max()) * int(widths.max())


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device (for a CPU in the host's memory; a large number where that is unknown)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            known = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
    except (OSError, ValueError):
        return 1 << 62
    return min(known.get("MemAvailable", 1 << 62), _left_in_container())


def _left_in_container() -> int:
    """Bytes up to the memory limit of the control group, version 2; a large number where there is none."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = int((group / "memory.max").read_text()), int((group / "memory.current").read_text())
        cached = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.M)
    except (OSError, ValueError):  # `max`: no limit
        return 1 << 62
    return limit - used + (int(cached[1]) if cached else 0)


class ResidentLoader(LoaderBase):
    """A `batch.Loader` from memory. Raises UserError when the dataset would fill more than half of what is free on the
    device; DataError for an image that cannot be decoded.

    The constructor reads and decodes the dataset. Batches are made when the consumer asks for them: on a GPU in the
    consumer's stream, without waiting for the device.
    """

    backend = "resident"

    def __init__(self, spec: LoaderSpec, source: Source) -> None:
        super().__init__(spec, source)
        self._heights, self._widths = self._sizes()
        needed = padded_bytes(self._heights, self._widths)
        free = free_memory(self.device)
        if needed > free // 2:
            raise UserError(
                f"data.backend: resident would keep {needed / 2**30:.1f} GiB of pixels on {self.device}, where "
                f"{free / 2**30:.1f} GiB are free; choose ffcv or torch"
            )
        self._images: torch.Tensor | None = torch.from_numpy(self._read()).to(self.device)
        height, width = self._images.shape[1:3]
        cubic = self.resample == "bicubic"
        self._rows = AxisFilter(height, spec.image_size, cubic, self.device)
        self._columns = self._rows if width == height else AxisFilter(width, spec.image_size, cubic, self.device)

    def _sizes(self) -> tuple[Integers, Integers]:
        """Heights and widths of all samples, int64 [N] each; 1 for a corrupt one."""
        everything = np.arange(self.source.num_samples)
        try:
            return self.source.sizes(everything)
        except CorruptImage:
            heights, widths = np.ones_like(everything), np.ones_like(everything)
            for index in everything:
                try:
                    heights[index : index + 1], widths[index : index + 1] = self.source.sizes(everything[[index]])
                except CorruptImage as error:
                    self.tracker.substitute(int(index), error)
            return heights, widths

    def _read(self) -> npt.NDArray[np.uint8]:
        """All images, uint8 [N, H, W, 3], zero outside."""
        source = self.source
        heights, widths = self._heights, self._widths
        images = np.zeros((source.num_samples, int(heights.max()), int(widths.max()), 3), np.uint8)

        def decode(start: int) -> None:
            for index in range(start, min(start + _CHUNK, source.num_samples)):
                if index in self.corrupt:
                    continue
                try:
                    images[index, : heights[index], : widths[index]] = decode_rgb(source, index)
                except CorruptImage as error:
                    self.tracker.substitute(index, error)

        with ThreadPoolExecutor(self.threads) as pool:
            parts = [pool.submit(decode, start) for start in range(0, source.num_samples, _CHUNK)]
            try:
                for part in parts:
                    part.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return images

    def _run(self, epoch: int, start_step: int) -> Generator[Batch]:
        order = self.sampler.order(epoch)
        for step in range(start_step, self.steps_per_epoch):
            self._check_open()
            started = time.perf_counter()
            batch = self._batch(self._slots(order, epoch, step))
            self.wait_seconds += time.perf_counter() - started
            yield batch

    def _batch(self, slots: BatchSlots) -> Batch:
        """One step. On a GPU: one copy from the host and 11 kernels."""
        assert self._images is not None
        size = self.spec.image_size
        chosen = np.maximum(slots.indices, 0)
        boxes = self.spec.crop.boxes(
            self._heights[chosen], self._widths[chosen], self.spec.seed, slots.epoch, np.maximum(slots.positions, 0)
        ).astype(np.int64)
        top, left, box_height, box_width = boxes.T
        row_keys, column_keys = self._rows.keys(top, box_height), self._columns.keys(left, box_width)
        keys = self._copy_to_device(
            np.concatenate([slots.keys(self.source.labels), chosen[None], row_keys, column_keys])
        )
        samples = self._images.index_select(0, keys[2])
        if self._images.shape[1:3] != (size, size) or (boxes != (0, 0, size, size)).any():
            middle = 3 + len(row_keys)
            samples = resize(samples, self._rows.weights(keys[3:middle]), self._columns.weights(keys[middle:]))
        if (slots.indices < 0).any():
            samples = samples * (keys[0] >= 0)[:, None, None, None]
        return assemble(samples, keys[:2], slots)

    def close(self) -> None:
        super().close()
        self._images = None


class AxisFilter:
    """Filter matrices [S, limit] of one image axis, which has `limit` pixels, for any interval of it: looked up in a
    table of all limit (limit + 1) / 2 intervals (2 MiB for CIFAR at its own size, 33 MiB for images of 64 pixels), or
    computed where the table would take more than TABLE_BYTES.
    """

    def __init__(self, limit: int, size: int, cubic: bool, device: torch.device) -> None:
        self.limit, self.size, self.cubic = limit, size, cubic
        self.table: torch.Tensor | None = None
        lengths = np.arange(1, limit + 1)
        counts = limit + 1 - lengths  # of intervals of each length
        if 4 * size * limit * int(counts.sum()) <= TABLE_BYTES:
            self._first = np.concatenate([[0], np.cumsum(counts)])  # row in the table of each length's interval at 0
            starts = np.concatenate([np.arange(count) for count in counts])
            start, length = torch.from_numpy(np.stack([starts, lengths.repeat(counts)])).to(device)
            self.table = filter_weights(start, length, limit, size, cubic)

    def keys(self, start: Integers, length: Integers) -> Integers:
        """The intervals, int64 [B] each, in the form that `weights` takes: int64 [1, B] or [2, B]."""
        return np.stack([start, length]) if self.table is None else (self._first[length - 1] + start)[None]

    def weights(self, keys: torch.Tensor) -> torch.Tensor:
        """The matrices of some intervals, float32 [B, S, limit]."""
        if self.table is None:
            return filter_weights(keys[0], keys[1], self.limit, self.size, self.cubic)
        return self.table.index_select(0, keys[0])


def resize(images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3], filter matrices [B, S, H] and [B, S, W] -> uint8 [B, S, S, 3]."""
    B, S = len(images), rows.shape[1]
    planes = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    resized = (rows[:, None] @ (planes @ columns[:, None].mT)).add_(0.5).clamp_(0, 255)  # [B, 3, S, S]
    out = torch.empty((B, S, S, 3), dtype=torch.uint8, device=images.device)
    return out.copy_(resized.permute(0, 2, 3, 1))


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
