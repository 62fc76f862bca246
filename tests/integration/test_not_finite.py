"""Steps whose loss or gradient is not finite: skipped, rolled back over, or the end; to the bit as if never taken."""

import json
from dataclasses import replace

import pytest
import torch

from std_fast.runtime import checkpoint
from std_fast.runtime.metrics import read_jsonl
from std_fast.training.not_finite import NotFinite
from std_fast.training.run import Stopped
from std_fast.training.step import Trainer
from std_fast.training.train import train
from tests.small_runs import RESNET, small_recipe

STEPS = 9  # of three epochs
RUN = {"length": f"{STEPS} steps", "eval_every": "0 steps", "log_every": 4, "save_every": "10 minutes"}


@pytest.fixture(params=["std with MINE's average", "batch norms"])
def recipe(request, image_folder, teacher, tmp_path):
    std = {"mode": "std", "teachers": [{"weights": str(teacher)}] * 2, "mine": {"every": "1 step", "ema": 0.1}}
    sections = {"student": RESNET} if request.param == "batch norms" else {"distill": std}
    return small_recipe(image_folder, tmp_path / "run", data={"val": ""}, run=RUN, **sections)


def under(recipe, out, kind, **more):
    return replace(recipe, run=replace(recipe.run, out=str(out), not_finite=kind, **more))


@pytest.fixture
def steps(monkeypatch):
    """A function that makes these steps not finite, through images that are not, and leaves those out altogether."""
    original = Trainer.step

    def set_up(bad=(), left_out=()):
        def step(self, batch, now):
            if now.step in left_out:
                return
            images = torch.full_like(batch.images, torch.nan) if now.step in bad else batch.images
            original(self, replace(batch, images=images), now)

        monkeypatch.setattr(Trainer, "step", step)

    return set_up


def final(folder):
    _, tensors, meta = checkpoint.newest(folder / "checkpoints")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("snapshot.")}, meta


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]) and tensor.isfinite().all(), name


def trained_without(recipe, out, steps, left_out):
    steps(left_out=left_out)
    train(under(recipe, out, "stop"), quiet=True)
    return final(out)[0]


# log_every 4: noticed at step 4 at once, at 7 later, at the first step before there is any state
@pytest.mark.parametrize("bad", [(4, 7), (1, 2), (9,)])
def test_a_skipped_step_changes_nothing(recipe, tmp_path, steps, bad):
    expected = trained_without(recipe, tmp_path / "reference", steps, left_out=bad)
    steps(bad=bad)
    summary = train(under(recipe, tmp_path / "run", "skip"), quiet=True)
    assert_same(final(tmp_path / "run")[0], expected)
    assert summary["bad_steps"] == list(bad) and summary["steps"] == STEPS
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "not_finite"] == list(bad)
    logged = [r for r in records if r["kind"] == "train"]
    assert logged[-1]["bad_steps"] == len(bad)
    assert all(r["loss"] == r["loss"] for r in logged if "loss" in r)  # the means are of the good steps


# every 3 steps: 5 goes back to 3, 6 also, though it is a multiple itself, 9 (the last) to 6
@pytest.mark.parametrize(("bad", "void"), [((5,), (4, 5)), ((5, 6), (4, 5, 6)), ((2, 9), (1, 2, 7, 8, 9))])
def test_rolled_back_steps_are_as_if_never_taken(recipe, tmp_path, steps, bad, void):
    expected = trained_without(recipe, tmp_path / "reference", steps, left_out=void)
    steps(bad=bad)
    for log_every in (4, 1):  # when it is noticed decides nothing
        out = tmp_path / f"run{log_every}"
        back = under(recipe, out, "rollback", rollback_every="3 steps", log_every=log_every)
        summary = train(back, quiet=True)
        assert_same(final(out)[0], expected)
        assert summary["bad_steps"] == list(bad) and summary["steps"] == STEPS


@pytest.mark.parametrize("bad", [6, 5])  # noticed at 6, where an evaluation is due
def test_an_evaluation_that_is_due_at_a_rolled_back_step_is_made_once(image_folder, tmp_path, steps, bad):
    steps(bad=(bad,))
    run = RUN | {"not_finite": "rollback", "rollback_every": "3 steps", "eval_every": "3 steps"}
    train(small_recipe(image_folder, tmp_path, run=run), quiet=True)
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "eval"] == [3, 6, 9]


@pytest.mark.parametrize("kind", ["skip", "rollback"])
def test_interrupted_at_any_step_the_end_is_the_same(recipe, tmp_path, steps, kind):
    steps(bad=(2, 5))
    train(under(recipe, tmp_path / "complete", kind, rollback_every="3 steps"), quiet=True)
    expected, meta = final(tmp_path / "complete")
    assert meta["bad_steps"] == [2, 5]
    for stop_at in (4, 5):

        def ask(run, stop_at=stop_at):
            run.stop_wanted = run.step >= stop_at

        part = under(recipe, tmp_path / f"{stop_at}", kind, rollback_every="3 steps")
        with pytest.raises(Stopped):
            train(part, quiet=True, on_step=ask)
        train(part, resume=True, quiet=True)
        tensors, meta = final(tmp_path / f"{stop_at}")
        assert_same(tensors, expected)
        assert meta["bad_steps"] == [2, 5]


@pytest.mark.parametrize("kind", ["skip", "rollback"])
def test_one_more_than_the_limit_ends_the_run_which_may_go_on_later(recipe, tmp_path, steps, kind):
    steps(bad=(3, 5, 7))
    run = under(recipe, tmp_path / "run", kind, not_finite_limit=2, rollback_every="1 steps")
    with pytest.raises(NotFinite, match=r"step 7 is not finite \(loss, gradient.*\) after 2 others"):
        train(run, quiet=True)
    assert json.loads((tmp_path / "run" / "not_finite.json").read_text())["bad_steps"] == [3, 5]
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "not_finite"] == [3, 5]  # step 7 was neither skipped nor undone
    tensors, meta = final(tmp_path / "run")
    assert meta["step"] == 6 and meta["bad_steps"] == [3, 5]
    with pytest.raises(NotFinite, match="step 7"):  # it meets the batch again
        train(run, quiet=True, resume=True)
    with pytest.raises(NotFinite, match="step 7"):
        train(under(run, run.run.out, "stop"), quiet=True, resume=True)
    summary = train(under(run, run.run.out, "skip", not_finite_limit=3), quiet=True, resume=True)
    assert summary["bad_steps"] == [3, 5, 7]


def test_stopped_before_the_bad_step_to_the_bit(recipe, tmp_path, steps):
    """Also what the forward pass changes: statistics of batch norms, MINE's average, the moving average."""
    steps()
    train(under(recipe, tmp_path / "long", "stop"), quiet=True)
    steps(bad=(6,))
    with pytest.raises(NotFinite, match="step 6 is not finite"):
        train(under(recipe, tmp_path / "run", "stop"), quiet=True)
    report = json.loads((tmp_path / "run" / "not_finite.json").read_text())
    assert report["step"] == 6 and report["positions"] == list(range(16, 24))
    steps()
    train(under(recipe, tmp_path / "run", "stop"), quiet=True, resume=True)  # the batch was to blame, and was fixed
    assert_same(final(tmp_path / "run")[0], final(tmp_path / "long")[0])
