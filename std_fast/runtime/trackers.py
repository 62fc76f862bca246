"""Experiment trackers (`run.trackers`), each behind `log` and `close`. A package is imported where it is used."""

from __future__ import annotations

import io
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pipelines.files import AppendFile


class Tracker(Protocol):
    """Where metrics go beside `metrics.jsonl`. Methods may raise anything: the caller counts it."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self, finished: bool) -> None:
        """finished: the training is complete; otherwise it was stopped and may be resumed."""


class TensorBoard:
    """Scalars in TensorBoard's file format, by its own record writer. Its SummaryWriter would write in a thread, where
    a full disk ends in a traceback, and the metrics in nothing."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        """resume_step: what earlier files hold of later steps is void."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._event, self._summary = Event, Summary
        self._path = folder / f"events.out.tfevents.{int(time.time())}.{platform.node()}.{os.getpid()}"
        self._file: AppendFile | None = None
        self._first = [Event(wall_time=time.time(), file_version="brain.Event:2")]
        if resume_step:
            start = SessionLog(status=SessionLog.START)
            self._first.append(Event(wall_time=time.time(), step=resume_step + 1, session_log=start))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        value = self._summary.Value
        summary = self._summary(value=[value(tag=tag, simple_value=number) for tag, number in metrics.items()])
        self._append([self._event(wall_time=time.time(), step=step, summary=summary)])

    def _append(self, events: list[Any]) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = AppendFile(self._path)
        records = io.BytesIO()
        for event in self._first + events:
            RecordWriter(records).write(event.SerializeToString())
        self._file.append(records.getvalue())
        self._first = []

    def close(self, finished: bool) -> None:
        if self._file is not None:
            self._file.close()
