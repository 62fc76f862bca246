"""What a loader does about corrupt samples: names and counts them, and shows another one in their place, or none.

A sample is corrupt when `decode.decode_rgb` refuses it, which looks at the whole image, whatever the crop. Each backend
finds that out the first time it sees a sample, by that function or by a decoder that refuses at the same signs
(libturbojpeg's warnings): so what is corrupt, and what is shown instead, depends on the dataset alone. A batch
stays a pure function of seed, epoch and position, the same from every backend.

In training the next sample of the dataset that is whole takes the place, with its own label, and with the box that the
place's position draws for it: image, label and teacher targets belong together, and nothing downstream is special. In
evaluation, which counts each image once, the place stays empty.

Files that cannot be read (gone, cut short, a disk's error) are no corrupt samples: they stop the loader.
"""

from __future__ import annotations

import logging
import threading
from typing import Protocol

import numpy as np

from pipelines.errors import CorruptImage, DataError
from pipelines.read.batch import LoaderSpec
from pipelines.read.crops import Boxes
from pipelines.read.decode import decode_rgb
from pipelines.read.source import Integers, Source

log = logging.getLogger("std_fast")


class Places(Protocol):
    """Part of a batch in the making."""

    epoch: int
    positions: Integers
    indices: Integers
    """-1: no sample"""
    heights: Integers
    widths: Integers
    boxes: Boxes


class CorruptTracker:
    """The rule of one loader, and which samples it has found whole or corrupt. Used by many threads."""

    def __init__(self, spec: LoaderSpec, source: Source) -> None:
        self.spec, self.source = spec, source
        self.whole = np.zeros(source.num_samples, np.bool_)
        """which samples were once decoded as a whole: their decoder may then stop where the crop ends"""
        self.found: dict[int, int] = {}
        """corrupt samples -> what is shown instead, -1 for none"""
        self._lock = threading.Lock()

    def settle(self, indices: Integers) -> Integers:
        """The indices with known corrupt samples replaced."""
        if not self.found:
            return indices
        return np.array([self.found.get(index, index) for index in indices.tolist()], np.int64)

    def measure(self, job: Places, start: int, stop: int) -> None:
        """Fills in sizes and boxes of these places; those without a sample are of one pixel. Corrupt ones are replaced.

        Raises DataError.
        """
        job.heights[start:stop] = job.widths[start:stop] = 1
        job.boxes[start:stop] = (0, 0, 1, 1)
        rows = np.flatnonzero(job.indices[start:stop] >= 0) + start
        try:
            self._measure(job, rows)
        except CorruptImage:
            for place in range(len(rows)):
                try:
                    self._measure(job, rows[place : place + 1])
                except CorruptImage as error:
                    self.replace(job, int(rows[place]), error)

    def _measure(self, job: Places, rows: Integers) -> None:
        heights, widths = self.source.sizes(job.indices[rows])
        job.heights[rows], job.widths[rows] = heights, widths
        job.boxes[rows] = self.spec.crop.boxes(heights, widths, self.spec.seed, job.epoch, job.positions[rows])

    def replace(self, job: Places, row: int, error: CorruptImage) -> bool:
        """Another sample, measured, or none, in a place whose sample turned out to be corrupt; whether there is one.

        Raises DataError where the rule says so.
        """
        job.indices[row] = self.substitute(int(job.indices[row]), error)
        self.measure(job, row, row + 1)
        return bool(job.indices[row] >= 0)

    def substitute(self, index: int, error: CorruptImage) -> int:
        """What is shown instead of a corrupt sample, -1 for none. Raises DataError where the rule says so."""
        if index in self.found:
            return self.found[index]
        if self.spec.on_corrupt == "stop":
            raise error
        other = self._next(index) if self.spec.shuffle else -1
        with self._lock:
            if index not in self.found:
                if len(self.found) >= self.spec.corrupt_limit:
                    raise DataError(f"{error}; {len(self.found)} others were corrupt too (data.corrupt_limit)")
                self.found[index] = other
                what = "nothing" if other < 0 else self.source.name(other)
                log.warning("%s; %s is shown in its place (corrupt so far: %d)", error, what, len(self.found))
        return other

    def _next(self, index: int) -> int:
        """The next sample of the dataset, the first after the last, that is whole."""
        for step in range(1, self.source.num_samples):
            other = (index + step) % self.source.num_samples
            try:
                decode_rgb(self.source, other)
            except CorruptImage:
                continue
            return other
        raise DataError(f"{self.source.path}: no sample in it can be decoded; convert it again")
