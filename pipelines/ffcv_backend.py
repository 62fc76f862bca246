"""FFCV's files and native libraries, our boxes and order: the fastest decoding on a CPU.

FFCV's own loader draws its crops from generators bound to threads, drops the decoder's return code, keeps room for the
largest image at every place of every batch ahead, and leaks its thread when an epoch is left early. So of FFCV only the
native code is used: the libturbojpeg it is built on, in the way that `native` describes, over any `Source`.

Measured with benchmarks/loader.py against FFCV's loader with its random-crop decoder, and kept: resizing of our own
(2 to 4 times faster than INTER_AREA), decoding only down to the crop's last row (10 to 12 % of decoding), one scratch
image per thread, which stays in its cache, instead of one per place.
Measured and left out: decoding at half scale in the DCT domain where the crop is at least twice the output. It saves
16 % of the decoding of those samples, since entropy decoding dominates, none at crops of 224 from images of 400, and
their pixels would differ between backends. Skipping the rows above the crop and the columns beside it needs TurboJPEG 3
(tj3SetCroppingRegion), or C of our own; TurboJPEG 2 cannot.

Pixels are those of PIL and of the other backends (mean difference 0.003 of 255 at 224 pixels). FFCV's loader differs
from them by its filter, INTER_AREA (`resample: area`: mean 0.8), and by its fast DCT.

Shapes: B batch, S image size.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipelines.batch import LoaderSpec
from pipelines.decode import decode_rgb, is_turned
from pipelines.errors import UserError
from pipelines.prefetch import Job, ThreadedLoader
from pipelines.source import BetonSource, Integers, JoinedSource, Source

if TYPE_CHECKING:
    import ctypes

_INSTALL = "pip install ffcv numba, with OpenCV, libjpeg-turbo and pkg-config installed first; see `std-fast doctor`"


def library() -> str:
    """Path of FFCV's native library. FFCV itself is not imported: that takes seconds. Raises UserError without it."""
    if importlib.util.find_spec("numba") is None:
        raise UserError(f"backend: ffcv needs numba, which is missing: {_INSTALL}")
    package = importlib.util.find_spec("ffcv")
    found = package and importlib.machinery.PathFinder.find_spec("ffcv._libffcv", package.submodule_search_locations)
    if not found or not found.origin:
        raise UserError(f"backend: ffcv is not installed: {_INSTALL}")
    return found.origin


@dataclass
class _Workspace:
    """What one thread needs: a decompressor, the pixels of one decoded image, the bytes of one encoded image."""

    lib: ctypes.CDLL
    handle: int
    pixels: npt.NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    encoded: npt.NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))

    def reserve(self, pixels: int, encoded: int) -> None:
        """Makes room for an image of so many bytes, decoded and encoded."""
        if self.pixels.size < pixels:
            self.pixels = np.empty(pixels, np.uint8)
        if self.encoded.size < encoded:
            self.encoded = np.empty(encoded, np.uint8)

    def __del__(self) -> None:
        self.lib.tjDestroy(self.handle)


class FfcvLoader(ThreadedLoader):
    """A `batch.Loader` on libturbojpeg and compiled resizing. Raises UserError when FFCV or numba is missing.

    What the compiled code does not decode (CMYK, EXIF rotations and other formats, in folders) goes through
    `decode.decode_rgb`, which also has the last word on what is damaged, and is then cropped and resized like the rest.
    """

    def __init__(self, spec: LoaderSpec, source: Source) -> None:
        path = library()
        try:
            from pipelines import native

            lib = native.load(path)
        except (ImportError, OSError, AttributeError, RuntimeError) as error:  # the last: numba, for want of a cache
            raise UserError(f"backend: ffcv is installed but does not load ({error}): {_INSTALL}") from error
        super().__init__(spec, source)
        self._native = native
        self._kind = {
            "auto": native.BILINEAR,
            "bilinear": native.BILINEAR,
            "bicubic": native.BICUBIC,
            "area": native.AREA,
        }[spec.resample]
        self._lib = lib
        self._workspaces: deque[_Workspace] = deque()  # of threads that do not decode at the moment
        assert self._pool is not None
        self._warm = self._pool.submit(self._warm_up)

    def _warm_up(self) -> None:
        """Compiles, or loads from numba's cache, before the first batch is asked for."""
        empty = np.empty(0, np.int64)
        images = np.empty((0, self.spec.image_size, 3 * self.spec.image_size), np.uint8)
        self._call(empty.astype(np.uint64), empty, empty > 0, empty, empty, np.empty((0, 4), np.int32), images)

    def _call(
        self,
        addresses: npt.NDArray[np.uint64],
        lengths: Integers,
        jpeg: npt.NDArray[np.bool_],
        heights: Integers,
        widths: Integers,
        boxes: npt.NDArray[np.int32],
        images: npt.NDArray[np.uint8],
    ) -> int:
        """How many samples were decoded before one failed."""
        try:
            workspace = self._workspaces.pop()
        except IndexError:
            handle = self._lib.tjInitDecompress()
            if not handle:
                raise MemoryError("tjInitDecompress") from None
            workspace = _Workspace(self._lib, handle)
        pixels = 3 * int((heights * widths)[jpeg].max(initial=0))
        workspace.reserve(pixels, int(lengths[jpeg].max(initial=0)))
        done, code = self._native.decode_samples(
            workspace.handle,
            addresses,
            lengths,
            jpeg,
            heights,
            widths,
            boxes,
            images,
            workspace.pixels,
            workspace.encoded,
            self._kind,
        )
        # After an error, away with it: what TurboJPEG leaves behind is not to be trusted.
        if code == self._native.OK:
            self._workspaces.append(workspace)
        return int(done)

    def _decode(self, job: Job, start: int, stop: int) -> None:
        indices, heights, widths = job.indices[start:stop], job.heights[start:stop], job.widths[start:stop]
        images = job.images[start:stop].reshape(stop - start, self.spec.image_size, 3 * self.spec.image_size)
        if isinstance(self.source, (BetonSource, JoinedSource)):
            addresses, lengths = self.source.locate(indices)
            jpeg = self.source.jpeg[indices]
        else:
            data, jpeg = self._read(indices)  # alive until the call returns
            addresses = np.array([item.ctypes.data for item in data], np.uint64)
            lengths = np.array([item.size for item in data], np.int64)
        boxes = job.boxes[start:stop]
        done = 0
        while done < stop - start:
            rest = slice(done, None)
            done += self._call(
                addresses[rest], lengths[rest], jpeg[rest], heights[rest], widths[rest], boxes[rest], images[rest]
            )
            if done < stop - start:  # not for the fast path, or damaged: then this raises
                pixels = np.ascontiguousarray(decode_rgb(self.source, int(indices[done])))
                addresses[done], jpeg[done] = pixels.ctypes.data, False

    def _read(self, indices: Integers) -> tuple[list[npt.NDArray[np.uint8]], npt.NDArray[np.bool_]]:
        """A folder's images: bytes of JPEGs for libturbojpeg, upright pixels of all others; which are JPEGs."""
        data, jpeg = [], np.zeros(len(indices), np.bool_)
        for i, index in enumerate(indices.tolist()):
            item = self.source.read(index)
            jpeg[i] = self.source.is_jpeg(index) and not is_turned(item.tobytes())
            data.append(item if jpeg[i] else np.ascontiguousarray(decode_rgb(self.source, index)))
        return data, jpeg

    def epoch(self, epoch: int, start_step: int = 0) -> Any:
        self._warm.result()
        return super().epoch(epoch, start_step)

    def close(self) -> None:
        super().close()
        self._workspaces.clear()
