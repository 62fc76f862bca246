"""GPU-hours: the ledger of where they went, and the clock by which a training is as far as it is (DESIGN.md, rule 6)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from std_fast.recipe import Duration, Recipe, parse_warmup

PARTS = ("start", "train", "data", "evaluate", "checkpoint", "lost")


def process_seconds() -> float:
    """Seconds since this process was started, by the kernel's record; 0.0 where there is none."""
    try:
        with open("/proc/self/stat", encoding="ascii") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


class Ledger:
    """Seconds held, by part; every second since the start belongs to exactly one part.

    Parts: "start" (until the first step: imports, building, compiling), "train", "data" (waiting for the loader),
    "evaluate", "checkpoint", and "lost" (held after the last save of a run that was then killed).

    Args:
        devices: GPUs held (1 on a CPU, where an hour is an hour of the process).
        seconds: of earlier parts of the run, from its checkpoint.
        already: seconds that this process was held before the ledger began.
    """

    def __init__(self, devices: int = 1, seconds: dict[str, float] | None = None, already: float = 0.0) -> None:
        self.devices = devices
        self.seconds = dict.fromkeys(PARTS, 0.0) | (seconds or {})
        self.seconds["start"] += already
        self._part, self._since = "start", time.perf_counter()

    def switch(self, part: str) -> str:
        """From now on the time belongs to `part`; returns the part that it belonged to."""
        now = time.perf_counter()
        self.seconds[self._part] += now - self._since
        before, self._part, self._since = self._part, part, now
        return before

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Time inside belongs to `part`, afterwards to the part before."""
        before = self.switch(part)
        try:
            yield
        finally:
            self.switch(before)

    def waiting(self, items: Iterator) -> Iterator:
        """`items`, with the time spent waiting for each counted as "data"."""
        while True:
            with self.during("data"):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def read(self) -> dict[str, float]:
        """Seconds by part up to now."""
        self.switch(self._part)
        return dict(self.seconds)

    @property
    def held(self) -> float:
        """Seconds held up to now, over all parts."""
        return sum(self.read().values())

    @property
    def gpu_hours(self) -> float:
        return self.held * self.devices / 3600


class Clock:
    """How far a training is: by steps, or by the share of a GPU-hour budget that is spent.

    With a budget, the learning rate follows the hours and not the steps: a slow disk shortens the training but leaves
    it annealed. What the last evaluation and save will cost is kept in reserve.
    """

    def __init__(self, recipe: Recipe, steps_per_epoch: int, ledger: Ledger) -> None:
        length = Duration.parse(recipe.run.length, "run.length")
        self.ledger = ledger
        self.hours = length.amount if length.unit == "gpu-hours" else None
        self.steps = None if self.hours else max(1, length.steps(steps_per_epoch, recipe.run.batch))
        self.reserve = 0.0  # GPU-hours
        self._last_step: int | None = None
        self._step_hours = 0.0
        self._before: float | None = None
        warmup = parse_warmup(recipe.optim.warmup)
        if isinstance(warmup, float):
            self.warmup = warmup
        elif self.steps:
            self.warmup = min(1.0, warmup.steps(steps_per_epoch, recipe.run.batch) / self.steps)
        else:
            self.warmup = 0.05  # a duration cannot be turned into hours before the speed is known

    def progress(self, step: int, spent: float) -> float:
        """Share of the training that is done when step number `step` (from 1) is, in (0, 1]; ask once a step.

        `spent` are the GPU-hours up to now, by the one ledger that decides for all ranks.
        """
        if self.steps is not None:
            return min(1.0, step / self.steps)
        if self._before is not None:
            recent = spent - self._before
            self._step_hours = recent if not self._step_hours else 0.9 * self._step_hours + 0.1 * recent
        self._before = spent
        # the last step is the one after which another of its kind would not fit
        share = (spent + 2 * self._step_hours) / max(self.hours - self.reserve, 1e-9)
        if share >= 1:
            self._last_step = step
        return min(1.0, share)

    def done(self, step: int) -> bool:
        """Whether `step` steps are the whole training."""
        return step >= self.steps if self.steps is not None else self._last_step is not None

    def keep(self, seconds: float) -> None:
        """Keeps `seconds` of the budget in reserve for the last evaluation and save."""
        self.reserve = max(self.reserve, seconds * self.ledger.devices / 3600)
