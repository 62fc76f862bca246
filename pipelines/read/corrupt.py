"""Corrupt samples: each loader counts and logs them, and shows another sample in their place, or none.

A sample is corrupt when `decode.decode_rgb` refuses it; that function examines the full image, whatever the crop. Each
backend examines a sample the first time it reads it, by that function or by a decoder that refuses on the same
warnings (libturbojpeg's). So which samples are corrupt, and what is shown instead, depends on the dataset alone, and a
batch stays a pure function of seed, epoch and position, the same from every backend.

In training (a shuffled order) the next readable sample of the dataset is substituted, with its own label, cut by the
box that the row's position draws for it: image, label and teacher targets stay consistent, and later stages need no
special case. In evaluation (the dataset's own order), which counts each image once, the row stays empty.

Files that cannot be read (missing, truncated, a disk error) are not corrupt samples: they stop the loader.
"""

from __future__ import annotations

import logging
import threading

import numpy as np

from pipelines.errors import CorruptImage, DataError
from pipelines.read.base import Integers, Source
from pipelines.read.batch import BatchSlots, LoaderSpec
from pipelines.read.decode import Pixels, decode_rgb

log = logging.getLogger("std_fast")


class CorruptTracker:
    """The samples that one loader has examined: sound, or corrupt with their substitutes. Safe to use from threads."""

    def __init__(self, spec: LoaderSpec, source: Source) -> None:
        self.spec, self.source = spec, source
        self.sound = np.zeros(source.num_samples, np.bool_)
        """[N]: decoded to the last row once without an error; from then on decoding may stop where the crop ends"""
        self.corrupt: dict[int, int] = {}
        """corrupt samples -> what is shown instead, -1 for none"""
        self._lock = threading.Lock()

    def replace_known(self, indices: Integers) -> Integers:
        """The indices with the samples that are known to be corrupt replaced."""
        if not self.corrupt:
            return indices
        return np.array([self.corrupt.get(index, index) for index in indices.tolist()], np.int64)

    def measure(self, slots: BatchSlots, start: int, stop: int) -> None:
        """Fills in sizes and boxes of rows start..stop; a row without a sample gets one pixel. Replaces corrupt ones.

        Raises DataError.
        """
        slots.heights[start:stop] = slots.widths[start:stop] = 1
        slots.boxes[start:stop] = (0, 0, 1, 1)
        rows = np.flatnonzero(slots.indices[start:stop] >= 0) + start
        try:
            self._measure(slots, rows)
        except CorruptImage:
            for place in range(len(rows)):
                try:
                    self._measure(slots, rows[place : place + 1])
                except CorruptImage as error:
                    self.replace(slots, int(rows[place]), error)

    def _measure(self, slots: BatchSlots, rows: Integers) -> None:
        heights, widths = self.source.sizes(slots.indices[rows])
        slots.heights[rows], slots.widths[rows] = heights, widths
        slots.boxes[rows] = self.spec.crop.boxes(heights, widths, self.spec.seed, slots.epoch, slots.positions[rows])

    def replace(self, slots: BatchSlots, row: int, error: CorruptImage) -> None:
        """Puts the substitute of a corrupt sample, measured, into its row.

        Raises DataError where `on_corrupt` or `corrupt_limit` says so.
        """
        slots.indices[row] = self.substitute(int(slots.indices[row]), error)
        self.measure(slots, row, row + 1)

    def decode(self, slots: BatchSlots, row: int) -> Pixels | None:
        """Upright pixels [H, W, 3] of a row's sample, or of its substitute; None where there is none. Raises DataError
        as `replace`."""
        index = int(slots.indices[row])
        try:
            return None if index < 0 else decode_rgb(self.source, index)
        except CorruptImage as error:
            self.replace(slots, row, error)
            return self.decode(slots, row)

    def substitute(self, index: int, error: CorruptImage) -> int:
        """What is shown instead of a corrupt sample, -1 for none. Raises DataError where the settings say so."""
        if index in self.corrupt:
            return self.corrupt[index]
        if self.spec.on_corrupt == "stop":
            raise error
        other = self._next_readable(index) if self.spec.shuffle else -1
        with self._lock:
            if index not in self.corrupt:
                if len(self.corrupt) >= self.spec.corrupt_limit:
                    raise DataError(f"{error}; {len(self.corrupt)} others were corrupt too (data.corrupt_limit)")
                self.corrupt[index] = other
                shown = "nothing" if other < 0 else self.source.name(other)
                log.warning("%s; %s is shown in its place (corrupt so far: %d)", error, shown, len(self.corrupt))
        return other

    def _next_readable(self, index: int) -> int:
        """The next sample of the dataset that can be decoded; the first follows the last."""
        for step in range(1, self.source.num_samples):
            other = (index + step) % self.source.num_samples
            try:
                decode_rgb(self.source, other)
            except CorruptImage:
                continue
            return other
        raise DataError(f"{self.source.path}: no sample in it can be decoded; convert it again")
