"""The evidence study at its smallest: real runs of every kind, stopped in between, collected, shown and drawn."""

import json
import sys
import time
from pathlib import Path

import pytest
import yaml

from benchmarks import evidence, harness, study_sizes
from benchmarks import study as studies
from tests.killing import Child


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
    data = (str(image_folder), str(image_folder))
    study = studies.Study("smoke", tmp_path / "work", data)
    forever = time.monotonic() + 1e6
    first = Forked(stop_after=3)
    assert not study.work_off(1, "*", forever, first)
    assert sum(study.done(job) for job in study.jobs) == len(first.commands) == 3
    rest = Forked()
    assert study.work_off(1, "*", forever, rest)
    assert len(first.commands) + len(rest.commands) == len(study.jobs) == 10

    report = study.collect() | {"conditions": harness.conditions(), "missing": []}
    runs = {run["job"]: run for run in report["runs"]}
    costs = report["cpu_seconds_per_sample"]
    assert costs["STD"] > costs["plain"] > 0
    std, plain, equal = (runs[f"mixer-{name}-0"] for name in ("STD", "plain", "plain-STD-s-cost"))
    assert std["summary"]["samples"] == plain["summary"]["samples"] == 24
    asked = json.dumps(std["recipe"]["distill"]["teachers"])
    assert "teacher-small" in asked and "teacher-large" in asked
    # to the nearest step: as many samples as cost what STD's cost
    assert equal["summary"]["samples"] == pytest.approx(24 * costs["STD"] / costs["plain"], abs=4.01)
    pushed = runs["mixer-STD-pushed-0-0.001-minutes"]
    assert pushed["recipe"]["optim"]["name"] == "muon" and pushed["recipe"]["distill"]["views"] == 1
    assert pushed["summary"]["samples"] == pytest.approx(60 * 0.001 / costs["STD, pushed"], abs=8)
    assert [e["step"] for e in std["evaluations"]] == [3] and std["log"][-1]["step"] == 3
    assert "seconds" in std["summary"] and runs["targets-small-large-0"]["summary"]["asked"] == 24

    stored = tmp_path / "stored.json"
    stored.write_text(json.dumps(report))
    capsys.readouterr()
    assert evidence.command(["--from", str(stored), "--out", str(tmp_path / "again")]) == 0
    shown = capsys.readouterr().out
    for name in (
        "teacher-small",
        "| mixer | STD |",
        "| mixer | plain, STD's cost |",
        "| minutes | plain, pushed: top-1, % |",
    ):
        assert name in shown
    assert len(list((tmp_path / "again").glob("evidence-smoke-*.png"))) == 1


def test_every_size_names_recipes_that_are_valid(tmp_path):
    """What a GPU is to run without anyone looking on: each recipe is built, and each job can begin one day."""
    from std_fast.config import recipe as recipes

    for name in study_sizes.SIZES:
        study = studies.Study(name, tmp_path / name, ("train.beton", "test.beton"))
        done: set[str] = set()
        for job in study.jobs.values():
            assert done.issuperset(job.after), job.name
            done.add(job.name)
            if (
                job.verb == "costs"
                or any(study_sizes.SETTINGS[s].cost_of_std for s in [job.about.get("setting", "plain")])
                or ("minutes" in job.about and not study.size.budget)
            ):
                continue  # a length that is measured
            path = tmp_path / f"{name}-{job.name}.yaml"
            path.write_text(yaml.safe_dump(job.recipe()))
            recipe = recipes.load(str(path))
            assert recipe.run.out.startswith(str(tmp_path)) or job.verb == "teach"


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "--work: is missing"),
        (["--work", "nowhere"], "--data: is missing"),
        (["--work", "w", "--data", "a", "b", "--only", "nothing"], "--only: no job"),
    ],
)
def test_mistakes(argv, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert evidence.command(argv) == 2
    assert complaint in capsys.readouterr().err
