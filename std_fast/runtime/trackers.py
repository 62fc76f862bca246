"""Experiment trackers (`run.trackers`), each behind `log` and `close`. A package is imported where it is used."""

from __future__ import annotations

import functools
import importlib.util
import io
import os
import platform
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pipelines.errors import UserError
from pipelines.files import AppendFile, write_atomic
from std_fast.runtime.write_faults import WriteFaults

PROJECT = "std_fast"
"""of a run there, or its experiment, unless the package's environment variable names another one"""
OPEN_SECONDS, CLOSE_SECONDS = 60, 60
MOST_WAITING = 10_000  # records


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
        name = f"events.out.tfevents.{int(time.time())}.{platform.node()}.{os.getpid()}"
        head = self._record(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if resume_step:
            start = SessionLog(status=SessionLog.START)
            head += self._record(Event(wall_time=time.time(), step=resume_step + 1, session_log=start))
        self._file = AppendFile(folder / name, head)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        value = self._summary.Value
        summary = self._summary(value=[value(tag=tag, simple_value=number) for tag, number in metrics.items()])
        self._file.append(self._record(self._event(wall_time=time.time(), step=step, summary=summary)))

    @staticmethod
    def _record(event: Any) -> bytes:
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        return record.getvalue()

    def close(self, finished: bool) -> None:
        self._file.close()


class WandB:
    """Weights & Biases; `WANDB_PROJECT`, `WANDB_MODE=offline` and the package's other variables hold."""

    def __init__(self, folder: Path, config: dict[str, Any], run_id: str) -> None:
        import wandb

        settings = wandb.Settings(console="off")  # it would come between the progress bar and the terminal
        if hasattr(settings, "finish_timeout") and "WANDB_FINISH_TIMEOUT" not in os.environ:
            settings.finish_timeout = CLOSE_SECONDS
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", config["name"] or folder.name),
            dir=os.environ.get("WANDB_DIR", folder),
            id=run_id,
            resume="allow",
            config=config,
            allow_val_change=True,  # of what a resumed run may change
            settings=settings,
        )
        # not its own step, which cannot go back: a resumed run logs steps after its checkpoint again
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """MLflow; `MLFLOW_TRACKING_URI` and `MLFLOW_EXPERIMENT_NAME` hold."""

    def __init__(self, folder: Path, config: dict[str, Any], run_id: str) -> None:
        """run_id: "" for a new run."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = client = MlflowClient()
        self.run_id = run_id
        if run_id:
            client.update_run(run_id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else client.create_experiment(name)
        self.run_id = client.create_run(experiment, run_name=config["name"] or folder.name).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in flat(config).items()]
        for first in range(0, len(params), 100):  # the most that it takes at once
            client.log_batch(self.run_id, params=params[first : first + 100])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self.run_id, [Metric(name, value, now, step) for name, value in metrics.items()])

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.run_id, "FINISHED" if finished else "KILLED")


class Trackio:
    """trackio; `TRACKIO_PROJECT`, `TRACKIO_SPACE_ID` and the package's other variables hold."""

    def __init__(self, folder: Path, config: dict[str, Any], run_id: str) -> None:
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        name = f"{config['name'] or folder.name}-{run_id}"  # by which it finds a run
        self._run = trackio.init(project=project, name=name, config=config, resume="allow")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, finished: bool) -> None:
        self._run.finish()


class InBackground:
    """A tracker that may wait for a network, in a thread of its own: the training does not wait for it, but for at most
    OPEN_SECONDS when it is opened (a login may be typed) and CLOSE_SECONDS at the end."""

    def __init__(self, name: str, open_tracker: Callable[[], Tracker], faults: WriteFaults) -> None:
        self._name, self._open, self._faults = name, open_tracker, faults
        self._jobs: queue.SimpleQueue[tuple[int, Mapping[str, float]] | bool] = queue.SimpleQueue()
        self._opened = threading.Event()
        # a daemon: one that hangs does not keep the process
        self._thread = threading.Thread(target=self._work, name=f"std_fast-{name}", daemon=True)
        self._thread.start()
        self._opened.wait(OPEN_SECONDS)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._jobs.qsize() >= MOST_WAITING:
            raise TimeoutError(f"{MOST_WAITING} records wait for it")
        self._jobs.put((step, metrics))

    def close(self, finished: bool) -> None:
        self._jobs.put(finished)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            raise TimeoutError(f"not done after {CLOSE_SECONDS} s")

    def _work(self) -> None:
        tracker: Tracker | None = None
        with self._faults.counted(self._name):
            tracker = self._open()
        self._opened.set()
        while not isinstance(job := self._jobs.get(), bool):
            with self._faults.counted(self._name):
                if tracker is None:
                    raise ConnectionError("it was not opened")
                tracker.log(*job)
        if tracker is not None:
            with self._faults.counted(self._name):
                tracker.close(job)


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError for a tracker whose package is not installed."""
    for name in names:
        lacks = "" if importlib.util.find_spec(name) else "is not installed"
        if name == "mlflow" and not lacks and "MLFLOW_TRACKING_URI" not in os.environ:
            # its default is an SQLite file, which mlflow-skinny cannot write
            lacks = "" if importlib.util.find_spec("sqlalchemy") else "needs MLFLOW_TRACKING_URI, or the full package"
        if lacks:
            others = ", ".join(other for other in names if other != name)
            raise UserError(f"run.trackers: {name} {lacks}: pip install {name}, or --run.trackers '[{others}]'")


def open_trackers(
    names: Sequence[str], folder: Path, config: dict[str, Any], resume_step: int, faults: WriteFaults
) -> dict[str, Tracker]:
    """The trackers of a run, by name. A run that continues from a step continues in the same run of each tracker, by
    the id that is kept in the run's folder as `trackers/NAME.id`.

    Args:
        config: the resolved recipe, as plain values.
        faults: counts what fails, opening included.
    """
    trackers: dict[str, Tracker] = {}
    for name in names:
        if name == "tensorboard":
            trackers[name] = TensorBoard(folder / "tensorboard", resume_step)
        else:
            opening = functools.partial(_open, name, folder, config, resume_step)
            trackers[name] = InBackground(name, opening, faults)
    return trackers


def _open(name: str, folder: Path, config: dict[str, Any], resume_step: int) -> Tracker:
    path = folder / "trackers" / f"{name}.id"
    known = path.read_text(encoding="ascii").strip() if resume_step and path.is_file() else ""
    if name == "mlflow":
        tracker: Tracker = (mlflow := MLflow(folder, config, known))
        run_id = mlflow.run_id
    else:
        run_id = known or secrets.token_hex(4)
        tracker = (WandB if name == "wandb" else Trackio)(folder, config, run_id)
    if run_id != known:
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, run_id + "\n")
    return tracker


def flat(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """`{"run": {"batch": 8}}` -> `{"run.batch": 8}`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{where}{key}.") if isinstance(value, Mapping) and value else {f"{where}{key}": value}
    return found
