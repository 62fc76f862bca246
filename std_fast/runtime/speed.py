"""Speed of a run: the time of a step's parts, and MFU against the device's peak."""

from __future__ import annotations

import re
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


class Span(NamedTuple):
    """One part of one step: host seconds on a CPU, events on a GPU."""

    step: int
    part: str
    begin: Any
    end: Any
    compiling: float = 0.0
    """seconds of it in which something was compiled"""


class Stopwatch:
    """Times the parts of each step; the time of a part that the ledger lists ("teacher") is counted there.

    On a GPU a part is the device's time between two events on the current stream: nothing waits until `read`. Parts
    that ran side by side on two streams are each counted in full. On a CPU it is the host's time.
    """

    def __init__(self, device: torch.device, ledger: Ledger | None = None) -> None:
        self.on_gpu, self.ledger = device.type == "cuda", ledger or Ledger()
        self.mark: Callable[[str], AbstractContextManager] = lambda _: nullcontext()  # a trace's, while it runs
        self._spans: deque[Span] = deque()
        self._seconds: dict[str, float] = {}  # of spans that are closed, by part, since the last reading

    @contextmanager
    def part(self, name: str, step: int) -> Iterator[None]:
        """Inside, the time is that of part `name` of `step`."""
        counted = name in PARTS and not self.on_gpu
        with self.ledger.during(name) if counted else nullcontext(), self.mark(name):
            begin, compiled = self._now(), self.ledger.seconds["compile"]
            yield
            self._spans.append(Span(step, name, begin, self._now(), self.ledger.seconds["compile"] - compiled))
        while len(self._spans) > MOST_SPANS:
            self._close(self._spans.popleft())

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _close(self, span: Span) -> None:
        """Counts a span, which the device has finished or is waited for."""
        if self.on_gpu:
            span.end.synchronize()
        took = span.begin.elapsed_time(span.end) / 1000 if self.on_gpu else span.end - span.begin
        seconds = max(0.0, took - span.compiling)
        if self.on_gpu and span.part in PARTS:
            self.ledger.move(seconds, "train", span.part)
        self._seconds[span.part] = self._seconds.get(span.part, 0.0) + seconds

    def finished(self) -> int:
        """The newest step whose optimizer part the device has finished, 0 where there is none since `read`; no wait."""
        ends = ((span.step, span.end) for span in reversed(self._spans) if span.part == "optimizer")
        return next((step for step, end in ends if not self.on_gpu or end.query()), 0)

    def read(self, step: int) -> dict[str, float]:
        """Seconds of each part of the steps up to `step` since the last reading, without what was compiled in them;
        waits for the device to finish them. What belongs to later steps is kept."""
        spans, self._spans = self._spans, deque(span for span in self._spans if span.step > step)
        for span in spans:
            if span.step <= step:
                self._close(span)
        seconds, self._seconds = self._seconds, {}
        return seconds


PEAKS = {
    "B200": 2250.0, "GH200": 989.0, "H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "A100": 312.0,
    "A30": 165.0, "L40S": 362.0, "L4": 121.0, "RTX 4090": 165.0, "RTX 3090": 71.0,
}  # fmt: skip
"""TFLOP/s of dense matrix products in bfloat16, from NVIDIA's data sheets; the first that a device's name holds"""


def peak(device: torch.device, precision: str) -> float | None:
    """Operations per second of all matrix units of a GPU, by its data sheet; None where that is not known, as of a CPU,
    of other precisions than bfloat16 and of a part of a GPU."""
    if device.type != "cuda" or precision != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    known = (1e12 * rate for model, rate in PEAKS.items() if re.search(rf"\b{model}\b", name) and "MIG" not in name)
    return next(known, None)


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
        limit: operations per second of all devices together, see `peak`; None leaves MFU out.
    """

    def __init__(self, device: torch.device, watch: Stopwatch, flops: float | None, limit: float | None) -> None:
        self.device, self.watch, self.flops, self.limit = device, watch, flops, limit

    def read(self, step: int, images: int, seconds: float, waited: float) -> dict[str, float]:
        """Metrics of the steps since the last line, up to `step`.

        Args:
            images, seconds: trained on, by all ranks; and in which time.
            waited: seconds of waiting for data.

        Returns:
            `mfu`: share of the device's peak that the models' arithmetic used; `data_wait`, `share_augment`,
            `share_teacher`, `share_student` (forward and backward), `share_optimizer`: shares of the time (together
            more than 1 only where teachers run beside the student); `peak_memory_gib`.
        """
        metrics = {"data_wait": waited / seconds, "peak_memory_gib": peak_memory(self.device) / 2**30}
        if self.flops is not None and self.limit is not None:
            metrics["mfu"] = images / seconds * self.flops / self.limit
        metrics |= {f"share_{name}": value / seconds for name, value in self.watch.read(step).items()}
        return {name: float(f"{value:.4g}") for name, value in metrics.items()}


def speed_in_words(metrics: dict[str, float]) -> str:
    """What a line on the screen shows of `SpeedMeter.read`: `MFU 41.4 %  data 2.1 %  teacher 30.4 %  ...  12.3 GiB`."""
    shares = {"mfu": "MFU", "data_wait": "data"} | {
        name: name.removeprefix("share_") for name in metrics if name.startswith("share_")
    }
    parts = [f"{text} {three_digits(100 * metrics[name])} %" for name, text in shares.items() if name in metrics]
    return "  ".join([*parts, f"{three_digits(metrics['peak_memory_gib'])} GiB"])
