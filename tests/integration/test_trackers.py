"""Trackers: a run that is stopped and resumed is one run there, with the metrics of metrics.jsonl; none of their
failures ends a training. Weights & Biases offline, MLflow with its file store, trackio by a stand-in of its API."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.errors import UserError
from std_fast.runtime import trackers
from std_fast.runtime.metrics import read_jsonl
from std_fast.runtime.write_faults import WriteFaults
from std_fast.training.train import train
from tests.small_runs import small_recipe, train_until

TRACKIO = """
import json, os
def init(project, name=None, config=None, resume="never", **more):
    return Run(dict(project=project, name=name, config=config, resume=resume))
class Run:
    def __init__(self, about):
        self.write(init=about)
    def log(self, metrics, step=None):
        if os.environ.get("TRACKIO_FAILS"):
            raise ConnectionError("no route to host")
        self.write(step=step, metrics=metrics)
    def finish(self):
        self.write(finish=True)
    def write(self, **record):
        with open(os.environ["TRACKIO_FILE"], "a") as file:
            file.write(json.dumps(record) + "\\n")
"""

BLOCK = 1 << 15  # bytes


@pytest.fixture
def recipe(image_folder, tmp_path, monkeypatch):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "trackio.py").write_text(TRACKIO)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.setenv("TRACKIO_FILE", str(tmp_path / "trackio.jsonl"))
    run = {"length": "3 epochs", "eval_every": "1 epoch", "save_every": "10 minutes"}
    return replace(small_recipe(image_folder, tmp_path / "run", run=run), name="small")


def of(recipe, *names):
    return replace(recipe, run=replace(recipe.run, trackers=names))


def stopped_and_resumed(recipe):
    """Stopped after step 5, of which step 4 was the last that is logged; its summary."""
    train_until(recipe, 5)
    return train(recipe, resume=True, quiet=True)


def expected(folder):
    """(step, loss) of each train record."""
    return [(r["step"], r["loss"]) for r in read_jsonl(Path(folder) / "metrics.jsonl") if r["kind"] == "train"]


def test_mlflow(recipe, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    summary = stopped_and_resumed(of(recipe, "mlflow"))
    assert summary["lost_writes"] == {}
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("std_fast").experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "small")
    assert (run.data.params["run.batch"], run.data.params["student.name"]) == ("8", "mixer")
    logged = sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss"))
    assert logged == expected(recipe.run.out)
    assert run.data.metrics["eval/top1"] == summary["result"]["top1"]


def test_weights_and_biases(recipe, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    summary = stopped_and_resumed(of(recipe, "wandb"))
    assert summary["lost_writes"] == {}
    wandb.teardown()  # waits until its service has written all
    run_id = (tmp_path / "run" / "trackers" / "wandb.id").read_text().strip()
    runs = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}*"))  # wandb adds "-1" within a second
    assert len(runs) == 2  # `wandb sync` makes one run of them, by their id
    records = [record for run in runs for record in stored(next(run.glob("*.wandb")))]
    assert [(r["step"], r["train/loss"]) for r in records if "train/loss" in r] == expected(recipe.run.out)
    assert b"patch_size" in next(runs[0].glob("*.wandb")).read_bytes()  # the configuration


def stored(path):
    """The history in a file of an offline run: LevelDB's log format behind 7 bytes, of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := BLOCK - at % BLOCK) < 7:  # too few bytes of the block for a header
            at += room
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a complete record, or the last part of one
            record, parts = Record.FromString(parts), b""
            if record.WhichOneof("record_type") == "history":
                yield {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}


def test_trackio(recipe, tmp_path):
    summary = stopped_and_resumed(of(recipe, "tensorboard", "trackio"))
    assert summary["lost_writes"] == {}
    records = read_jsonl(tmp_path / "trackio.jsonl")
    one, two = (r["init"] for r in records if "init" in r)
    assert one == two and (one["project"], one["resume"]) == ("std_fast", "allow") and one["name"].startswith("small-")
    assert one["config"]["student"]["options"]["dim"] == 16
    found = [(r["step"], r["metrics"]["train/loss"]) for r in records if "train/loss" in r.get("metrics", {})]
    assert found == expected(recipe.run.out)
    assert records[-1] == {"finish": True}
    train(replace(of(recipe, "trackio"), run=replace(of(recipe, "trackio").run, out=f"{tmp_path}/other")), quiet=True)
    assert [r["init"] for r in read_jsonl(tmp_path / "trackio.jsonl") if "init" in r][2]["name"] != one["name"]


def test_a_tracker_that_fails_ends_no_training(recipe, monkeypatch, caplog):
    monkeypatch.setenv("TRACKIO_FAILS", "1")
    summary = train(of(recipe, "trackio"), quiet=True)
    assert summary["steps"] == 9 and summary["lost_writes"]["trackio"] >= 4
    assert [r.message for r in caplog.records if "trackio" in r.message][0].startswith(
        "trackio: cannot be written (no r"
    )


def test_a_tracker_that_cannot_be_opened_ends_no_training(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_FILE", str(tmp_path / "nowhere" / "file"))
    assert train(of(recipe, "trackio"), quiet=True)["lost_writes"]["trackio"] >= 4


def test_a_tracker_that_hangs_is_left_behind(monkeypatch):
    """Neither `log` nor the end of the run waits for it."""
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.05)
    monkeypatch.setattr(trackers, "MOST_WAITING", 3)
    faults, never = WriteFaults(), threading.Event()

    class Hanging:
        def log(self, step, metrics):
            never.wait(60)

        def close(self, finished):
            raise AssertionError

    tracker = trackers.InBackground("hanging", Hanging, faults)
    for step in range(10):
        with faults.counted("hanging"):
            tracker.log(step, {})
    with faults.counted("hanging"):
        tracker.close(True)
    assert 6 <= faults.counts["hanging"] - 1 <= 7  # three wait, one may have been begun
    never.set()


def test_what_is_not_installed_is_named_with_the_way_to_get_it(recipe, monkeypatch):
    kept = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trackio" else kept(name))
    with pytest.raises(
        UserError, match=r"trackio is not installed: pip install trackio, or --run.trackers '\[wandb\]'$"
    ):
        train(of(recipe, "wandb", "trackio"), quiet=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sqlalchemy" else kept(name))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="mlflow needs MLFLOW_TRACKING_URI"):
        train(of(recipe, "mlflow"), quiet=True)


def test_trackers_are_imported_where_they_are_used():
    code = "import sys, std_fast.training.run; print(*{'wandb', 'mlflow', 'trackio', 'tensorboard'} & set(sys.modules))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("\n", 0)
