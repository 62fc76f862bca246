"""Traces of some steps of a run: torch.profiler's, and on a GPU a snapshot of its memory."""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from std_fast.config.durations import parse_steps
from std_fast.runtime.speed import Stopwatch

FOLDER = "profile"
MEMORY_EVENTS = 200_000  # the newest allocations that a snapshot holds
log = logging.getLogger("std_fast")


class Trace:
    """Traces the steps from `first` to `last`, once, after one step that warms the profiler up.

    Writes `FOLDER/steps-FIRST-LAST.pt.trace.json` (for chrome://tracing, Perfetto and TensorBoard's profiler plugin),
    where the parts of a step have their names, and on a GPU `steps-FIRST-LAST.memory.pickle` (for
    https://docs.pytorch.org/memory_viz). A run that ends earlier, or is resumed in between, traces those of the steps
    that it trains. A file that cannot be written is a warning.
    """

    def __init__(self, first: int, last: int, folder: Path, device: torch.device, watch: Stopwatch) -> None:
        """watch: whose parts get names in the trace."""
        self.first, self.last, self.path = first, last, folder / FOLDER / f"steps-{first}-{last}"
        self.on_gpu, self.watch = device.type == "cuda", watch
        self._profiler: profile | None = None
        self._left = 0  # steps until the end of the trace
        self._done = False

    def begin_step(self, step: int) -> None:
        """Call before each step."""
        if self._profiler is not None:
            self._profiler.step()
            self._left -= 1
            if not self._left:
                self.close()
        elif not self._done and max(1, self.first - 1) <= step <= self.last:
            self._start(step)

    def _start(self, step: int) -> None:
        warm_up = int(step < self.first)
        active = self.last - max(self.first, step) + 1
        self._left = warm_up + active
        gpu = [ProfilerActivity.CUDA] if self.on_gpu else []
        if not gpu:
            os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # without a GPU it prints that it found none, as an error
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # before step 1 there is none that could warm it up
            steps = schedule(wait=0, warmup=warm_up, active=active, repeat=1)
        self._profiler = profile(
            activities=[ProfilerActivity.CPU, *gpu],
            schedule=steps,
            on_trace_ready=self._write,
            record_shapes=True,
            profile_memory=True,
            acc_events=True,
        )
        self.watch.mark = record_function
        if self.on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self._profiler.start()

    def _write(self, profiler: profile) -> None:
        trace, memory = self.path.with_suffix(".pt.trace.json"), self.path.with_suffix(".memory.pickle")
        try:
            trace.parent.mkdir(parents=True, exist_ok=True)
            if self.on_gpu:
                torch.cuda.memory._dump_snapshot(str(memory))
            profiler.export_chrome_trace(str(trace))
            log.info("run.profile: %s written", trace)
        except (OSError, RuntimeError) as error:
            log.warning("run.profile: %s cannot be written (%s)", trace, " ".join(str(error).split())[:200])

    def close(self) -> None:
        """Ends the trace, and writes what there is of it. May be repeated."""
        running, self._profiler, self._done = self._profiler, None, True
        if running is not None:
            running.stop()
            self.watch.mark = lambda _: nullcontext()
            if self.on_gpu:
                torch.cuda.memory._record_memory_history(enabled=None)


def open_trace(steps: str, folder: Path, device: torch.device, watch: Stopwatch, done: int, end: int | None) -> Trace:
    """The trace of the steps that `run.profile` names; where it is empty, of none.

    Args:
        done, end: steps that the run has trained, and has in all; None: not known.
    """
    first, last = parse_steps(steps) or (0, 0)
    if last and (last <= done or (end is not None and first > end)):
        trained = f"{done + 1} to {end or 'the end of its hours'}"
        log.warning("run.profile: %s are none of those that are trained (%s): there will be no trace", steps, trained)
    return Trace(first, last, folder, device, watch)
