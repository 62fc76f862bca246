"""Loading on any machine: decoding by libturbojpeg or torchvision, cutting and resizing by torch, in threads.

On a GPU whose nvJPEG works, threads only read, and a batch's JPEGs are decoded by one call of torchvision's, cut and
resized there. What nvJPEG is not for (`decode.is_plain_jpeg`) or refuses is decoded on the host, sample by sample.

Measured on imagenet-sample against PIL's crop and resize, the other way without FFCV: 1.5 times faster. Resizing is
`interpolate(antialias=True)`, whose uint8 kernel is PIL's algorithm.

Shapes: B batch, S image size.
"""

from __future__ import annotations

import logging
import threading

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import interpolate

from pipelines.errors import CorruptImage, UserError
from pipelines.loaders.prefetch import Job, ThreadedLoader
from pipelines.read.batch import LoaderSpec
from pipelines.read.crops import Boxes
from pipelines.read.decode import Pixels, decode_rgb, is_plain_jpeg
from pipelines.read.source import Source

log = logging.getLogger("std_fast")

MODES = {"auto": "bilinear", "bilinear": "bilinear", "bicubic": "bicubic"}
"""resample -> torch's name"""


def crop_and_resize(pixels: Pixels, box: npt.NDArray[np.int32], spec: LoaderSpec) -> Pixels:
    """The box of an image, uint8 [H, W, 3], as uint8 [S, S, 3]."""
    top, left, height, width = box.tolist()
    crop = torch.from_numpy(pixels[top : top + height, left : left + width].copy())
    crop = crop[None].permute(0, 3, 1, 2)  # channels_last, which halves the time
    size = (spec.image_size, spec.image_size)
    return interpolate(crop, size, mode=MODES[spec.resample], antialias=True)[0].permute(1, 2, 0).numpy()


def decode_together(encoded: list[torch.Tensor], device: torch.device) -> list[torch.Tensor | None]:
    """JPEGs, uint8 [number of bytes] each on the host, as uint8 [3, H, W] on the device; None where it refuses one."""
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        return decode_jpeg(encoded, ImageReadMode.RGB, device)
    except RuntimeError:  # it does not say which, so that is found by halving
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # it may still be writing to memory that is free now
        if len(encoded) == 1:
            return [None]
    half = len(encoded) // 2
    return decode_together(encoded[:half], device) + decode_together(encoded[half:], device)


def fill_rows(images: torch.Tensor, encoded: dict[int, torch.Tensor], boxes: Boxes, spec: LoaderSpec) -> list[int]:
    """Decodes, cuts and resizes the JPEGs of some rows of images [B, S, S, 3], all on its device.

    Returns the rows that the device refuses. Differs from `crop_and_resize` by the device's DCT, and by at most
    1 of 255 because that rounds after each of the filter's two passes.
    """
    refused, rows, cuts = [], [], []
    size, mode = (spec.image_size, spec.image_size), MODES[spec.resample]
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
    """A `batch.Loader` of torch alone. Raises UserError for a resample that torch lacks (area).

    together: a batch's JPEGs are decoded by one call on the device; None: on a GPU whose nvJPEG works.
    """

    def __init__(self, spec: LoaderSpec, source: Source, together: bool | None = None) -> None:
        if spec.resample not in MODES:
            raise UserError(
                f"resample: {spec.resample!r} is not in the torch backend; choose one of {', '.join(MODES)}"
            )
        super().__init__(spec, source)
        self.together = _nvjpeg_works(self._stream) if together is None else together
        self._turn = threading.Lock()
        self._refused: set[int] = set()

    def _decode(self, job: Job, start: int, stop: int) -> None:
        whole = self.intact.whole
        for row in range(start, stop):
            index = int(job.indices[row])
            if index < 0:
                job.images[row] = 0
                continue
            if self.together and index not in self._refused and self.source.is_jpeg(index):
                data = self.source.read(index)
                if is_plain_jpeg(self.source, index, data.tobytes(), bool(whole[index])):
                    whole[index] = True
                    job.encoded[row] = torch.from_numpy(np.array(data))  # a copy: the source's bytes are read-only
                    continue
            try:
                job.images[row] = self._on_host(job, row)
            except CorruptImage as error:
                job.images[row] = self._on_host(job, row) if self.intact.replace(job, row, error) else 0

    def _on_host(self, job: Job, row: int) -> Pixels:
        return crop_and_resize(decode_rgb(self.source, int(job.indices[row])), job.boxes[row], self.spec)

    def _complete(self, job: Job, images: torch.Tensor) -> None:
        for row in fill_rows(images, job.encoded, job.boxes, self.spec):
            images[row].copy_(torch.from_numpy(self._on_host(job, row)))  # damaged: raises DataError
            index = int(job.indices[row])
            log.warning("%s: refused by the decoder on %s; the host decodes it", self.source.name(index), self.device)
            self._refused.add(index)
        job.encoded.clear()

    def _finish(self, job: Job) -> None:
        if not self.together:
            return super()._finish(job)
        # torchvision decodes in a stream of its own that does not wait for ours, into memory that ours may have given
        # back but still be reading: ours must be at rest whenever the decoder is called.
        with self._turn:
            try:
                super()._finish(job)
            finally:
                if self._stream is not None:
                    self._stream.synchronize()


def _nvjpeg_works(stream: torch.cuda.Stream | None) -> bool:
    """Whether torchvision decodes a JPEG on the stream's GPU. None, on a CPU: no."""
    from torchvision.io import encode_jpeg

    if stream is None:
        return False
    with torch.cuda.stream(stream):
        tiny = encode_jpeg(torch.zeros(3, 16, 16, dtype=torch.uint8))
        works = decode_together([tiny], stream.device)[0] is not None
    if not works:
        log.info("torch backend: torchvision has no nvJPEG on %s; the host decodes", stream.device)
    return works
