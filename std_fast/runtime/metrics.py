"""Meters on the device, read only when a line is logged; JSONL, TensorBoard and a progress line."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.files import write_atomic
from std_fast.runtime.distributed import SINGLE_PROCESS, World

log = logging.getLogger("std_fast")


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
        """Means since the last read, over all ranks, each of which must ask; starts anew. What was always left out has
        none."""
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


class Board:
    """Scalars in TensorBoard's file format, by its own record writer. Its SummaryWriter would write in a thread, where
    a full disk ends in a traceback, and the metrics in nothing.

    Raises ImportError without TensorBoard, OSError when the file cannot be written.
    """

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        """purge_step: what earlier files hold from this step on is void."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{platform.node()}.{os.getpid()}"
        self._records = RecordWriter(open(folder / name, "ab"))
        self._write(file_version="brain.Event:2")
        if purge_step is not None:
            self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._records.flush()

    def add(self, values: dict[str, float], step: int) -> None:
        values_of = self._summary.Value
        summary = self._summary(value=[values_of(tag=tag, simple_value=value) for tag, value in values.items()])
        self._write(step=step, summary=summary)

    def close(self) -> None:
        self._records.close()


class Journal:
    """The run's record: `metrics.jsonl` (one JSON object a line) and TensorBoard's files beside it.

    Every record has `step`, `samples`, `epoch` and `time` (Unix seconds) and a `kind`: "train", "eval" or "end".
    """

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        self.path = folder / "metrics.jsonl"
        kept = [r for r in read_jsonl(self.path) if r["step"] <= resume_step] if resume_step else []
        # what was logged after the checkpoint is about to be logged again
        write_atomic(self.path, "".join(json.dumps(r) + "\n" for r in kept))
        self._file = open(self.path, "a", encoding="utf-8")
        self._board: Board | None = None
        try:
            self._board = Board(folder / "tensorboard", resume_step + 1 if resume_step else None)
        except ImportError:
            log.warning("TensorBoard is not installed, metrics go to %s only: pip install tensorboard", self.path)

    def write(self, kind: str, record: dict[str, Any]) -> None:
        """`record` needs `step`; metrics also go to TensorBoard as `kind/name`."""
        record = {"kind": kind, "time": round(time.time(), 3), **record}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            numbers = {name: value for name, value in record.items() if isinstance(value, (int, float))}
            named = {f"{kind}/{name}": value for name, value in numbers.items() if name not in ("step", "time")}
            self._board.add(named, record["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


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


LINE_SECONDS, LINE_SHARE, LINE_GAP = 10.0, 0.05, 1.0


class Progress:
    """A progress bar on a terminal, plain lines elsewhere. Everything goes to standard error.

    Away from a terminal a line is printed at the beginning and at the end, and between them when LINE_SECONDS have
    passed since the last one, or LINE_SHARE of the total is done since then and LINE_GAP seconds have passed.
    """

    def __init__(
        self,
        what: str,
        total: float,
        unit: str,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """clock: seconds, for tests."""
        self.what, self.total, self.unit, self.quiet = what, total, unit, quiet
        self._clock = clock
        self._printed: tuple[float, float] | None = None  # when the last line was printed, and how much was done
        self._bar = None
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
                transient=False,
            )
            self._bar.start()
            self._task = self._bar.add_task(what, total=total, note="")

    def update(self, done: float) -> None:
        """Moves the bar; nothing elsewhere."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def note(self, done: float, text: str) -> None:
        """A line of the log: beside the bar on a terminal; elsewhere a line of its own, where one is due."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=text)
        elif not self.quiet and self._line_due(done):
            print(f"{self.what} {done:g}/{self.total:g} {self.unit}  {text}", file=sys.stderr, flush=True)

    def _line_due(self, done: float) -> bool:
        now = self._clock()
        if self._printed is not None and not 0 < self.total <= done:
            seconds, amount = now - self._printed[0], done - self._printed[1]
            if seconds < LINE_SECONDS and (not 0 < LINE_SHARE * self.total <= amount or seconds < LINE_GAP):
                return False
        self._printed = now, done
        return True

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        elif not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
