"""What the regulariser does in training: with it on, the estimated information between the two tokens falls."""

from dataclasses import replace

import pytest
import torch

from std_fast.commands.demo import write_digits
from std_fast.config import recipe as recipes
from std_fast.runtime.metrics import read_jsonl
from std_fast.training.train import train

FIELDS = {
    "data.threads": "1",
    "student.options": "{patch_size: 6, dim: 32, depth: 2}",
    "distill.mine.every": "1 step",
    "distill.mine.width": "64",
    "distill.mine.lr": "1e-2",  # so that psi keeps up in so few steps
    "optim.warmup": "10 steps",
    "run.batch": "64",
    "run.device": "cpu",
    "run.precision": "float32",
    "run.log_every": "20",
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder / "train"


def run(name, digits, out, steps, on_step=None, **fields):
    """Records of the training's log."""
    length = {"run.length": f"{steps} steps", "run.eval_every": f"{steps} steps"}
    where = {"data.train": str(digits), "run.out": str(out)}
    recipe = recipes.load(name, list((FIELDS | where | length | fields).items()))
    train(replace(recipe, data=replace(recipe.data, val="")), quiet=True, on_step=on_step)
    return [record for record in read_jsonl(out / "metrics.jsonl") if record["kind"] == "train"]


def test_the_estimate_falls_when_the_regulariser_is_on(digits, tmp_path):
    """Three trainings that differ in the weight alone: never more than 1e-12, so that psi only watches; 1 from the
    start; and 1 from step 80 on, when the tokens already tell of each other. The estimate is the run's own V."""
    teacher = tmp_path / "teacher"
    run("digits_teacher", digits, teacher, 10, **{"student.options": "{}"})

    def turn_on(training):
        if training.step == 80:
            for mine in training.parts.trainer.student.mine:
                mine.weight = 1.0

    def estimates(kind, weight, on_step=None):
        fields = {"distill.teachers.0.weights": str(teacher), "distill.mine.weight": weight}
        records = run("digits_std", digits, tmp_path / kind, 120, on_step, **fields)
        return {record["step"]: record["information"] for record in records}

    off, on, late = estimates("off", "1e-12"), estimates("on", "1.0"), estimates("late", "1e-12", turn_on)
    assert late[80] == off[80] > 0.5, (off, late)
    assert late[120] < 0.5 * late[80], late
    assert off[120] > off[80], off
    assert on[120] < 0.2 * off[120], (on, off)


@pytest.mark.parametrize("every, wanted", [("1 epoch", {1, 4, 7}), ("2 steps", {1, 3, 5, 7})])
def test_the_statistics_network_learns_in_the_first_step_of_each_period(digits, tmp_path, every, wanted):
    """So that all that a run will ever compile, and all the memory that it takes, is met in its first two steps."""
    psi, trained = {}, set()

    def on_step(training):
        now = [p.detach().clone() for p in training.parts.trainer.psi_parameters]
        if any(not torch.equal(a, b) for a, b in zip(now, psi.get("before", now), strict=True)):
            trained.add(training.step)
        psi["before"] = now

    teacher = tmp_path / "teacher"
    run("digits_teacher", digits, teacher, 1, **{"student.options": "{}"})
    fields = {"distill.teachers.0.weights": str(teacher), "distill.mine.every": every, "optim.warmup": "0 steps"}
    run("digits_std", digits, tmp_path / "run", 8, on_step, **fields, **{"run.batch": "256"})
    assert trained == wanted - {1}  # the first step has nothing to compare with
