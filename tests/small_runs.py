"""Recipes of runs of a second, and what such runs leave."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from std_fast.config import recipe as recipes
from std_fast.config.recipe import Recipe
from std_fast.config.schema import from_dict
from std_fast.runtime import checkpoint
from std_fast.training.run import Run, Stopped
from std_fast.training.train import train

MIXER = {"name": "mixer", "options": {"patch_size": 4, "dim": 16, "depth": 3, "token_dim": 8, "channel_dim": 32}}
OPTIM = {"lr": 1e-3, "lr_batch": 0, "warmup": "2 steps", "ema": 0.9, "ema_batch": 8, "clip": 1.0}
CYCLE = {"layers": [1, 1, 2], "embed_dims": [8, 8, 16], "mlp_ratios": [2, 2, 2], "stem_stride": 1}
EARLY = {"name": "cyclemlp", "options": CYCLE, "early_size": 16, "early_share": 0.5}
"""a student with progressive resizing"""
RESNET = {"name": "test_resnet", "options": {}, "drop_path": 0.0}
ON_A_GPU: dict = {
    "student": MIXER | {"drop_path": 0.2},
    "optim": OPTIM,
    "run": {
        "batch": 8, "length": "3 epochs", "eval_every": "1 epoch", "log_every": 3, "device": "cuda", "compile": "off",
    },
}  # fmt: skip
"""sections of a recipe, but for data and teachers"""


def small_recipe(on: Path, out: Path, **sections: dict) -> Recipe:
    """A plain Mixer of a second's training on a dataset (image folder or beton), into `out`; sections: over it."""
    values: dict = {
        "data": {"train": str(on), "val": str(on), "image_size": 16, "crop": {"scale": [0.5, 1.0]}, "threads": 1,
                 "backend": "torch"},
        "augment": {"erase": 0.25},
        "student": MIXER | {"drop_path": 0.2},
        "optim": OPTIM,
        "run": {"batch": 8, "length": "14 epochs", "eval_every": "5 epochs", "log_every": 2, "device": "cpu",
                "save_every": "0.1 seconds", "out": str(out)},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return from_dict(Recipe, values)


def at(recipe: Recipe, out: Path, **run: object) -> Recipe:
    """The recipe into another folder, with other fields of its section `run`."""
    return replace(recipe, run=replace(recipe.run, out=str(out), **run))


def train_until(recipe: Recipe, step: int) -> None:
    """Trains until it is asked to stop, after this step, which is saved."""

    def ask(run: Run) -> None:
        run.stop_wanted = run.step == step

    with pytest.raises(Stopped, match=f"step {step}"):
        train(recipe, quiet=True, on_step=ask)


def write_recipe(recipe: Recipe, path: Path) -> str:
    path.write_text(recipes.dump(recipe), encoding="utf-8")
    return str(path)


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Everything in a run's newest checkpoint: weights, averages, the optimizer's state, MINE's."""
    found = checkpoint.newest(run / "checkpoints")
    assert found is not None, f"{run} holds no complete checkpoint"
    return found[1]


def assert_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        same = torch.equal(tensor.reshape(-1).view(torch.uint8), second[name].reshape(-1).view(torch.uint8))
        assert same, f"{name} differs"


def small_study(folder: Path, images: Path) -> list[str]:
    """What the evidence study of size smoke needs, made in `folder`: its images, the same for training and validation,
    and two teachers of random weights; their folders."""
    import timm
    import torch
    from safetensors.torch import save_file

    from benchmarks.study_sizes import SIZES

    for part in ("train", "val"):
        (folder / "imagenette").mkdir(parents=True, exist_ok=True)
        (folder / "imagenette" / part).symlink_to(images.resolve())
    (folder / "teachers").mkdir()
    for name in SIZES["smoke"].teachers:
        torch.manual_seed(0)
        save_file(timm.create_model(name, num_classes=3).state_dict(), folder / "teachers" / f"{name}.safetensors")
    return [str(folder / "imagenette"), str(folder / "teachers")]


def store_run(
    folder: Path, recipe: Recipe, tensors: dict[str, torch.Tensor], classes: int, names: list[str] | None = None
) -> Path:
    """A run's folder with one checkpoint of one step, as training leaves it."""
    meta = {"step": 1, "recipe": recipes.dump(recipe), "num_classes": classes, "class_names": names}
    checkpoint.save(folder / "checkpoints" / "step-00000001.safetensors", tensors, meta)
    write_recipe(recipe, folder / "recipe.yaml")
    return folder
