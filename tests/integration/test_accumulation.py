"""Runs that accumulate gradients: against the run in one piece, when memory runs out, resumed, compiled; and traces."""

import json
from dataclasses import replace

import pytest
import torch

from std_fast.method.student import Student
from std_fast.runtime import checkpoint
from std_fast.runtime.metrics import read_jsonl
from std_fast.training.train import train
from tests.small_runs import EARLY, assert_same_bits, at, final_tensors, small_recipe, train_until


@pytest.fixture
def recipe(teacher, image_folder, tmp_path):
    """24 images, batch 8: 6 steps in two epochs; MINE in every other step."""
    mine = {"every": "2 steps", "ema": 0.1}
    distill = {"mode": "std", "teachers": [{"weights": str(teacher)}] * 2, "mine": mine}
    run = {"length": "2 epochs", "eval_every": "1 epoch", "save_every": "10 minutes", "log_every": 1}
    return small_recipe(image_folder, tmp_path / "run", distill=distill, run=run)


def metrics_of(folder):
    """What is logged of every step and evaluation, but for speed."""
    kept = ("step", "lr", "loss", "loss_class", "loss_distill", "information", "grad_norm", "top1")
    return [{k: r[k] for k in kept if k in r} for r in read_jsonl(folder / "metrics.jsonl") if r["kind"] != "end"]


def assert_close(folder, other):
    ours, theirs = metrics_of(folder), metrics_of(other)
    assert len(ours) == len(theirs) > 3
    for one, two in zip(ours, theirs, strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-4), one["step"]


@pytest.fixture
def memory(monkeypatch):
    """Forwards of more than `most` images run out of memory; `memory.seen`: the images of each."""

    class Memory:
        most, seen = 4, []

    kept, limit = Student.forward, Memory()
    limit.seen = []

    def forward(self, images, *rest):
        if self.training:
            limit.seen.append(len(images))
            if len(images) > limit.most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return kept(self, images, *rest)

    monkeypatch.setattr(Student, "forward", forward)
    return limit


def test_it_learns_what_one_piece_learns_of_the_same_data(recipe, tmp_path):
    """Progressive sizes, stochastic depth, clipping, the moving average; and the same bits of targets are stored."""
    recipe = replace(recipe, student=replace(recipe.student, **EARLY), data=replace(recipe.data, image_size=24))
    teachers = tuple(replace(spec, image_size=24) for spec in recipe.distill.teachers)
    for name, micro in (("at_once", 0), ("parts", 4)):
        distill = replace(recipe.distill, teachers=teachers, target_cache=str(tmp_path / f"targets_{name}"))
        train(at(replace(recipe, distill=distill), tmp_path / name, micro_batch=micro, length="1 epoch"), quiet=True)
    assert_close(tmp_path / "parts", tmp_path / "at_once")
    stored = [sorted((tmp_path / f"targets_{name}").glob("*.targets")) for name in ("at_once", "parts")]
    assert len(stored[0]) == 1 and [f.read_bytes() for f in stored[0]] == [f.read_bytes() for f in stored[1]]


def test_auto_halves_and_continues_with_the_same_step(recipe, memory, tmp_path, caplog):
    train(at(recipe, tmp_path / "fixed", micro_batch=4), quiet=True)
    memory.seen.clear()
    train(at(recipe, tmp_path / "auto", micro_batch="auto"), quiet=True)
    assert memory.seen == [8] + [4, 4] * 6
    assert "memory ran out with 8 images in a pass; gradients now add up over 2 passes of 4" in caplog.text
    assert_same_bits(final_tensors(tmp_path / "auto"), final_tensors(tmp_path / "fixed"))


def test_memory_that_runs_out_later_loses_nothing(recipe, memory, tmp_path):
    memory.most = 8
    train(at(recipe, tmp_path / "at_once"), quiet=True)

    def others_take_it(run):
        memory.most = 4 if run.step >= 3 else 8

    train(at(recipe, tmp_path / "auto", micro_batch="auto"), quiet=True, on_step=others_take_it)
    assert metrics_of(tmp_path / "auto")[:3] == metrics_of(tmp_path / "at_once")[:3]
    assert_close(tmp_path / "auto", tmp_path / "at_once")


def test_a_resumed_run_goes_on_with_what_it_had_found(recipe, memory, tmp_path):
    auto = at(recipe, tmp_path / "parts", micro_batch="auto")
    train(at(recipe, tmp_path / "once", micro_batch="auto"), quiet=True)
    train_until(auto, 3)
    assert checkpoint.newest(tmp_path / "parts" / "checkpoints")[2]["micro_batch"] == 4
    memory.seen.clear()
    train(auto, quiet=True, resume=True)
    assert memory.seen == [4, 4] * 3
    assert_same_bits(final_tensors(tmp_path / "parts"), final_tensors(tmp_path / "once"))


def test_a_run_may_be_resumed_with_another_micro_batch(recipe, tmp_path):
    train_until(at(recipe, tmp_path / "run", micro_batch=4), 3)
    assert train(at(recipe, tmp_path / "run"), quiet=True, resume=True)["steps"] == 6


def test_compiled_passes_are_those_of_uncompiled_ones(recipe, tmp_path):
    for backend in ("off", "aot_eager"):
        one = at(recipe, tmp_path / backend, micro_batch=4, compile=backend, length="2 steps", eval_every="0 steps")
        train(one, quiet=True)
    ours, theirs = metrics_of(tmp_path / "aot_eager"), metrics_of(tmp_path / "off")
    for one, two in zip(ours, theirs, strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-4), one["step"]


# -- traces -----------------------------------------------------------------------------------------------------------


def events(folder, steps):
    trace = json.loads((folder / "profile" / f"steps-{steps}.pt.trace.json").read_text())
    return [event.get("name", "") for event in trace["traceEvents"]]


def test_a_trace_of_some_steps_changes_nothing(recipe, tmp_path, capfd):
    train(at(recipe, tmp_path / "plain"), quiet=True)
    train(at(recipe, tmp_path / "traced", profile="steps 3-4", micro_batch=0), quiet=True)
    assert "ERROR" not in capfd.readouterr().err  # of kineto, which finds no GPU
    names = events(tmp_path / "traced", "3-4")
    for part in ("augment", "teacher", "student", "optimizer"):
        assert names.count(part) == 2, part
    assert "aten::addmm" in names
    assert_same_bits(final_tensors(tmp_path / "traced"), final_tensors(tmp_path / "plain"))
    assert not (tmp_path / "plain" / "profile").exists()


@pytest.mark.parametrize(("steps", "length", "traced"), [("1-2", 4, 2), ("3-9", 4, 2), ("4-4", 4, 1), ("8-9", 4, 0)])
def test_steps_at_the_ends_of_a_run(recipe, tmp_path, caplog, recwarn, steps, length, traced):
    plain = replace(recipe, data=replace(recipe.data, val=""))
    train(at(plain, tmp_path / "run", profile=f"steps {steps}", length=f"{length} steps"), quiet=True)
    assert not [str(one.message) for one in recwarn if "rofiler" in str(one.message)]
    if traced:
        assert events(tmp_path / "run", steps).count("optimizer") == traced
    else:
        assert not (tmp_path / "run" / "profile").exists()
        said = "run.profile: steps 8-9 are none of those that are trained (1 to 4): there will be no trace"
        assert said in caplog.text


def test_a_trace_that_cannot_be_written_is_a_warning(recipe, tmp_path, caplog):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("a file")
    assert train(at(recipe, tmp_path / "run", profile="step 2", length="3 steps"), quiet=True)["steps"] == 3
    assert "run.profile: " in caplog.text and "cannot be written" in caplog.text
