"""A tiny distillation on the GPU."""

from dataclasses import replace

import pytest

from std_fast.config.recipe import Recipe
from std_fast.config.schema import from_dict
from std_fast.training.run import train

SMALL = {
    "data": {"image_size": 16, "crop": {"scale": [0.5, 1.0]}, "threads": 1, "backend": "torch"},
    "student": {
        "name": "mixer", "drop_path": 0.2,
        "options": {"patch_size": 4, "dim": 16, "depth": 3, "token_dim": 8, "channel_dim": 32},
    },
    "optim": {"lr": 1e-3, "lr_batch": 0, "warmup": "2 steps", "ema": 0.9, "ema_batch": 8, "clip": 1.0},
    "run": {
        "batch": 8, "length": "3 epochs", "eval_every": "1 epoch", "log_every": 3, "device": "cuda", "compile": "off",
        "overlap": "off",
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def small(image_folder, tmp_path_factory):
    """Two teachers, MINE at every second step, nothing compiled, nothing side by side."""
    folder = tmp_path_factory.mktemp("teacher")
    data = {**SMALL["data"], "train": str(image_folder), "val": str(image_folder)}
    plain = {**SMALL, "data": data, "student": {"name": "test_resnet"}}
    plain["run"] = {**SMALL["run"], "out": str(folder / "run"), "length": "1 step"}
    train(from_dict(Recipe, plain), quiet=True)
    distill = {"mode": "std", "teachers": [{"weights": str(folder / "run")}] * 2, "mine": {"every": "2 steps"}}
    return from_dict(Recipe, {**SMALL, "data": data, "distill": distill})


@pytest.fixture
def at(small, tmp_path):
    """`at(name, **run)`: the recipe with another folder and other fields of its section `run`."""

    def changed(name="run", optim=None, **run):
        optim = replace(small.optim, **(optim or {}))
        return replace(small, optim=optim, run=replace(small.run, out=str(tmp_path / name), **run))

    return changed
