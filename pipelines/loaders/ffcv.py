"""FFCV's files and native libraries with our boxes and order: the fastest decoding on a CPU.

FFCV's own loader draws its crops from generators bound to threads, drops the decoder's return code, allocates the
largest image for every row of every batch ahead, and leaks its thread when an epoch is left early. So only FFCV's
native code is used: the libturbojpeg that it is built on, called as `native` describes, over any `Source`.

Measured with benchmarks/loader.py against FFCV's loader with its random-crop decoder, and kept: resizing of our own
(2 to 4 times faster than INTER_AREA), decoding only down to the crop's last row (10 to 12 % of decoding), one workspace
image per thread, which stays in its cache, instead of one per row.
Measured and left out: decoding at half scale in the DCT domain where the crop is at least twice the output. It saves
16 % of the decoding of those samples, since entropy decoding dominates, none at crops of 224 from images of 400, and
their pixels would differ between backends. Skipping the rows above the crop and the columns beside it needs TurboJPEG 3
(tj3SetCroppingRegion), or C of our own; TurboJPEG 2 cannot.

Pixels are those of PIL and of the other backends (mean difference 0.003 of 255 at 224 pixels). FFCV's loader differs
from them by its filter, INTER_AREA (`resample: area`: mean 0.8), and by its fast DCT.

Shapes: B samples of a part of a batch, S image size.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipelines.errors import UserError
from pipelines.loaders.prefetch import PendingBatch, ThreadedLoader
from pipelines.read.base import Integers, Source
from pipelines.read.batch import Batch, LoaderSpec
from pipelines.read.decode import is_turned

_BLACK = np.zeros((1, 1, 3), np.uint8)
_INSTALL = "pip install ffcv numba, with OpenCV, libjpeg-turbo and pkg-config installed first; see `std-fast doctor`"


def library() -> str:
    """Path of FFCV's native library. FFCV itself is not imported: that takes seconds. Raises UserError without it."""
    if importlib.util.find_spec("numba") is None:
        raise UserError(f"data.backend: ffcv needs numba, which is missing: {_INSTALL}")
    package = importlib.util.find_spec("ffcv")
    found = package and importlib.machinery.PathFinder.find_spec("ffcv._libffcv", package.submodule_search_locations)
    if not found or not found.origin:
        raise UserError(f"data.backend: ffcv is not installed: {_INSTALL}")
    return found.origin


@dataclass
class _Workspace:
    """Memory of one thread: the pixels of one decoded image, the bytes of one encoded image."""

    pixels: npt.NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    encoded: npt.NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))

    def reserve(self, pixels: int, encoded: int) -> None:
        """Makes room for an image of so many bytes, decoded and encoded."""
        if self.pixels.size < pixels:
            self.pixels = np.empty(pixels, np.uint8)
        if self.encoded.size < encoded:
            self.encoded = np.empty(encoded, np.uint8)


class FfcvLoader(ThreadedLoader):
    """A `batch.Loader` on libturbojpeg and compiled resizing. Raises UserError when FFCV or numba is missing.

    What the compiled code does not decode (CMYK, EXIF rotations and other formats, in folders) goes through
    `decode.decode_rgb`, which also decides what is damaged, and is then cropped and resized like the rest.
    """

    backend = "ffcv"
    resamples = ("bilinear", "bicubic", "area")

    def __init__(self, spec: LoaderSpec, source: Source) -> None:
        path = library()
        try:
            from pipelines.loaders import native

            native.load(path)
        except (ImportError, OSError, AttributeError, RuntimeError) as error:  # the last: numba, without a cache folder
            raise UserError(f"data.backend: ffcv is installed but does not load ({error}): {_INSTALL}") from error
        super().__init__(spec, source)
        self._native = native
        filters = {"bilinear": native.BILINEAR, "bicubic": native.BICUBIC, "area": native.AREA}
        self._filter = filters[self.resample]
        self._workspaces: deque[_Workspace] = deque()  # of threads that are not decoding at the moment
        self._compiled = self._pool.submit(self._compile)

    def _compile(self) -> None:
        """Compiles, or loads from numba's cache, before the first batch is asked for: a call with no samples."""
        empty = np.empty(0, np.int64)
        images = np.empty((0, self.spec.image_size, 3 * self.spec.image_size), np.uint8)
        self._call([], empty > 0, empty > 0, empty, empty, np.empty((0, 4), np.int32), images)

    def _run(self, epoch: int, start_step: int) -> Generator[Batch]:
        self._compiled.result()
        return super()._run(epoch, start_step)

    def _call(
        self,
        data: list[npt.NDArray[np.uint8]],
        jpeg: npt.NDArray[np.bool_],
        sound: npt.NDArray[np.bool_],
        heights: Integers,
        widths: Integers,
        boxes: npt.NDArray[np.int32],
        images: npt.NDArray[np.uint8],
    ) -> int:
        """Decodes, crops and resizes samples into images [B, S, 3 S]; how many were done before one failed."""
        addresses = np.array([item.ctypes.data for item in data], np.uint64)
        lengths = np.array([item.size for item in data], np.int64)
        try:
            workspace = self._workspaces.pop()
        except IndexError:
            workspace = _Workspace()
        workspace.reserve(3 * int((heights * widths)[jpeg].max(initial=0)), int(lengths[jpeg].max(initial=0)))
        done, code = self._native.decode_samples(
            addresses,
            lengths,
            jpeg,
            sound,
            heights,
            widths,
            boxes,
            images,
            workspace.pixels,
            workspace.encoded,
            self._filter,
        )
        self._workspaces.append(workspace)
        if code == self._native.NO_MEMORY:
            raise MemoryError("tjInitDecompress")
        return int(done)

    def _decode(self, pending: PendingBatch, start: int, stop: int) -> None:
        here, slots = slice(start, stop), pending.slots
        indices, boxes = slots.indices[here], slots.boxes[here]
        heights, widths = slots.heights[here], slots.widths[here]
        images = pending.images[here].reshape(stop - start, self.spec.image_size, 3 * self.spec.image_size)
        jpeg = np.zeros(stop - start, np.bool_)
        data = []  # of each sample, alive until it is decoded: bytes of a JPEG, or pixels
        for i in range(stop - start):
            item = self._encoded(int(indices[i]))
            jpeg[i] = item is not None
            data.append(self._pixels(pending, start + i) if item is None else item)
        done = 0
        while done < stop - start:
            rest = slice(done, None)
            sound = self.tracker.sound[indices[rest]]
            done += self._call(data[rest], jpeg[rest], sound, heights[rest], widths[rest], boxes[rest], images[rest])
            if done < stop - start:  # a JPEG that the compiled code does not decode, or a damaged one
                data[done], jpeg[done] = self._pixels(pending, start + done), False
        self.tracker.sound[indices[indices >= 0]] = True

    def _encoded(self, index: int) -> npt.NDArray[np.uint8] | None:
        """Bytes of a JPEG for libturbojpeg; None for all else."""
        if index < 0 or not self.source.is_jpeg(index):
            return None
        data = self.source.read(index)
        return None if self.source.kind == "folder" and is_turned(data.tobytes()) else data

    def _pixels(self, pending: PendingBatch, row: int) -> npt.NDArray[np.uint8]:
        """Upright pixels of a row's sample, or of its substitute; black where there is none."""
        pixels = self.tracker.decode(pending.slots, row)
        return _BLACK if pixels is None else np.ascontiguousarray(pixels)

    def close(self) -> None:
        super().close()
        self._workspaces.clear()
