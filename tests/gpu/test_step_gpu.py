"""A step on a GPU: the host never waits for it, and what is measured of it is there."""

import contextlib
import importlib.util

import pytest
import torch

from std_fast.runtime.metrics import read_jsonl
from std_fast.training.run import Run
from std_fast.training.schedule import StepSettings
from std_fast.training.train import train

pytestmark = pytest.mark.gpu

compiles = pytest.mark.not_rehearsed("compiling takes minutes; another way does it", ways=("lazy",))
OPTIMIZERS = ["adamw", "sgd", "muon"] + (["lamb", "apex_adam"] if importlib.util.find_spec("apex") else [])


@contextlib.contextmanager
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_check_itself():
    one = torch.ones((), device="cuda")
    with no_waiting(), pytest.raises(RuntimeError, match="synchronizing"):
        one.item()


@pytest.mark.parametrize(
    ("name", "compile"), [*((name, "off") for name in OPTIMIZERS), pytest.param("adamw", "inductor", marks=compiles)]
)
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_a_step_never_waits(at, has_values, name, compile, overlap):
    """From the raw batch to the updated weights, with and without MINE, once all is compiled and state is made.

    The optimizer is never compiled: one of them shows what is.
    """
    run = Run(at(optim={"name": name}, compile=compile, overlap=overlap), quiet=True)
    try:
        trainer = run.trainer
        for step in (1, 2):
            trainer.step(next(run.stream), StepSettings(step, 1e-3, 1e-3, with_mine=step == 2))
        batches = list(run.parts.train_loader.epoch(1))
        run.stream.seek(3)
        run.parts.train_loader.epoch = lambda *_: (batch for batch in batches)
        for step in (3, 4):
            with no_waiting():
                trainer.step(next(run.stream), StepSettings(step, 1e-3, 1e-3, with_mine=step == 4))
        assert not has_values or trainer.guard.read() == ([], False)
    finally:
        run.close()


@pytest.mark.not_rehearsed("a run reads its losses, and goes on by them", ways=("lazy",))
def test_a_line_of_the_log_says_how_fast(at, tmp_path):
    train(at("run", overlap="on"), quiet=True)
    lines = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    for line in lines:
        assert all(line[f"share_{part}"] > 0 for part in ("augment", "teacher", "student", "optimizer"))
        assert ("mfu" not in line or 0 < line["mfu"] < 1) and line["peak_memory_gib"] > 0
