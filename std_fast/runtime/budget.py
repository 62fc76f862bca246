"""GPU-hours: the ledger that divides them into parts, and the clock that measures the progress of a training."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipelines.files import write_atomic
from pipelines.untrusted import read_json
from std_fast.config.recipe import Duration
from std_fast.runtime.distributed import World

PARTS = ("start", "compile", "train", "teacher", "data", "evaluate", "checkpoint", "lost")
PRODUCTIVE = ("train", "teacher", "data")  # the rest is overhead
UNPLANNED = ("start", "compile", "lost")  # do not move the learning rate
CLOSING = 1.25  # seconds from the last save to the end of the process: summary, TensorBoard, unloading torch
HELD = "held.json"
log = logging.getLogger("std_fast")


def productive_seconds(seconds: Mapping[str, float]) -> float:
    """Seconds of a ledger in which the model was trained."""
    return sum(seconds.get(part, 0.0) for part in PRODUCTIVE)


def in_words(seconds: Mapping[str, float]) -> str:
    """`train 61.2 s (80 %), start 9.1 s (12 %), ...`, the largest part first; parts that took nothing are left out."""
    total = sum(seconds.values()) or 1.0
    parts = sorted(((value, part) for part, value in seconds.items() if value >= 0.05), reverse=True)
    return ", ".join(f"{part} {value:.1f} s ({100 * value / total:.0f} %)" for value, part in parts)


def duration_in_words(seconds: float) -> str:
    """`37 days`, `40 hours`, `12 minutes` or `50 s`: the largest unit of which there are two."""
    units = {"days": 86400, "hours": 3600, "minutes": 60}
    found = (f"{seconds / size:.0f} {unit}" for unit, size in units.items() if seconds >= 2 * size)
    return next(found, f"{seconds:.0f} s")


def process_seconds() -> float:
    """Seconds since this process was started, its imports included, by Linux's record; 0.0 where there is none."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


class Ledger:
    """Seconds held, by part; every second since the start belongs to exactly one part.

    Parts: "start" (until the first step: imports, building, a first evaluation that is timed), "compile", "train",
    "teacher", "data" (waiting for the loader), "evaluate", "checkpoint", and "lost" (held after the last save of a run
    that was then killed).

    Args:
        devices: GPUs held (1 on a CPU, where an hour is an hour of the process).
        already: seconds that this process was held before the ledger began.
        now: the clock, in seconds.
    """

    def __init__(self, devices: int = 1, already: float = 0.0, now: Callable[[], float] = time.perf_counter) -> None:
        self.devices, self._now = devices, now
        self.seconds = dict.fromkeys(PARTS, 0.0) | {"start": already}
        self._part, self._since = "start", now()
        self._zero = self._since - already

    def carry(self, gpu_seconds: Mapping[str, float]) -> None:
        """Adds the GPU-seconds of the run's earlier processes, on any number of GPUs."""
        for part, value in gpu_seconds.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + value / self.devices
            self._zero -= value / self.devices

    def switch(self, part: str) -> str:
        """From now on the time belongs to `part`; returns the part that it belonged to."""
        now = self._now()
        self.seconds[self._part] += now - self._since
        before, self._part, self._since = self._part, part, now
        return before

    def move(self, seconds: float, one: str, other: str) -> None:
        """Counts `seconds` of part `one`, at most all of it, as `other`."""
        seconds = min(seconds, self.read()[one])
        self.seconds[one] -= seconds
        self.seconds[other] += seconds

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Time inside belongs to `part`, afterwards to the part before."""
        before = self.switch(part)
        try:
            yield
        finally:
            self.switch(before)

    def read(self) -> dict[str, float]:
        """Seconds by part up to now."""
        self.switch(self._part)
        return dict(self.seconds)

    @property
    def held(self) -> float:
        """Seconds held up to now, over all parts. May be read from another thread."""
        return self._now() - self._zero

    @property
    def gpu_hours(self) -> float:
        return self.held * self.devices / 3600


class Heartbeat:
    """Writes to disk, in a thread, how long a run has been held: the record that survives a `kill -9`.

    The file holds `gpu_seconds` (of all parts) and, for a run that ended after a save, the `step` of that save and the
    `parts`. It is replaced atomically but not flushed: after a loss of power its last seconds may be missing. A process
    that is killed before its first write, while it imports torch, is not counted.

    Args:
        every: seconds between two writes.
        writable: where it returns False, nothing is written: the folder is gone, or another run's.
    """

    def __init__(self, folder: Path, ledger: Ledger, every: float, writable: Callable[[], bool] = lambda: True) -> None:
        self.path, self.ledger, self.every, self._writable = folder / HELD, ledger, every, writable
        self._end = threading.Event()
        self._write({})
        self._thread = threading.Thread(target=self._beat, name="std_fast-heartbeat", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._end.wait(self.every):
            try:
                self._write({})
            except OSError as error:  # a full disk must not end the training
                log.debug("%s: %s", self.path, error)

    def _write(self, more: dict[str, Any]) -> None:
        record = {"gpu_seconds": self.ledger.held * self.ledger.devices, **more}
        if self._writable():
            write_atomic(self.path, json.dumps(record))

    def stop(self, step: int | None) -> None:
        """The last write. `step`: all steps up to it are saved, so nothing is lost; None: any other end."""
        if self._end.is_set():
            return
        self._end.set()
        self._thread.join()
        parts = {part: value * self.ledger.devices for part, value in self.ledger.read().items()}
        try:
            self._write({} if step is None else {"step": step, "parts": parts})
        except OSError as error:
            log.warning("%s: cannot be written (%s); its last seconds are not counted", self.path, error)


def earlier(folder: Path, step: int, saved: Mapping[str, float]) -> dict[str, float]:
    """GPU-seconds, by part, that a run's earlier processes held; what was held after the save counts as "lost".

    Args:
        step: step number of the checkpoint that the run continues from; 0 without one.
        saved: GPU-seconds by part in that checkpoint.
    """
    try:
        beat = read_json(folder / HELD)
        seconds = float(beat["gpu_seconds"])
        if beat.get("step") == step:
            return {part: float(beat["parts"][part]) for part in PARTS}
    except FileNotFoundError:
        seconds = 0.0
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s: cannot be read (%r): time after the last save is not counted", folder / HELD, error)
        seconds = 0.0
    parts = dict.fromkeys(PARTS, 0.0) | dict(saved)
    lost = max(0.0, seconds - sum(parts.values()))
    return parts | {"lost": parts["lost"] + lost}


class Clock:
    """Progress of a training: by steps, or by the share of a GPU-hour budget that is spent.

    With a budget, the learning rate follows the hours and not the steps: a slow disk shortens the training but leaves
    it annealed. The cost of the last evaluation and save is reserved. Start, compilation and time lost to a
    crash do not move the learning rate; they shorten the rest, so that warm-up and decay are always complete:

        share = (spent - unplanned) / (budget - reserve - unplanned)

    With many processes rank 0's `read` decides: the loop assigns it to `share` on all ranks before each step.

    Args:
        length: how long the training is.
        batch: images per step over all ranks.
        costs: those that an interrupted run has measured.
    """

    def __init__(
        self, length: Duration, steps_per_epoch: int, batch: int, ledger: Ledger, costs: Mapping[str, float] = {}
    ) -> None:
        self.ledger, self.length = ledger, length
        self.hours = length.amount if length.unit == "gpu-hours" else None
        self.steps = None if self.hours else max(1, length.steps(steps_per_epoch, batch))
        self.costs = dict(costs)
        """GPU-hours that the last evaluation and save took"""
        self.share = 0.0
        """of a budget, spent after the next step, the same on all ranks"""
        self._last_step: int | None = None
        self._read = 0.0
        self._step_seconds = 0.0
        self._timed_steps = 0
        self._before = productive_seconds(ledger.read())
        self._in_flight: deque[torch.cuda.Event] = deque()

    def start(self, world: World) -> None:
        """Before the first step: `share` on all ranks, with a warning where nothing is left of a budget."""
        self.share = world.broadcast(self.read())
        if self.share >= 1:
            spent = in_words(self.ledger.read())
            log.warning("run.length: %s are spent before the first step (%s): there will be one", self.length, spent)

    def limit_steps_ahead(self, device: torch.device) -> None:
        """After each step is launched: with a budget the host stays at most two steps ahead of a GPU, so that the hours
        are the device's. The device always has a full step left to do while the host waits."""
        if self.hours is None or device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record()
        self._in_flight.append(event)
        if len(self._in_flight) > 2:
            self._in_flight.popleft().synchronize()

    def cost(self, part: str, seconds: float | None) -> None:
        """Takes the seconds of the last evaluation or save as the estimate for the one at the end; None: not known."""
        if seconds is not None:
            self.costs[part] = seconds * self.ledger.devices / 3600

    @property
    def reserve(self) -> float:
        """GPU-hours reserved for the end: evaluation, save, a margin of a quarter (at most 1 % of all), closing."""
        known = sum(self.costs.values())
        return known + min(0.25 * known, 0.01 * (self.hours or 0.0)) + CLOSING * self.ledger.devices / 3600

    def read(self) -> float:
        """Share of the budget spent when two more steps will be; at 1 the next step is the last. Call once a step.

        0 for a training that has no budget.
        """
        if self.hours is None:
            return 0.0
        seconds = self.ledger.read()
        productive = productive_seconds(seconds)
        if productive > self._before:  # the mean, then a moving one
            self._timed_steps += 1
            rate = max(0.1, 1 / self._timed_steps)
            self._step_seconds += rate * (productive - self._before - self._step_seconds)
            self._before = productive
        per_hour = self.ledger.devices / 3600
        unplanned = sum(seconds[part] for part in UNPLANNED) * per_hour
        spent = sum(seconds.values()) * per_hour + 2 * self._step_seconds * per_hour
        end = self.hours - self.reserve
        now = (spent - unplanned) / (end - unplanned) if spent < end else 1.0
        self._read = max(self._read, now)  # the estimate may shrink; the learning rate must not rise again
        return self._read

    def fits(self, part: str) -> bool:
        """Whether one more evaluation or save after the next step leaves time for those at the end."""
        if self.hours is None:
            return True
        after = self.ledger.gpu_hours + self.costs.get(part, 0.0)
        return after + 3 * self._step_seconds * self.ledger.devices / 3600 < self.hours - self.reserve

    def progress(self, step: int) -> float:
        """Share of the training that is done when step number `step` (from 1) is, in (0, 1].

        0 for the first step of a budget, which so has learning rate 0: before a step has been timed, its share of the
        hours is not known. With several processes also for the second, since rank 0's `read` comes a step late.
        """
        if self.steps is not None:
            return min(1.0, step / self.steps)
        if self.share >= 1:
            self._last_step = step
        return min(1.0, self.share)

    def done(self, step: int) -> bool:
        """Whether `step` steps are the complete training."""
        return step >= self.steps if self.steps is not None else self._last_step is not None
