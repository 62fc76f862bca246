"""`gpu_suite --smoke`: every benchmark that a GPU session would run, at tiny sizes, by the same code."""

import json
import math
import subprocess
import sys

from benchmarks import gpu_suite, harness
from tests.small_runs import small_study


def test_smoke_runs_every_benchmark(image_folder, tmp_path):
    study = [*small_study(tmp_path, image_folder), str(tmp_path / "work")]
    words = [sys.executable, "-m", "benchmarks.gpu_suite", "--smoke", "--out", str(tmp_path), "--study", *study]
    done = subprocess.run(words, cwd=harness.ROOT, capture_output=True, text=True, timeout=900)
    log = (tmp_path / "gpu_suite.log").read_text()
    assert done.returncode == 0, done.stdout + log
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
            assert f"    {row['name']}: " in done.stdout
        assert all(ratio["ratio"]["median"] > 0 for ratio in report.get("ratios", ()))
        assert f"{name}: ok" in done.stdout
    rows = {name: {row["name"] for row in part["report"]["rows"]} for name, part in found["parts"].items()}
    assert rows["peers"] >= {f"{one}, eager" for one in ("STD, ours", "STD, naive", "plain, ours", "plain, timm")}
    assert rows["peers"] >= {"STD, ours, compiled", "plain, timm, compiled"}
    assert rows["kernels"] >= {"STD, naive", "STD, algebra", "STD, algebra, compiled", "MINE, algebra, compiled"}
    assert rows["overlap"] == {"serial", "concurrent", "student alone", "teachers alone"}
    assert rows["end_to_end"] == {"from disk", "data on the device"}
