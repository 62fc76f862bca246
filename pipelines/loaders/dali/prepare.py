"""The part of DALI's loader that runs in the pool's threads: from the rows of a batch to what DALI is fed.

Shapes: S image size.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import PIL.Image

from pipelines.loaders.torch import crop_and_resize
from pipelines.read.base import Bytes, Integers, Source
from pipelines.read.batch import BatchSlots, LoaderSpec
from pipelines.read.corrupt import CorruptTracker
from pipelines.read.crops import Boxes
from pipelines.read.decode import is_plain_jpeg

_UNKNOWN, _PLAIN, _ODD = range(3)
_PLACEHOLDER_BOX = (0, 0, 8, 8)


@dataclass
class DaliBatch:
    """One batch on its way through DALI."""

    slots: BatchSlots
    keys: Integers = field(default_factory=lambda: np.empty((2, 0), np.int64))
    """labels and positions, see `BatchSlots.keys`"""
    data: list[Bytes] = field(default_factory=list)
    """what DALI decodes for the first rows, kept alive until it has; never empty: DALI takes no empty batches"""
    boxes: Boxes = field(default_factory=lambda: np.array([_PLACEHOLDER_BOX], np.int32))
    """of these images"""
    odd: dict[int, npt.NDArray[np.uint8]] = field(default_factory=dict)
    """rows that were decoded on the host, [S, S, 3] each"""
    error: Exception | None = None
    """raised when the batch is delivered"""


class Preparer:
    """Reads the samples of a batch. Used by many threads."""

    def __init__(self, spec: LoaderSpec, source: Source, tracker: CorruptTracker) -> None:
        self.spec, self.source, self.tracker = spec, source, tracker
        self._kinds = np.zeros(source.num_samples, np.uint8)
        stream = io.BytesIO()
        PIL.Image.new("RGB", _PLACEHOLDER_BOX[2:]).save(stream, "JPEG")
        self._placeholder = np.frombuffer(stream.getvalue(), np.uint8)

    def prepare(self, slots: BatchSlots) -> DaliBatch:
        """Reads a batch and decodes what DALI does not. An error is kept in the batch, for its step to raise."""
        batch = DaliBatch(slots)
        try:
            self.tracker.measure(slots, 0, slots.count)
            for row in range(slots.count):
                data = self._plain_jpeg(int(slots.indices[row]))
                if data is None:
                    batch.odd[row] = self._on_host(slots, row)
                batch.data.append(self._placeholder if data is None else data)
            batch.keys = slots.keys(self.source.labels)
        except Exception as error:  # of any kind: the consumer gets it in the right step
            batch.error = error
        if batch.error or not batch.data:
            batch.data = [self._placeholder]
        else:
            batch.boxes = slots.boxes.copy()
            batch.boxes[list(batch.odd)] = _PLACEHOLDER_BOX
        return batch

    def _on_host(self, slots: BatchSlots, row: int) -> npt.NDArray[np.uint8]:
        """A row's sample [S, S, 3], or its substitute; black where there is none."""
        pixels, size = self.tracker.decode(slots, row), self.spec.image_size
        if pixels is None:
            return np.zeros((size, size, 3), np.uint8)
        return crop_and_resize(pixels, slots.boxes[row], size, self.spec.resample)

    def _plain_jpeg(self, index: int) -> Bytes | None:
        """The sample's bytes if they are a JPEG that every decoder reads alike, else None."""
        if index < 0 or self._kinds[index] == _ODD:
            return None
        data = self.source.read(index) if self.source.is_jpeg(index) else None
        if self._kinds[index] == _UNKNOWN:
            plain = data is not None and is_plain_jpeg(self.source, index, data.tobytes(), sound=False)
            self._kinds[index] = _PLAIN if plain else _ODD
        return data if self._kinds[index] == _PLAIN else None
