"""How fast a run is, and against what: time of a step's parts, arithmetic per image, the device's measured ceiling."""

from __future__ import annotations

import functools
import logging
import resource
import sys
import time
from typing import Any

import torch

log = logging.getLogger("std_fast")


class Stopwatch:
    """Seconds of the parts of single steps: of those only for which it is `armed`, so that the others pay nothing.

    On a GPU the marks are events in the stream that is current: nothing waits, until `read` does. Parts that ran beside
    each other in two streams are each counted whole.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu, self.armed = device.type == "cuda", False
        self._spans: dict[str, tuple[Any, Any]] = {}

    def now(self) -> Any:
        """A mark at what the device has been given up to now; None unless armed."""
        if not self.armed:
            return None
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def note(self, **spans: tuple[Any, Any]) -> None:
        """Names parts by two marks each."""
        for name, (begin, end) in spans.items():
            if begin is not None and end is not None:
                self._spans[name] = (begin, end)

    def read(self) -> dict[str, float]:
        """Seconds of each part that was noted since the last call; waits for the device, and disarms."""
        spans, self._spans, self.armed = self._spans, {}, False
        seconds = {}
        for name, (begin, end) in spans.items():
            if self.on_gpu:
                end.synchronize()
            seconds[name] = begin.elapsed_time(end) / 1000 if self.on_gpu else end - begin
        return seconds


def ceiling(device: torch.device, precision: str) -> float:
    """Operations per second of a large square matrix product, measured once a process: the best of several rounds.

    In `precision` on a GPU, in float32 on a CPU, where it takes a fraction of a second.
    """
    dtype = torch.bfloat16 if precision == "bfloat16" and device.type == "cuda" else torch.float32
    return _ceiling(device, dtype, torch.get_num_threads() if device.type == "cpu" else 0)


@functools.cache
def _ceiling(device: torch.device, dtype: torch.dtype, _threads: int) -> float:
    on_gpu = device.type == "cuda"
    side, repeats, rounds = (8192, 10, 5) if on_gpu else (512, 3, 4)
    # random data: on a GPU a product of equal numbers draws less power, and so runs faster than any real one
    numbers = torch.Generator(device).manual_seed(0)
    a = torch.randn(side, side, device=device, dtype=dtype, generator=numbers)
    out = torch.empty_like(a)
    best = float("inf")
    for _ in range(rounds):
        if on_gpu:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, a, out=out)
        if on_gpu:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * side**3 * repeats / best


def peak_memory(device: torch.device) -> int:
    """Most bytes in use up to now: of the GPU's memory by tensors, on a CPU of the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class SpeedMeter:
    """The figures of speed in a line of the log.

    Args:
        flops: of an image, from `flops_per_image`; None leaves MFU out.
        limit: of all devices together, operations per second.
    """

    def __init__(self, device: torch.device, watch: Stopwatch, flops: float | None, limit: float) -> None:
        self.device, self.watch, self.flops, self.limit = device, watch, flops, limit

    def read(self, images: int, seconds: float, step_seconds: float, waited: float) -> dict[str, float]:
        """Figures since the last line.

        Args:
            images, seconds: learned from, by all ranks; and in which time.
            step_seconds: mean time of a step.
            waited: seconds of waiting for data.

        Returns:
            `mfu`: share of the measured ceiling that the models' arithmetic used; `data_wait`: share of the time;
            `share_augment`, `share_teacher`, `share_student` (forward and backward), `share_optimizer`: time of this
            step's parts by the mean time of a step (together more than 1 where teachers run beside the student);
            `peak_memory_gib`.
        """
        figures = {"data_wait": waited / seconds, "peak_memory_gib": peak_memory(self.device) / 2**30}
        if self.flops is not None:
            figures["mfu"] = images / seconds * self.flops / self.limit
        figures |= {f"share_{name}": value / step_seconds for name, value in self.watch.read().items()}
        return {name: round(value, 4) for name, value in figures.items()}


def speed_in_words(figures: dict[str, float]) -> str:
    """What a line on the screen says of `SpeedMeter.read`: `MFU 41 %  data 2 %  teacher 30 %  ...  12.3 GiB`."""
    shares = {"mfu": "MFU", "data_wait": "data"} | {
        name: name.removeprefix("share_") for name in figures if name.startswith("share_")
    }
    parts = [f"{text} {100 * figures[name]:.0f} %" for name, text in shares.items() if name in figures]
    return "  ".join([*parts, f"{figures['peak_memory_gib']:.2f} GiB"])
