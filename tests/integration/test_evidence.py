"""The evidence study at its smallest: real runs of every kind, stopped in between, collected, shown and drawn."""

import json
import math
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks import evidence, harness, study_sizes
from benchmarks import study as studies
from benchmarks.study_data import pack, unpack
from benchmarks.study_report import Group, deviations, difference
from tests.killing import Child
from tests.small_runs import small_recipe, small_study, write_recipe


class Forked(studies.Children):
    """Real processes, forked with torch imported already."""

    def __init__(self, stop_after: int = 1000) -> None:
        super().__init__(1)
        self.left = stop_after
        self.commands: list[list[str]] = []

    def run(self, command: list[str], log) -> tuple[int, str]:
        self.commands.append(command)
        module, argv = command[2], command[3:]
        target = evidence_main if module == "benchmarks.evidence" else None
        with Child(argv, Path(f"{log.name}.said"), target=target) as child:
            code, said = child.wait(), child.text
        self.left -= 1
        if self.left == 0:
            self.stop()  # what a signal does
        return code, said[said.find("{") :]


def evidence_main(*argv: str) -> None:
    sys.exit(evidence.command(list(argv)))


def test_a_study_stopped_and_gone_on_with(image_folder, tmp_path, capsys):
    work = tmp_path / "work"
    work.mkdir()
    source, teachers = small_study(tmp_path, image_folder)
    known = {"size": "smoke", "data": source, "teachers": teachers, "precision": "auto"}
    (work / "study.json").write_text(json.dumps(known))
    study = studies.Study("smoke", work, source, teachers, device="cpu")
    forever = time.monotonic() + 1e6
    first = Forked(stop_after=3)
    assert len(study.work_off(1, "*", forever, first)) == len(study.jobs) - 3
    assert sum(study.done(job) for job in study.jobs) == len(first.commands) == 3
    rest, seen = Forked(), []
    assert study.work_off(1, "*", forever, rest, lambda: seen.append(len(studies.collect(study)["runs"]))) == []
    assert seen[0] == 4 and seen[-1] == len(study.jobs) - 1  # what is known after each job; costs are no run
    assert len(first.commands) + len(rest.commands) == len(study.jobs) == 1 + 1 + 2 * 4

    report = studies.collect(study) | {"conditions": harness.conditions(), "missing": []}
    runs = {run["job"]: run for run in report["runs"]}
    costs = report["seconds_per_sample"]
    assert costs["C 16: STD"] > costs["C 16: plain"] > 0
    std, plain, equal = (runs[f"C-16-{name}-1"] for name in ("STD", "plain", "plain-STD-s-cost"))
    assert std["recipe"]["run"]["init_seed"] == 1 and std["recipe"]["run"]["seed"] == 0
    assert std["summary"]["samples"] == plain["summary"]["samples"] == 20  # 8 of each class, one held out
    # to the nearest step: as many samples as cost what STD's cost
    assert equal["summary"]["samples"] == pytest.approx(20 * costs["C 16: STD"] / costs["C 16: plain"], abs=4.01)
    assert runs["targets"]["summary"]["images"] == 20
    again = runs["C-16-no-tokens-0"]["recipe"]["distill"]
    assert again["target_cache"] == std["recipe"]["distill"]["target_cache"] != ""

    predictions = std["predictions"]
    labels = unpack(predictions["labels"])
    assert sorted(labels.tolist()) == [0] * 8 + [1] * 8 + [2] * 8
    assert set(predictions) == {"labels", "class", "distill", "mean", "macs"}
    assert set(plain["predictions"]) == {"labels", "class", "macs"}
    assert predictions["macs"] > plain["predictions"]["macs"] > 0
    held_out = std["evaluations"][-1]
    assert held_out["images"] == 3 and held_out["samples"] == 20

    # Another disk, and only what was collected: nothing is missing there but the targets, which all is done without.
    other = studies.Study("smoke", tmp_path / "other", source, teachers, device="cpu")
    studies.restore(other, json.loads(json.dumps(report)))
    again = studies.collect(other)
    assert again["missing"] == ["targets"] and again["seconds_per_sample"] == costs
    assert again["runs"] == report["runs"]

    stored = tmp_path / "stored.json"
    stored.write_text(json.dumps(report))
    capsys.readouterr()
    assert evidence.command(["--from", str(stored), "--out", str(tmp_path / "again")]) == 0
    shown = capsys.readouterr().out
    for text in ("| C 16 | STD | 2 |", "| over plain | over no tokens | over plain, STD's cost |"):
        assert text in shown
    assert len(list((tmp_path / "again").glob("evidence-smoke-*.png"))) == 1


def test_the_tables_of_the_pages_are_drawn_from_its_stored_results(tmp_path, capsys):
    """Also those with settings that the study no longer has."""
    root = Path(evidence.__file__).parents[1]
    pages = [root / "benchmarks" / name for name in ("evidence.md", "evidence_short.md")]
    page = "".join(path.read_text(encoding="utf-8") for path in pages)
    stored = re.findall(r"--from (benchmarks/results/\S+\.json)", page)
    assert len(stored) == 3 and "| STD, other loss |" in page
    for name in stored:
        assert evidence.command(["--from", str(root / name), "--out", str(tmp_path)]) == 0
        tables = [part for part in capsys.readouterr().out.split("\n\n") if part.startswith("| student |")]
        assert len(tables) == 2 and all(table in page for table in tables)
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_the_table_of_the_best_students_is_made_from_runs(image_folder, tmp_path, monkeypatch, capsys):
    """One that was held out, and two initialisations of a run of the study, which count by their predictions."""
    monkeypatch.setattr(studies.harness.Times, "seconds", property(lambda times: 0.06))
    predicted = {"plain-0": [0, 1, 1, 0], "plain-1": [0, 1, 1, 1]}
    for name in ("muon", *predicted):
        (folder := tmp_path / name).mkdir()
        val, run = {"train": str(image_folder), "val": "held-out.beton"}, {"init_seed": int(name[-1] == "1")}
        optim = {"name": "muon" if name == "muon" else "adamw"}
        write_recipe(small_recipe(image_folder, folder, data=val, run=run, optim=optim), folder / "recipe.yaml")
        summary = {"parameters": 12_000, "samples": 8000, "epochs": 2.0, "result": {"top1": 50.0, "images": 100}}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0}\n')
        if name in predicted:
            labels = {"labels": pack(np.array([0, 1, 1, 1])), "class": pack(np.array(predicted[name]))}
            (folder / "predictions.json").write_text(json.dumps(labels))
    words = ["--students", *(str(tmp_path / name) for name in ("muon", *predicted)), "--smoke", "--out", str(tmp_path)]
    assert evidence.command(words) == 0
    out = capsys.readouterr().out
    over_both = math.hypot(np.std([100, 100, 100, 50]) / 2, 12.5)  # over images, over initialisations
    assert "| mixer 16 | 0.01 M | muon, plain | 60 | 1 | 2.0 | 50.0 ± 5.0 |" in out
    assert f"| mixer 16 | 0.01 M | adamw, plain | 60 | 1 | 2.0 | 87.5 ± {over_both:.1f} |" in out
    assert len(list(tmp_path.glob("evidence-best-student-*.png"))) == 1
    (tmp_path / "muon" / "summary.json").unlink()
    assert evidence.command(words) == 2 and "muon: holds no summary.json" in capsys.readouterr().err


def run_with(init: int, correct: list[int]) -> harness.Report:
    labels = np.zeros(len(correct), np.uint8)
    return {"init": init, "predictions": {"labels": pack(labels), "class": pack(1 - np.array(correct))}}


def test_differences_are_paired_by_image_and_initialisation():
    one = Group("s", "a", [run_with(0, [1, 1, 1, 0]), run_with(1, [1, 1, 0, 0])])
    other = Group("s", "b", [run_with(1, [1, 0, 0, 1]), run_with(0, [1, 0, 0, 0]), run_with(2, [1, 1, 1, 1])])
    found = difference(one, other, 30.0)
    by_init = [50.0, 0.0]  # points: images 1 and 2 of four gained; one gained, one lost
    by_image = [0.0, 100.0, 50.0, -50.0]
    assert found.points == np.mean(by_init)
    assert found.over_images == pytest.approx(np.std(by_image, ddof=1) / 2)
    assert found.over_inits == pytest.approx(30.0)  # two runs that deviate by 30 points each, a mean over two pairs
    assert (found.better, found.worse) == (3, 1)
    assert difference(one, Group("s", "b", [run_with(2, [1, 1, 1, 1])]), None) is None


def test_the_deviation_over_initialisations_is_pooled_over_a_students_settings():
    every = [
        Group("s", "a", [run_with(0, [1, 1, 1, 0]), run_with(1, [1, 1, 0, 0])]),  # 75, 50 %: squares 312.5, freedom 1
        Group("s", "b", [run_with(i, [1] * i + [0] * (4 - i)) for i in (1, 2, 3)]),  # 25, 50, 75: 1,250, freedom 2
        Group("s", "c", [run_with(0, [1, 0, 0, 0])]),
        Group("t", "a", [run_with(0, [1, 0, 0, 0])]),
    ]
    assert deviations(every) == {"s": (pytest.approx(math.sqrt(1562.5 / 3)), 3)}


def test_every_size_names_recipes_that_are_valid(tmp_path, monkeypatch):
    """What nobody looks on at: each recipe is built, and each job can begin one day."""
    from std_fast.config import recipe as recipes

    for name, size in study_sizes.SIZES.items():
        study = studies.Study(name, tmp_path / name, "imagenette", "teachers")
        costs = {studies.cost_name(s, setting): 1.0 for s in size.students for setting in study_sizes.SETTINGS}
        monkeypatch.setattr(studies.Study, "costs", lambda self, costs=costs: costs)
        done: set[str] = set()
        for job in study.jobs.values():
            assert done.issuperset(job.after), job.name
            done.add(job.name)
            if job.verb == "costs":
                continue
            path = tmp_path / f"{name}-{job.name}.yaml"
            path.write_text(yaml.safe_dump(job.recipe()))
            recipe = recipes.load(str(path))
            assert recipe.run.out.startswith(str(tmp_path))
            assert not recipe.distill.teachers or recipe.distill.target_cache.endswith("targets/targets")


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "--work: is missing"),
        (["--work", "nowhere"], "--data: is missing"),
        (["--work", "w", "--data", "a", "--only", "nothing"], "--only: no job"),
        (["--work", "w", "--data", "a"], "--teachers: {here}/teachers lacks tf_efficientnet_lite0.safetensors"),
    ],
)
def test_mistakes(argv, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert evidence.command(argv) == 2
    assert complaint.format(here=tmp_path) in capsys.readouterr().err
