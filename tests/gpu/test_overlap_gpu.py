"""Teachers on a stream of their own: the bits of taking turns, whoever is slow, and the trial."""

import contextlib
import logging

import pytest
import torch

from pipelines.augment.device import Augment
from std_fast.runtime import checkpoint
from std_fast.teachers.overlap import Overlap, Trial, tensors_of
from std_fast.teachers.stream import BatchStream, TeacherSource
from std_fast.training.build import build, build_teachers
from std_fast.training.train import train
from tests.small_runs import train_until

pytestmark = pytest.mark.gpu
reads_losses = pytest.mark.not_rehearsed("a run reads its losses, and goes on by them", ways=("lazy",))

SLOW = 20_000_000  # cycles, some 10 ms


def weights(recipe):
    return checkpoint.newest(checkpoint.Path(recipe.run.out) / "checkpoints")[1]


def assert_same(one, two, has_values):
    assert one.keys() == two.keys()
    for name, tensor in one.items() if has_values else ():
        assert torch.equal(tensor.nan_to_num(), two[name].nan_to_num()), name


@reads_losses
@pytest.mark.parametrize("mode", ["on", "auto"])
def test_a_run_has_the_weights_of_a_serial_one(at, has_values, mode):
    serial, beside = at("serial"), at("beside", overlap=mode)
    train(serial, quiet=True)
    train(beside, quiet=True)
    assert_same(weights(beside), weights(serial), has_values)


@reads_losses
def test_an_interrupted_run_goes_on_the_other_way(at, has_values):
    serial, beside = at("serial"), at("beside", overlap="on")
    train(serial, quiet=True)
    train_until(beside, 4)
    train(at("beside", overlap="off"), resume=True, quiet=True)
    assert_same(weights(beside), weights(serial), has_values)


@pytest.mark.not_rehearsed("compares what kernels computed", ways=("lazy", "compiled"))
@pytest.mark.parametrize("slow", ["teacher", "student", "neither"])
def test_what_crosses_the_streams_is_complete(at, slow):
    """Whoever is late, the student reads what a serial pass gives, while everyone allocates and frees."""
    parts = build(at())
    try:
        augment, device = parts.augment, parts.device
        teachers = build_teachers(parts.recipe, 3, device)
        if slow == "teacher":
            teachers.register_forward_pre_hook(lambda *_: torch.cuda._sleep(SLOW))

        def run(overlap):
            seen = []
            source = TeacherSource(teachers, contextlib.nullcontext)
            stream = BatchStream(parts.train_loader, augment, source, overlap)
            for _ in range(12):
                batch = next(stream)
                if slow == "student":
                    torch.cuda._sleep(SLOW)
                seen.append([tensor.clone() for tensor in tensors_of(batch)])
                del batch
                torch.randn(1 << 20, device=device)  # takes what was given back too early
            stream.close()
            return seen

        expected, found = run(None), run(Overlap("on", device))
        torch.cuda.synchronize()
        assert len(expected) == len(found) == 12
        for a, b in zip(expected, found, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    finally:
        parts.close()


@pytest.mark.parametrize("beside", [True, False])
def test_the_trial_measures_both_ways_and_decides(at, caplog, monkeypatch, beside):
    """Where it decides for taking turns, teachers no longer hold memory of a stream of their own."""
    decide = Trial.decide
    monkeypatch.setattr(Trial, "decide", lambda self, times: (decide(self, times), beside)[1])
    monkeypatch.setattr(Trial, "WARM", 2)
    monkeypatch.setattr(Trial, "BLOCK", 2)
    parts = build(at())
    try:
        overlap = Overlap("auto", parts.device)
        with caplog.at_level(logging.INFO, "std_fast"):
            source = TeacherSource(parts.teachers, contextlib.nullcontext)
            stream = BatchStream(parts.train_loader, parts.augment, source, overlap)
            for step in range(24):
                next(stream)
                torch.cuda._sleep(SLOW)
                if step % 3 == 2:
                    torch.cuda.synchronize()
        assert overlap.trial.choice is beside and (overlap.prepare(lambda: None).ready is not None) is beside
        assert caplog.text.count("ms a step in turn") == 1
    finally:
        parts.close()


def test_leaving_early_leaves_nothing_behind(at):
    parts = build(at())
    try:
        overlap = Overlap("on", parts.device)
        augment: Augment = parts.augment
        source = TeacherSource(parts.teachers, contextlib.nullcontext)
        stream = BatchStream(parts.train_loader, augment, source, overlap)
        next(stream)
        stream.close()
        assert len(list(parts.train_loader.epoch(0))) == 3
    finally:
        parts.close()
