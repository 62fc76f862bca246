"""`gpu_suite --smoke`: every benchmark that a GPU session would run, at tiny sizes, by the same code."""

import json
import math
import runpy
import sys

from benchmarks import gpu_suite, harness
from tests.killing import Child
from tests.small_runs import small_study

ATTEMPT = gpu_suite.attempt


def run_module(*words: str) -> None:
    """`python -m WORDS`, in this process."""
    sys.argv[:] = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def attempt(part, limit, folder):
    """The suite's own for the study; the others run in processes that are forked with torch imported already."""
    if part.question == "evidence":
        return ATTEMPT(part, limit, folder)
    with Child([*part.words, "--json"], folder / f"{part.name}.said", target=run_module) as child:
        assert child.wait(limit) == 0, child.text
        return {"state": "ok", "seconds": 0.0, "report": harness.printed_report(child.text)}


def test_smoke_runs_every_benchmark(image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_suite, "attempt", attempt)
    study = [*small_study(tmp_path, image_folder), str(tmp_path / "work")]
    assert gpu_suite.main(["--smoke", "--out", str(tmp_path), "--study", *study]) == 0
    shown = capsys.readouterr().out
    (path,) = tmp_path.glob("gpu_suite-*-smoke.json")
    found = json.loads(path.read_text())
    assert set(found["parts"]) == {part.question for part in gpu_suite.PARTS if part.question}
    runs = found["parts"].pop("evidence")["report"]["runs"]
    assert [run["job"] for run in runs] == [gpu_suite.SMOKE_RUN] and runs[0]["predictions"]["labels"]
    (kept,) = tmp_path.glob("study-*-smoke.json")
    assert json.loads(kept.read_text())["runs"] == runs
    for name, part in found["parts"].items():
        report = part["report"]
        assert part["state"] == "ok" and report["question"] == name
        assert report["conditions"]["versions"]["torch"] and report["settings"]["smoke"] is True
        assert report["rows"], name
        for row in report["rows"]:
            if "milliseconds" in row:
                assert 0 < row["milliseconds"]["lower_quartile"] <= row["milliseconds"]["upper_quartile"], (name, row)
            else:
                assert math.isfinite(row["estimate_nats"])
            assert f"    {row['name']}: " in shown
        assert all(ratio["ratio"]["median"] > 0 for ratio in report.get("ratios", ()))
        assert f"{name}: ok" in shown
    rows = {name: {row["name"] for row in part["report"]["rows"]} for name, part in found["parts"].items()}
    assert rows["peers"] >= {f"{one}, eager" for one in ("STD, ours", "STD, naive", "plain, ours", "plain, timm")}
    assert rows["peers"] >= {"STD, ours, compiled", "plain, timm, compiled"}
    assert rows["kernels"] >= {"STD, naive", "STD, algebra", "STD, algebra, compiled", "MINE, algebra, compiled"}
    assert rows["overlap"] == {"serial", "concurrent", "student alone", "teachers alone"}
    assert rows["end_to_end"] == {"from disk", "data on the device"}
