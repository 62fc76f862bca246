"""Meters on the device, read only when a line is logged; `metrics.jsonl` and a progress line."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TextIO, cast

import torch
from torch import Tensor

from pipelines.files import AppendFile, write_atomic
from std_fast.runtime.distributed import SINGLE_PROCESS, World
from std_fast.runtime.trackers import Tracker
from std_fast.runtime.write_faults import WriteFaults


class Meters:
    """Sums of scalars on the device. `add` never makes the host wait; `read` does, once for all of them."""

    def __init__(self, world: World = SINGLE_PROCESS) -> None:
        self.world = world
        self.steps = 0  # added since the last read, those that were left out included
        self._sums: dict[tuple[str, ...], Tensor] = {}  # of the steps with just these names: sums, and how many

    @torch.no_grad()
    def add(self, values: dict[str, Tensor], left_out: Tensor) -> None:
        """Adds one value a name (float tensors of no dimension), unless `left_out` is 1."""
        self.steps += 1
        names = tuple(values)
        row = torch.stack([*(value.detach().float() for value in values.values()), 1 - left_out])
        row = torch.where(left_out > 0, 0.0, row)
        self._sums[names] = self._sums[names] + row if names in self._sums else row

    def read(self) -> dict[str, float]:
        """Means since the last read, over all ranks, each of which must call it; then starts anew. A name whose values
        were all left out is missing."""
        kinds, self.steps = self._sums, 0
        self._sums = {}
        if not kinds:
            return {}
        rows = iter((self.world.sum(torch.cat(list(kinds.values()))) / self.world.size).tolist())
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for names in kinds:
            values = [next(rows) for _ in names]
            count = next(rows)
            for name, value in zip(names, values, strict=True):
                sums[name] = sums.get(name, 0.0) + value
                counts[name] = counts.get(name, 0.0) + count
        return {name: value / counts[name] for name, value in sums.items() if counts[name]}


class Journal:
    """The run's record: `metrics.jsonl` (one JSON object a line) and its trackers.

    Every record has `step`, `samples`, `epoch` and `time` (Unix seconds) and a `kind`: "train", "eval" or "end". What
    cannot be written is counted in `faults`; a later record is tried again.
    """

    def __init__(
        self, folder: Path, resume_step: int, trackers: dict[str, Tracker], faults: WriteFaults, evaluates: bool = False
    ) -> None:
        """resume_step: what was logged after it is removed, since it will be logged again.

        evaluates: the run begins with an evaluation of `resume_step`: what is logged of an earlier one is removed too.
        """
        self.path, self.faults, self.trackers = folder / "metrics.jsonl", faults, trackers
        self._resume_step, self._evaluates, self._finished = resume_step, evaluates, False
        self._file: AppendFile | None = None
        with faults.counted(self.path.name):
            self._open()

    def _open(self) -> AppendFile:
        if self._file is None:
            records = read_jsonl(self.path) if self._resume_step else []
            kept = [r for r in records if isinstance(r, dict) and self._stays(r)]
            write_atomic(self.path, "".join(json.dumps(r) + "\n" for r in kept))
            self._file = AppendFile(self.path)
        return self._file

    def _stays(self, record: dict) -> bool:
        """Whether the resumed run will not log it again."""
        step = record.get("step", math.inf)
        again = self._evaluates and step == self._resume_step and record.get("kind") in ("eval", "end")
        return step <= self._resume_step and not again

    def write(self, kind: str, record: dict[str, Any]) -> None:
        """`record` needs `step`; its numbers also go to the trackers, as `kind/name`."""
        record = {"kind": kind, "time": round(time.time(), 3), **record}
        with self.faults.counted(self.path.name):
            self._open().append((json.dumps(record) + "\n").encode())
        numbers = {name: value for name, value in record.items() if isinstance(value, (int, float))}
        metrics = {f"{kind}/{name}": value for name, value in numbers.items() if name not in ("step", "time")}
        for name, tracker in self.trackers.items():
            with self.faults.counted(name):
                tracker.log(record["step"], metrics)
        self._finished |= kind == "end"

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        for name, tracker in self.trackers.items():
            with self.faults.counted(name):
                tracker.close(self._finished)


def read_jsonl(path: Path) -> list[dict]:
    """Records of a journal; a last line that a crash cut short is left out. Empty when there is no file."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            break
    return records


FIRST_LINES, LINE_SECONDS, LINE_SHARE, LINE_GAP = 2, 10.0, 0.05, 1.0
SILENT_SECONDS = 20.0
STDERR = "standard error"


class CountingStream:
    """A text stream whose writes raise nothing: errors, as of a terminal that is gone, are counted. For rich, which
    also writes in a thread of its own."""

    def __init__(self, stream: TextIO, faults: WriteFaults) -> None:
        self._stream, self._faults = stream, faults

    def write(self, text: str) -> int:
        with self._faults.counted(STDERR):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._faults.counted(STDERR):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def three_digits(value: float) -> str:
    """`0.412`, `41.2`, `1234`: three significant digits, all those before the point, four after it at most."""
    return f"{round(value, 4):.3g}" if value < 100 else f"{value:.0f}"


class Progress:
    """A progress bar on a terminal, plain lines elsewhere, on standard error; what cannot be written there is counted.

    Away from a terminal the first FIRST_LINES and the last are printed, and between them a line when LINE_SECONDS have
    passed since the last one, or LINE_SHARE of the total is done since then and LINE_GAP seconds have passed. Where
    nothing was printed for SILENT_SECONDS, `update` prints how much is done.
    """

    def __init__(
        self,
        what: str,
        total: float,
        unit: str,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
        faults: WriteFaults | None = None,
    ) -> None:
        """clock: seconds, for tests."""
        self.what, self.total, self.unit, self.quiet = what, total, unit, quiet or sys.stderr is None
        self._clock, self._faults = clock, faults or WriteFaults()
        self._printed = (0.0, 0.0)  # when the last line was printed, and how much was done
        self._lines = 0
        self._quiet_since = clock()
        self._bar = None
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar
            from rich.table import Column

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(8),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn(
                    "{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True)
                ),  # the only one that is cut
                expand=True,
                console=Console(file=cast(IO[str], CountingStream(sys.stderr, self._faults))),
                transient=False,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._place(0), total=total, note="")

    def update(self, done: float, text: str = "") -> None:
        """Moves the bar; elsewhere a line, with this text, after SILENT_SECONDS without one."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=self._place(done))
        elif not self.quiet and self._clock() - self._quiet_since > SILENT_SECONDS:
            self._print(f"{self._place(done)}  {text}".rstrip())

    def _place(self, done: float) -> str:
        return f"{self.what} {round(done, 4):,.10g}/{self.total:,.10g} {self.unit}".rstrip()

    def note(self, done: float, text: str) -> None:
        """A line of the log: beside the bar on a terminal; elsewhere a line of its own, where one is due."""
        if self._bar is not None:
            self.update(done)
            self._bar.update(self._task, note=text)
        elif not self.quiet and self._line_due(done):
            self._print(f"{self._place(done)}  {text}".rstrip())

    def _line_due(self, done: float) -> bool:
        now = self._clock()
        if self._lines >= FIRST_LINES and not 0 < self.total <= done:
            seconds, amount = now - self._printed[0], done - self._printed[1]
            if seconds < LINE_SECONDS and (not 0 < LINE_SHARE * self.total <= amount or seconds < LINE_GAP):
                return False
        self._printed, self._lines = (now, done), self._lines + 1
        return True

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        elif not self.quiet:
            self._print(text)

    def _print(self, line: str) -> None:
        self._quiet_since = self._clock()
        with self._faults.counted(STDERR):
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
