"""Loading on any machine: threads decode by libturbojpeg or torchvision, and torch crops and resizes.

On a GPU whose nvJPEG works, threads only read; one call of torchvision decodes a batch's JPEGs on the device, where
they are cropped and resized. Images that nvJPEG does not support (`decode.is_plain_jpeg`) or refuses are decoded on the
host, one by one.

Measured on imagenet-sample against PIL's crop and resize, the alternative without FFCV: 1.5 times faster. Resizing is
`interpolate(antialias=True)`, whose uint8 kernel is PIL's algorithm.

Shapes: B batch, S image size.
"""

from __future__ import annotations

import functools
import logging
import threading

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import interpolate

from pipelines.loaders.prefetch import PendingBatch, ThreadedLoader
from pipelines.read.base import Source
from pipelines.read.batch import LoaderSpec
from pipelines.read.crops import Boxes
from pipelines.read.decode import Pixels, decode_rgb, is_plain_jpeg

log = logging.getLogger("std_fast")


def crop_and_resize(pixels: Pixels, box: npt.NDArray[np.int32], side: int, mode: str) -> Pixels:
    """The box of an image, uint8 [H, W, 3], as uint8 [S, S, 3]. mode: bilinear or bicubic."""
    top, left, height, width = box.tolist()
    crop = torch.from_numpy(pixels[top : top + height, left : left + width].copy())
    crop = crop[None].permute(0, 3, 1, 2)  # channels_last, which halves the time
    return interpolate(crop, (side, side), mode=mode, antialias=True)[0].permute(1, 2, 0).numpy()


def decode_together(encoded: list[torch.Tensor], device: torch.device) -> list[torch.Tensor | None]:
    """JPEGs, uint8 [number of bytes] each on the host, as uint8 [3, H, W] on the device; None where it refuses one."""
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        return decode_jpeg(encoded, ImageReadMode.RGB, device)
    except RuntimeError:  # the error does not name the image: find it by halving
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # it may still be writing to memory that is free now
        if len(encoded) == 1:
            return [None]
    half = len(encoded) // 2
    return decode_together(encoded[:half], device) + decode_together(encoded[half:], device)


def fill_rows(images: torch.Tensor, encoded: dict[int, torch.Tensor], boxes: Boxes, mode: str) -> list[int]:
    """Decodes, crops and resizes the JPEGs of some rows of images [B, S, S, 3], all on its device.

    Returns the rows that the device refuses. The pixels differ from `crop_and_resize` by the device's DCT, and by
    at most 1 of 255 because the host's filter rounds after each of the filter's two passes.
    """
    refused, rows, cuts = [], [], []
    size = images.shape[1:3]
    for row, pixels in zip(encoded, decode_together(list(encoded.values()), images.device), strict=True):
        if pixels is None:
            refused.append(row)
            continue
        top, left, height, width = boxes[row].tolist()
        crop = pixels[None, :, top : top + height, left : left + width].float()  # no antialiasing of uint8 on a GPU
        try:
            cuts.append(interpolate(crop, size, mode=mode, antialias=True))
        except RuntimeError:  # CUDA's filter lacks the memory to reduce about a hundredfold
            refused.append(row)
            continue
        rows.append(row)
    if rows:
        values = (torch.cat(cuts) + 0.5).clamp(0, 255).to(torch.uint8)
        images[torch.tensor(rows, device=images.device)] = values.permute(0, 2, 3, 1)
    return refused


class TorchLoader(ThreadedLoader):
    """A `batch.Loader` that needs torch and torchvision only.

    together: a batch's JPEGs are decoded by one call on the device; None: on a GPU whose nvJPEG works.
    """

    backend = "torch"

    def __init__(self, spec: LoaderSpec, source: Source, together: bool | None = None) -> None:
        super().__init__(spec, source)
        if together is None:
            together = self._stream is not None and _nvjpeg_works(self._stream.device)
        self.together = together
        self._decoding = threading.Lock()
        self._refused: set[int] = set()

    def _decode(self, pending: PendingBatch, start: int, stop: int) -> None:
        sound = self.tracker.sound
        for row in range(start, stop):
            index = int(pending.slots.indices[row])
            if self.together and index >= 0 and index not in self._refused and self.source.is_jpeg(index):
                data = self.source.read(index)
                if is_plain_jpeg(self.source, index, data.tobytes(), bool(sound[index])):
                    sound[index] = True
                    pending.encoded[row] = torch.from_numpy(np.array(data))  # a copy: the source's bytes are read-only
                    continue
            pixels = self.tracker.decode(pending.slots, row)
            pending.images[row] = 0 if pixels is None else self._cut(pixels, pending, row)

    def _cut(self, pixels: Pixels, pending: PendingBatch, row: int) -> Pixels:
        return crop_and_resize(pixels, pending.slots.boxes[row], self.spec.image_size, self.resample)

    def _decode_together(self, pending: PendingBatch, images: torch.Tensor) -> None:
        for row in fill_rows(images, pending.encoded, pending.slots.boxes, self.resample):
            index = int(pending.slots.indices[row])
            pixels = decode_rgb(self.source, index)  # raises DataError for a damaged one
            images[row].copy_(torch.from_numpy(self._cut(pixels, pending, row)))
            log.warning("%s: refused by the decoder on %s; the host decodes it", self.source.name(index), self.device)
            self._refused.add(index)
        pending.encoded.clear()

    def _finish(self, pending: PendingBatch) -> None:
        if not self.together:
            return super()._finish(pending)
        # torchvision decodes in a stream of its own that does not wait for ours, into memory that ours may have freed
        # but may still be reading: our stream must be idle whenever the decoder is called.
        with self._decoding:
            try:
                super()._finish(pending)
            finally:
                if self._stream is not None:
                    self._stream.synchronize()


@functools.cache
def _nvjpeg_works(device: torch.device) -> bool:
    """Whether torchvision decodes a JPEG on the GPU."""
    from torchvision.io import encode_jpeg

    with torch.cuda.stream(torch.cuda.Stream(device)):
        tiny = encode_jpeg(torch.zeros(3, 16, 16, dtype=torch.uint8))
        works = decode_together([tiny], device)[0] is not None
    if not works:
        log.info("torch backend: torchvision has no nvJPEG on %s; the host decodes", device)
    return works
