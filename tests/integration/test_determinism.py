"""The same recipe twice is the same weights, to the bit, whatever the backend's threads do meanwhile."""

import pytest

from pipelines import UserError
from std_fast.runtime import checkpoint
from std_fast.training.train import train
from tests.beton_tools import jpeg_sample, raw_sample, write_beton
from tests.small_runs import final_tensors, small_recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 images of one size, so that every backend takes them; some are stored raw, as betons may."""
    samples = [(raw_sample if i % 5 == 0 else jpeg_sample)(40, 36, i % 3, i) for i in range(24)]
    return str(write_beton(tmp_path_factory.mktemp("data") / "x.beton", samples))


def run_once(distill, data, out, backend, threads, **run):
    reading = {"crop": {"scale": [0.3, 1.0]}, "backend": backend, "threads": threads}
    run = {"length": "2 epochs", "eval_every": "0 steps", "save_every": "10 minutes"} | run
    train(small_recipe(data, out, data=reading, distill=distill, run=run), quiet=True)
    return checkpoint.digest(final_tensors(out), {})  # weights, moving average, the optimizer's and MINE's state


@pytest.mark.parametrize("backend", ["ffcv", "dali", "torch", "resident"])
def test_the_same_weights_twice_and_with_any_number_of_threads(backend, data, teacher, tmp_path):
    distill = {"mode": "std", "teachers": [{"weights": str(teacher)}] * 2, "mine": {"every": "2 steps", "ema": 0.1}}
    try:
        found = {
            name: run_once(distill, data, tmp_path / name, backend, threads)
            for name, threads in (("one", 1), ("two", 2), ("two again", 2), ("four", 4))
        }
    except UserError as error:
        if "is not installed" not in str(error):
            raise
        pytest.skip(str(error))
    assert len(set(found.values())) == 1, found
    other = run_once(distill, data, tmp_path / "other seed", backend, 2, seed=1)
    assert other not in found.values()
