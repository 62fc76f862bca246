"""A batch that is too large: one line with the largest that fits, exit code 2. On a GPU really, on a CPU by the real
code, whose step is made to raise what torch raises there."""

import re

import pytest
import torch

from pipelines.errors import UserError
from std_fast import cli
from std_fast.config import recipe as recipes
from std_fast.training import largest_batch
from std_fast.training.run import train
from std_fast.training.step import Trainer
from tests.faults.kills import small_recipe


def test_bisection():
    for limit in (0, 3, 4, 8, 99, 100):
        tried = []

        def fits(batch, limit=limit, tried=tried):
            tried.append(batch)
            return batch <= limit

        assert largest_batch.largest(fits, 128, 4) == limit // 4 * 4 and len(tried) <= 5


@pytest.mark.parametrize("limit", [12, 2])
def test_the_largest_batch_that_fits_is_named(image_folder, tmp_path, monkeypatch, capsys, limit):
    """From the command line: with stored targets, teachers or none, the trial takes what the run would take."""
    original, sizes = Trainer.step, []

    def step(self, mixed, *rest):
        sizes.append(len(mixed.labels_a))
        if len(mixed.labels_a) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        original(self, mixed, *rest)

    monkeypatch.setattr(Trainer, "step", step)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.dump(small_recipe(image_folder, tmp_path / "run", run={"batch": 24})))
    assert cli.main(["train", str(path), "--quiet"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("std-fast: run.batch: 24 does not fit in the device's memory")
    if limit == 12:
        assert last.endswith("the largest that fits is 12, found by trial: --run.batch 12")
        assert sizes[0] == 24 and sizes.count(12) == 2
        assert cli.main(["train", str(path), "--quiet", "--run.batch", "12", "--run.length", "2 steps"]) == 0
    else:
        assert "nor does 4" in last


@pytest.mark.parametrize("message", ["[enforce fail] DefaultCPUAllocator: can't allocate memory", "std::bad_alloc"])
def test_on_the_host_nothing_is_tried(image_folder, tmp_path, monkeypatch, message):
    calls = []

    def step(self, *rest):
        calls.append(1)
        raise RuntimeError(message)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(UserError, match="run.batch: memory was short with 8 images a step"):
        train(small_recipe(image_folder, tmp_path / "run"), quiet=True)
    assert len(calls) == 1


def test_other_errors_stay_what_they_are(image_folder, tmp_path, monkeypatch):
    def step(self, *rest):
        raise RuntimeError("something else")

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(RuntimeError, match="something else"):
        train(small_recipe(image_folder, tmp_path / "run"), quiet=True)


@pytest.mark.gpu
def test_on_a_gpu(image_folder, tmp_path):
    """Memory is capped, so that it runs out at once; the batch that is named then trains, half as many more do not."""
    options = {"patch_size": 16, "dim": 768, "depth": 12, "token_dim": 384, "channel_dim": 3072}
    recipe = small_recipe(
        image_folder,
        tmp_path / "run",
        data={"image_size": 224},
        student={"options": options},
        run={"batch": 24, "device": "cuda", "length": "2 steps"},
    )
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2.2 * 2**30 / total)
    try:
        with pytest.raises(UserError, match="the largest that fits is") as error:
            train(recipe, quiet=True)
        fits = int(re.search(r"--run.batch (\d+)", str(error.value))[1])
        assert 4 <= fits < 24
        again = small_recipe(
            image_folder,
            tmp_path / "again",
            data={"image_size": 224},
            student={"options": options},
            run={"batch": fits, "device": "cuda", "length": "2 steps"},
        )
        assert train(again, quiet=True)["steps"] == 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
