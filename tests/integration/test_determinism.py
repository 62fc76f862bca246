"""The same recipe twice is the same weights, to the bit, whatever the backend's threads do meanwhile."""

import pytest

from pipelines import UserError
from std_fast.config.recipe import Recipe
from std_fast.config.schema import from_dict
from std_fast.runtime import checkpoint
from std_fast.training.train import train
from tests.beton_tools import jpeg_sample, raw_sample, write_beton

RECIPE = {
    "data": {"image_size": 16, "crop": {"scale": [0.3, 1.0]}},
    "augment": {"erase": 0.25},
    "student": {
        "name": "mixer",
        "drop_path": 0.2,
        "options": {"patch_size": 4, "dim": 16, "depth": 3, "token_dim": 8, "channel_dim": 32},
    },
    "optim": {"lr": 1e-3, "lr_batch": 0, "warmup": "2 steps", "ema": 0.9, "ema_batch": 8, "clip": 1.0},
    "run": {"batch": 8, "length": "2 epochs", "eval_every": "0 steps", "log_every": 2, "device": "cpu"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 images of one size, so that every backend takes them; some are stored raw, as betons may."""
    samples = [(raw_sample if i % 5 == 0 else jpeg_sample)(40, 36, i % 3, i) for i in range(24)]
    return str(write_beton(tmp_path_factory.mktemp("data") / "x.beton", samples))


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    plain = {"student": {"name": "test_resnet"}, "distill": {"mode": "none"}}
    run_once({**RECIPE, **plain}, data, folder, "torch", 1, length="2 steps")
    return str(folder)


def run_once(values, data, out, backend, threads, **run):
    values = values | {
        "data": values["data"] | {"train": data, "val": data, "backend": backend, "threads": threads},
        "run": values["run"] | {"out": str(out)} | run,
    }
    train(from_dict(Recipe, values), quiet=True)
    _, tensors, _ = checkpoint.newest(out / "checkpoints")
    return checkpoint.digest(tensors, {})  # weights, moving average, the optimizer's and MINE's state


@pytest.mark.parametrize("backend", ["ffcv", "dali", "torch", "resident"])
def test_the_same_weights_twice_and_with_any_number_of_threads(backend, data, teacher, tmp_path):
    distill = {"mode": "std", "teachers": [{"weights": teacher}] * 2, "mine": {"every": "2 steps", "ema": 0.1}}
    try:
        found = {
            name: run_once({**RECIPE, "distill": distill}, data, tmp_path / name, backend, threads)
            for name, threads in (("one", 1), ("two", 2), ("two again", 2), ("four", 4))
        }
    except UserError as error:
        if "is not installed" not in str(error):
            raise
        pytest.skip(str(error))
    assert len(set(found.values())) == 1, found
    other = run_once({**RECIPE, "distill": distill}, data, tmp_path / "other seed", backend, 2, seed=1)
    assert other not in found.values()
