"""How far a conversion is: what `convert` passes to its `progress`, a few times a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from pipelines.read.beton import TABLE_TYPE

SECONDS = 0.2


@dataclass(frozen=True)
class ConvertProgress:
    """How far a conversion is."""

    phase: str
    """"converting", then "checksum" """
    done: int
    """images, those of earlier runs included"""
    total: int
    rate: float
    """images per second in this run"""
    seconds_left: float
    estimated_bytes: int
    """of the finished file"""


class ConvertMeter:
    """Calls `report` every SECONDS."""

    def __init__(
        self, total: int, done: int, per_image: float, start: int, report: Callable[[ConvertProgress], None] | None
    ) -> None:
        """total, done: images, and how many an earlier run has converted.  per_image: bytes, as estimated.  start:
        address of the first."""
        self._total, self._before, self._per_image, self._start, self._report = total, done, per_image, start, report
        self._done = done
        self._began = self._shown = time.monotonic()

    def add(self, images: int, end: int) -> None:
        """Counts images whose bytes now end at the address `end`."""
        self._done += images
        if time.monotonic() - self._shown >= SECONDS:
            self.show(end)

    def show(self, end: int) -> None:
        if self._report is None:
            return
        self._shown = time.monotonic()
        rate = (self._done - self._before) / max(self._shown - self._began, 1e-9)
        left = self._total - self._done
        per_image = (end - self._start) / self._done if self._done > 32 else self._per_image
        final = end + int(left * per_image) + self._total * TABLE_TYPE.itemsize
        seconds = left / max(rate, 1e-9)
        self._report(ConvertProgress("converting", self._done, self._total, rate, seconds, final))
