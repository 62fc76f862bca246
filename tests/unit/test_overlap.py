"""Teachers and student in turn (a CPU), and how the trial decides; streams are tested in tests/gpu."""

import contextlib
import logging

import numpy as np
import pytest
import torch
from torch import nn

from pipelines.augment.device import Augment, TrainBatch
from pipelines.augment.spec import AugmentSpec
from pipelines.read.batch import Batch
from std_fast.method.losses import TeacherTargets
from std_fast.runtime.speed import SpeedMeter, Stopwatch, ceiling, speed_in_words
from std_fast.teachers.overlap import Overlap, Trial, taught, tensors_of
from std_fast.teachers.teacher import Teacher, Teachers
from std_fast.training.build import flops_per_image

CPU = torch.device("cpu")
B, S = 4, 8


def batches(touched):
    for step in range(3):
        touched.append(step)
        images = torch.full((B, 3, S, S), 40 * step, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
        yield Batch(images, torch.arange(B), torch.arange(B) + B * step, np.arange(B), 0, step)


def teachers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * S * S, 5))
    spec = AugmentSpec()
    return Teachers([Teacher(model, spec.mean, spec.std, spec.mean, spec.std) for _ in range(2)])


@pytest.mark.parametrize("mode", [None, "auto", "on", "off"])
def test_on_a_cpu_batches_come_one_by_one(mode, caplog):
    """Nothing is read ahead, the teachers see the student's image, and only who asked for it is told."""
    touched, augment, asked = [], Augment(AugmentSpec(), seed=3), teachers()
    with caplog.at_level(logging.INFO, "std_fast"):
        overlap = Overlap(mode, CPU) if mode else None
    for step, (mixed, targets) in enumerate(taught(batches(touched), augment, asked, contextlib.nullcontext, overlap)):
        assert touched == list(range(step + 1)) and mixed.step == step
        expected = asked(mixed.images)
        assert torch.equal(targets.labels, expected.labels) and torch.equal(targets.confidence, expected.confidence)
        assert not mixed.images.requires_grad
    assert touched == [0, 1, 2]
    assert ("run.overlap: on has no effect on a CPU" in caplog.text) == (mode == "on")


def test_without_teachers_there_are_no_targets():
    pairs = list(taught(batches([]), Augment(AugmentSpec(), seed=3), None, contextlib.nullcontext))
    assert [targets for _, targets in pairs] == [None] * 3


def test_the_trial_compares_medians_and_says_what_it_chose(caplog):
    trial = Trial()
    assert trial.plan[trial.WARM :].count(True) == trial.plan[trial.WARM :].count(False) == trial.BLOCK * trial.ROUNDS
    in_turn = [90.0] * trial.WARM + [10.0] * (len(trial.plan) - trial.WARM)
    faster = [ms * (0.8 if way else 1.0) for ms, way in zip(in_turn, trial.plan, strict=True)]
    faster[trial.WARM + trial.BLOCK] = 5000.0  # an evaluation fell into a step of the faster way
    slower = [ms * (0.995 if way else 1.0) for ms, way in zip(in_turn, trial.plan, strict=True)]  # not worth the memory
    with caplog.at_level(logging.INFO, "std_fast"):
        assert trial.decide(faster) is True
        assert "10.00 ms a step in turn, 8.00 ms side by side (+25.0 %)" in caplog.text
        assert trial.decide(slower) is False
        assert "falls back to serial" in caplog.text


def test_every_tensor_of_a_batch_is_handed_over():
    numbers = iter(torch.arange(20))
    mixed = TrainBatch(*(next(numbers) for _ in range(5)), epoch=0, step=1)
    targets = TeacherTargets(*(next(numbers) for _ in range(5)))
    assert [int(t) for t in tensors_of((mixed, targets))] == list(range(10))
    assert len(tensors_of((mixed, TeacherTargets(targets.labels, targets.confidence)))) == 7
    assert len(tensors_of((mixed, None))) == 5


def test_the_stopwatch_takes_time_only_when_armed():
    watch = Stopwatch(CPU)
    assert watch.now() is None
    watch.note(student=(watch.now(), watch.now()))
    assert watch.read() == {}
    watch.armed = True
    began = watch.now()
    watch.note(student=(began, began + 0.25))
    assert watch.read() == {"student": 0.25} and not watch.armed and watch.read() == {}


def test_mfu_is_counted_arithmetic_over_the_ceiling():
    student = nn.Sequential(nn.Flatten(), nn.Linear(3 * S * S, 7))
    macs = 3 * S * S
    flops = flops_per_image(student, teachers(), S)
    assert flops == 6 * 7 * macs + 2 * (2 * 5 * macs)
    limit = ceiling(CPU, "float32")
    assert limit == ceiling(CPU, "bfloat16") > 1e8  # measured once, in float32 on a CPU
    meter = SpeedMeter(CPU, Stopwatch(CPU), flops, 1e6)
    figures = meter.read(images=32, seconds=0.5, step_seconds=0.1, waited=0.05)
    assert figures["mfu"] == pytest.approx(64 * flops / 1e6, rel=1e-3) and figures["data_wait"] == 0.1


def test_the_figures_of_speed_in_a_line():
    figures = {"data_wait": 0.021, "peak_memory_gib": 12.345, "share_teacher": 0.304, "share_student": 0.6}
    assert speed_in_words(figures) == "data 2 %  teacher 30 %  student 60 %  12.35 GiB"
    assert speed_in_words(figures | {"mfu": 0.414}).startswith("MFU 41 %  data 2 %")


def test_a_model_that_cannot_be_counted_is_named_and_not_fatal(caplog):
    class Odd(nn.Linear):
        def forward(self, x):
            raise RuntimeError("values are needed")

    assert flops_per_image(Odd(3, 3), None, S) is None
    assert (
        "no MFU in the log: the model's arithmetic cannot be counted (RuntimeError('values are needed'))" in caplog.text
    )
