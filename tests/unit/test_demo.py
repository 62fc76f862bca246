"""The demo's interruption, and its table in the pages: that of the result file that is kept."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from std_fast.commands import demo
from std_fast.training.run import Stopped

ROOT = Path(__file__).resolve().parents[2]


def test_the_pages_show_the_result_file_that_is_kept():
    (path,) = (ROOT / "benchmarks" / "results").glob("demo-*.json")
    kept = json.loads(path.read_text())
    rows = {name: [{"summary": run} for run in runs] for name, runs in kept["rows"].items()}
    lines = demo.text(rows, Path("runs/demo"), kept["seconds"]).splitlines()
    table, gain = lines[:4], lines[5:7]
    page = (ROOT / "benchmarks" / "demo.md").read_text()
    assert path.name in page and "".join(f"    {line}\n" for line in table) in (ROOT / "README.md").read_text()
    assert "".join(f"    {line}\n" for line in (*table, "", *gain)).replace("    \n", "\n") in page


def test_ctrl_c_begins_no_further_run(tmp_path, monkeypatch):
    """A pool of threads in place of processes: the first student is interrupted, five others wait."""
    begun, asked = [], []

    def one_run(recipe, folder, seed, overrides):
        begun.append((recipe, seed))
        if recipe == "digits_teacher":
            summary = {"seed": 0, "result": {"top1": 1.0}, "seconds": {}}
            return {"summary": summary, "evals": []}
        if len(begun) > 2:
            asked[0].wait(5)  # busy until it is asked to stop
        raise KeyboardInterrupt

    def pool(workers, context, initializer, initargs):
        asked.extend(initargs)
        return ThreadPoolExecutor(1)

    for part in ("train", "val"):
        (tmp_path / "images" / part).mkdir(parents=True)
        (tmp_path / f"{part}.beton").touch()
    monkeypatch.setattr(demo, "one_run", one_run)
    monkeypatch.setattr(demo, "ProcessPoolExecutor", pool)
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(tmp_path, 3)
    assert begun[:2] == [("digits_teacher", 0), ("digits_mixer", 0)] and len(begun) <= 3 and asked[0].is_set()


def test_a_worker_that_is_stopped_trains_no_further_run(tmp_path, monkeypatch):
    def stop(recipe, resume, quiet):
        begun.append(recipe)
        raise Stopped

    begun = []
    monkeypatch.setattr(demo.one_run, "stopped", threading.Event(), raising=False)
    monkeypatch.setattr(demo, "train", stop)
    for _ in range(2):
        with pytest.raises(Stopped):
            demo.one_run("digits_mixer", tmp_path / "run", 0, [])
    assert len(begun) == 1
