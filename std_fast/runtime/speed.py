"""Speed of a run: the time of a step's parts, and MFU against the device's measured ceiling."""

from __future__ import annotations

import functools
import logging
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from std_fast.runtime.budget import PARTS, Ledger
from std_fast.runtime.metrics import three_digits

MOST_SPANS = 1024  # kept between two readings: of steps that the device has finished long before
log = logging.getLogger("std_fast")


class Span(NamedTuple):
    """One part of one step: host seconds on a CPU, events on a GPU."""

    step: int
    part: str
    begin: Any
    end: Any


class Stopwatch:
    """Times the parts of each step; the time of a part that the ledger lists ("teacher") is counted there.

    On a GPU a part is the device's time between two events on the current stream: nothing waits until `read`. Parts
    that ran side by side on two streams are each counted in full. On a CPU it is the host's time.
    """

    def __init__(self, device: torch.device, ledger: Ledger | None = None) -> None:
        self.on_gpu, self.ledger = device.type == "cuda", ledger or Ledger()
        self.mark: Callable[[str], AbstractContextManager] = lambda _: nullcontext()  # a trace's, while it runs
        self._spans: deque[Span] = deque()

    @contextmanager
    def part(self, name: str, step: int) -> Iterator[None]:
        """Inside, the time is that of part `name` of `step`."""
        counted = name in PARTS and not self.on_gpu
        with self.ledger.during(name) if counted else nullcontext(), self.mark(name):
            begin = self._now()
            yield
            self._spans.append(Span(step, name, begin, self._now()))
        while len(self._spans) > MOST_SPANS:
            self._close(self._spans.popleft())

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _close(self, span: Span) -> float:
        """Seconds of a span, which the device has finished or is waited for."""
        if not self.on_gpu:
            return span.end - span.begin
        span.end.synchronize()
        seconds = span.begin.elapsed_time(span.end) / 1000
        if span.part in PARTS:
            self.ledger.move(seconds, "train", span.part)
        return seconds

    def finished(self) -> int:
        """The newest step whose optimizer part the device has finished, 0 where there is none since `read`; no wait."""
        ends = ((span.step, span.end) for span in reversed(self._spans) if span.part == "optimizer")
        return next((step for step, end in ends if not self.on_gpu or end.query()), 0)

    def read(self, step: int) -> dict[str, float]:
        """Seconds of each part of `step`; waits for the device to finish it. What belongs to later steps is kept."""
        seconds = {}
        later = [span for span in self._spans if span.step > step]
        for span in self._spans:
            if span.step <= step:
                took = self._close(span)
                if span.step == step:
                    seconds[span.part] = took
        self._spans = deque(later)
        return seconds


def ceiling(device: torch.device, precision: str) -> float:
    """Operations per second of a large square matrix product, measured once per process: the best of several rounds.

    In `precision` on a GPU, in float32 on a CPU, where it takes a fraction of a second. There a round is timed by the
    clock and by the processor's time of each thread, and the shorter counts: other processes lengthen only the first.
    """
    dtype = torch.bfloat16 if precision == "bfloat16" and device.type == "cuda" else torch.float32
    return _ceiling(device, dtype, torch.get_num_threads() if device.type == "cpu" else 0)


@functools.cache
def _ceiling(device: torch.device, dtype: torch.dtype, threads: int) -> float:
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
        began, processor = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            torch.mm(a, a, out=out)
        if on_gpu:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
        if not on_gpu:
            best = min(best, max((time.process_time() - processor) / threads, 1e-9))
    return 2.0 * side**3 * repeats / best


def peak_memory(device: torch.device) -> int:
    """Most bytes in use up to now: of the GPU's memory by tensors, on a CPU of the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class SpeedMeter:
    """The metrics of speed in a line of the log.

    Args:
        flops: operations for an image, from `flops_per_image`; None leaves MFU out.
        limit: operations per second of all devices together.
    """

    def __init__(self, device: torch.device, watch: Stopwatch, flops: float | None, limit: float) -> None:
        self.device, self.watch, self.flops, self.limit = device, watch, flops, limit

    def read(self, step: int, images: int, seconds: float, step_seconds: float, waited: float) -> dict[str, float]:
        """Metrics since the last line, and the parts of `step`, the one that the line is about.

        Args:
            images, seconds: trained on, by all ranks; and in which time.
            step_seconds: mean time of a step.
            waited: seconds of waiting for data.

        Returns:
            `mfu`: share of the measured ceiling that the models' arithmetic used; `data_wait`: share of the time;
            `share_augment`, `share_teacher`, `share_student` (forward and backward), `share_optimizer`: time of this
            step's parts by the mean time of a step (together more than 1 where teachers run beside the student);
            `peak_memory_gib`.
        """
        metrics = {"data_wait": waited / seconds, "peak_memory_gib": peak_memory(self.device) / 2**30}
        if self.flops is not None:
            metrics["mfu"] = images / seconds * self.flops / self.limit
        metrics |= {f"share_{name}": value / step_seconds for name, value in self.watch.read(step).items()}
        return {name: float(f"{value:.4g}") for name, value in metrics.items()}


def speed_in_words(metrics: dict[str, float]) -> str:
    """What a line on the screen shows of `SpeedMeter.read`: `MFU 41.4 %  data 2.1 %  teacher 30.4 %  ...  12.3 GiB`."""
    shares = {"mfu": "MFU", "data_wait": "data"} | {
        name: name.removeprefix("share_") for name in metrics if name.startswith("share_")
    }
    parts = [f"{text} {three_digits(100 * metrics[name])} %" for name, text in shares.items() if name in metrics]
    return "  ".join([*parts, f"{three_digits(metrics['peak_memory_gib'])} GiB"])
