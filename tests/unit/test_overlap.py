"""The batch stream on a CPU, and how the trial decides; CUDA streams are tested in tests/gpu."""

import contextlib
import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pipelines.augment.device import Augment, TrainBatch
from pipelines.augment.spec import AugmentSpec
from pipelines.read.batch import Batch
from std_fast.method.losses import TeacherTargets
from std_fast.runtime import speed
from std_fast.runtime.budget import Ledger
from std_fast.runtime.speed import Span, SpeedMeter, Stopwatch, peak, speed_in_words
from std_fast.teachers.overlap import Overlap, Trial, tensors_of
from std_fast.teachers.stream import BatchStream, TeacherSource
from std_fast.teachers.teacher import Teacher, Teachers
from std_fast.training.build import flops_per_image

CPU = torch.device("cpu")
B, S = 4, 8


class Loader:
    """Three steps an epoch. `touched`: (epoch, step) of the batches that were read; `open`: epochs under way."""

    steps_per_epoch = 3

    def __init__(self):
        self.touched, self.open = [], 0

    def epoch(self, epoch, start_step=0):
        self.open += 1
        try:
            for step in range(start_step, 3):
                self.touched.append((epoch, step))
                images = torch.full((B, 3, S, S), 40 * step, dtype=torch.uint8)
                images = images.contiguous(memory_format=torch.channels_last)
                yield Batch(images, torch.arange(B), torch.arange(B) + B * step, np.arange(B), epoch, step)
        finally:
            self.open -= 1


def teachers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * S * S, 5))
    spec = AugmentSpec()
    return Teachers([Teacher(model, spec.mean, spec.std, spec.mean, spec.std) for _ in range(2)])


def stream(loader, source=None, **more):
    return BatchStream(loader, Augment(AugmentSpec(), seed=3), source, **more)


@pytest.mark.parametrize("mode", [None, "auto", "on", "off"])
def test_on_a_cpu_batches_come_one_by_one(mode, caplog):
    """Nothing is read ahead, and the teachers see the student's image."""
    loader, asked = Loader(), teachers()
    with caplog.at_level(logging.INFO, "std_fast"):
        overlap = Overlap(mode, CPU) if mode else None
    batches = stream(loader, TeacherSource(asked, contextlib.nullcontext), overlap=overlap)
    for place in range(5):
        batch = next(batches)
        assert loader.touched[-1] == divmod(place, 3) and len(loader.touched) == place + 1
        assert (batch.epoch, batch.step) == divmod(place, 3)
        expected = asked(batch.images)
        assert torch.equal(batch.targets.labels, expected.labels)
        assert torch.equal(batch.targets.confidence, expected.confidence)
        assert not batch.images.requires_grad
    batches.close()
    assert ("run.overlap: on has no effect on a CPU" in caplog.text) == (mode == "on")


def test_a_plain_run_has_no_targets():
    batches = stream(Loader())
    assert [next(batches).targets for _ in range(3)] == [None] * 3


def test_a_stream_closes_its_epoch_and_continues_anywhere():
    loader = Loader()
    batches = stream(loader)
    next(batches)
    assert loader.open == 1
    batches.close()
    batches.close()
    assert loader.open == 0
    batches.seek(5)
    assert (next(batches).epoch, loader.touched[-1]) == (1, (1, 2))
    assert loader.open == 0  # the epoch has ended, and the next one is not begun before it is needed
    assert (next(batches).epoch, loader.open) == (2, 1)


def test_views_repeat_images_but_not_epochs():
    loader = Loader()
    batches = stream(loader, views=2)
    seen = [next(batches) for _ in range(12)]
    assert [batch.epoch for batch in seen] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert loader.touched == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)] * 2
    assert torch.equal(seen[0].images, seen[6].images) and not torch.equal(seen[0].images, seen[3].images)


class Ahead(Overlap):
    """Prepares ahead as with streams, on a CPU."""

    def __init__(self):
        super().__init__("off", CPU)

    def ahead(self):
        return True


class Recording(TeacherSource):
    """Notes the order of calls."""

    def __init__(self):
        super().__init__(teachers(), contextlib.nullcontext)
        self.calls = []

    def open(self, epoch):
        self.calls.append(("open", epoch))

    def targets(self, batch):
        self.calls.append(("targets", batch.epoch, batch.step))
        return super().targets(batch)

    def deliver(self, batch):
        self.calls.append(("deliver", batch.epoch, batch.step))

    def close(self):
        self.calls.append(("close",))


def test_ahead_a_batch_is_prepared_before_the_one_before_is_delivered():
    """Within an epoch; its last batch is followed by the end of the epoch."""
    source = Recording()
    batches = stream(Loader(), source, overlap=Ahead())
    for _ in range(4):
        next(batches)
    assert source.calls == [
        ("open", 0), ("targets", 0, 0), ("targets", 0, 1), ("deliver", 0, 0),
        ("targets", 0, 2), ("deliver", 0, 1), ("deliver", 0, 2), ("close",),
        ("open", 1), ("targets", 1, 0), ("targets", 1, 1), ("deliver", 1, 0),
    ]  # fmt: skip
    batches.seek(4)  # drops what was prepared
    assert source.calls[-1] == ("close",) and (next(batches).epoch, source.calls[-1]) == (1, ("deliver", 1, 1))


def test_each_step_has_the_times_of_its_own_preparation():
    """Also the last of an epoch, and where the next batch is prepared before the step."""
    watch = Stopwatch(CPU)
    batches = stream(Loader(), Recording(), overlap=Ahead(), watch=watch)
    for step in range(1, 7):
        next(batches)
        with watch.part("student", step):
            pass
        assert set(watch.read(step)) == {"augment", "teacher", "student"}, step
    assert watch.read(6) == {}


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
    batch = TrainBatch(*(next(numbers) for _ in range(5)), epoch=0, step=1)
    assert len(tensors_of(batch)) == 5
    batch = replace(batch, targets=TeacherTargets(*(next(numbers) for _ in range(5))))
    assert [int(t) for t in tensors_of(batch)] == list(range(10))
    batch = replace(batch, targets=TeacherTargets(batch.targets.labels, batch.targets.confidence))
    assert len(tensors_of(batch)) == 7


def test_a_teacher_on_the_cpu_is_a_part_of_the_ledger():
    now = iter(range(100))
    ledger = Ledger(now=lambda: next(now))
    ledger.switch("train")
    watch = Stopwatch(CPU, ledger)
    for name in ("teacher", "student"):  # the student's part is the ledger's "train"
        with watch.part(name, 1):
            next(now), next(now)
    seconds = ledger.read()
    assert seconds["teacher"] == 3 and seconds["train"] == sum(seconds.values()) - seconds["start"] - 3


def test_a_step_is_finished_when_its_event_is_and_nothing_waits():
    watch = Stopwatch(CPU)
    watch.on_gpu = True
    reached = (SimpleNamespace(query=lambda over=over: over) for over in (True, True, False))
    watch._spans.extend(Span(step, "optimizer", None, event) for step, event in enumerate(reached, 1))
    watch._spans.append(Span(4, "augment", None, None))  # prepared ahead
    assert watch.finished() == 2
    watch._spans.clear()
    assert watch.finished() == 0


def test_spans_that_are_never_read_do_not_pile_up():
    watch = Stopwatch(CPU)
    for step in range(2000):
        with watch.part("student", step):
            pass
    assert len(watch._spans) <= 1024 and set(watch.read(1999)) == {"student"}


def test_mfu_is_counted_arithmetic_over_the_peak():
    student = nn.Sequential(nn.Flatten(), nn.Linear(3 * S * S, 7))
    macs = 3 * S * S
    flops = flops_per_image(student, teachers(), S)
    assert flops == 6 * 7 * macs + 2 * (2 * 5 * macs)
    meter = SpeedMeter(CPU, Stopwatch(CPU), flops, 1e6)
    metrics = meter.read(step=1, images=32, seconds=0.5, waited=0.05)
    assert metrics["mfu"] == pytest.approx(64 * flops / 1e6, rel=1e-3) and metrics["data_wait"] == 0.1
    small = SpeedMeter(CPU, Stopwatch(CPU), 1.0, 3e7).read(step=1, images=32, seconds=0.5, waited=0)
    assert small["mfu"] == 2.133e-06  # a small model's is not rounded away


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
    ],
)
def test_mfu_is_of_a_peak_that_is_known(name, tflops, monkeypatch):
    """Nothing is measured: what else runs on the machine, or a resumed run, changes nothing."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak(torch.device("cuda", 0), "bfloat16") == (tflops and 1e12 * tflops)
    assert peak(torch.device("cuda", 0), "float32") is peak(CPU, "bfloat16") is None
    assert "mfu" not in SpeedMeter(CPU, Stopwatch(CPU), 1.0, None).read(step=1, images=1, seconds=1.0, waited=0)


def test_shares_are_of_all_steps_since_the_last_line_without_compilation(monkeypatch):
    now = iter([0.0, 3.0, 3.0, 4.0, 4.0, 5.0, 5.0, 9.0])
    ledger = Ledger()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(now))
    watch = Stopwatch(CPU, ledger)
    for step in range(1, 5):
        with watch.part("student", step):
            ledger.seconds["compile"] += 2.0 * (step == 1)
    metrics = SpeedMeter(CPU, watch, None, None).read(step=3, images=1, seconds=4.0, waited=1.0)
    assert metrics["share_student"] == 0.75 and metrics["data_wait"] == 0.25
    assert watch.read(4) == {"student": 4.0}


def test_the_metrics_of_speed_in_a_line():
    metrics = {"data_wait": 0.021, "peak_memory_gib": 12.345, "share_teacher": 0.304, "share_student": 0.6}
    assert speed_in_words(metrics) == "data 2.1 %  teacher 30.4 %  student 60 %  12.3 GiB"
    assert speed_in_words(metrics | {"mfu": 0.00414}).startswith("MFU 0.414 %  data 2.1 %")


def test_a_model_that_cannot_be_counted_is_named_and_not_fatal(caplog):
    class Odd(nn.Linear):
        def forward(self, x):
            raise RuntimeError("values are needed")

    assert flops_per_image(Odd(3, 3), None, S) is None
    assert (
        "no MFU in the log: the model's arithmetic cannot be counted (RuntimeError('values are needed'))" in caplog.text
    )
