"""A batch that is too large: one line that names the fields to lower, exit code 2. On a GPU really, on a CPU by a step
that raises what torch raises."""

import pytest
import torch

from pipelines.errors import UserError
from std_fast import cli
from std_fast.config import recipe as recipes
from std_fast.training.step import Trainer
from std_fast.training.train import train
from tests.small_runs import small_recipe


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "run.batch: 8 does not fit in the device's memory (CUDA out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "run.batch: memory was short with 8 images"),
        (MemoryError("std::bad_alloc"), "run.batch: memory was short with 8 images"),
    ],
)
def test_the_line_names_the_batch(image_folder, tmp_path, monkeypatch, capsys, error, expected):
    def step(self, *rest):
        raise error

    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.dump(small_recipe(image_folder, tmp_path / "run")))
    with monkeypatch.context() as changed:
        changed.setattr(Trainer, "step", step)
        assert cli.main(["train", str(path), "--quiet"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"std-fast: {expected}") and "; lower it, " in last


def test_the_error_is_forgotten_with_all_that_it_held(image_folder, tmp_path, monkeypatch):
    """So that a program can train again with a smaller batch in the same process."""

    def step(self, *rest):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(UserError) as caught:
        train(small_recipe(image_folder, tmp_path / "run"), quiet=True)
    assert caught.value.__context__ is None and caught.value.__cause__ is None


def test_other_errors_stay_what_they_are(image_folder, tmp_path, monkeypatch):
    def step(self, *rest):
        raise RuntimeError("something else")

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(RuntimeError, match="something else"):
        train(small_recipe(image_folder, tmp_path / "run"), quiet=True)


@pytest.mark.gpu
@pytest.mark.not_rehearsed("a run reads its losses, and goes on by them", ways=("lazy", "compiled"))
def test_on_a_gpu(image_folder, tmp_path):
    """Memory is capped, so that it runs out at once; a smaller batch then trains in the same process."""
    options = {"patch_size": 4, "dim": 128, "depth": 6, "token_dim": 128, "channel_dim": 512}

    def recipe(name: str, batch: int):
        return small_recipe(
            image_folder,
            tmp_path / name,
            data={"image_size": 128},
            student={"options": options},
            run={"batch": batch, "device": "cuda", "length": "2 steps", "compile": "off"},
        )

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2**30 / total)
    try:
        with pytest.raises(UserError, match="run.batch: 24 does not fit in the device's memory"):
            train(recipe("run", 24), quiet=True)
        assert train(recipe("again", 4), quiet=True)["steps"] == 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
