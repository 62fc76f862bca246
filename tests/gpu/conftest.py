"""A tiny distillation on the GPU."""

from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file

from std_fast.config.recipe import Recipe
from std_fast.config.schema import from_dict
from tests.small_runs import ON_A_GPU

SMALL = ON_A_GPU | {
    "data": {"image_size": 16, "crop": {"scale": [0.5, 1.0]}, "threads": 1, "backend": "torch"},
    "run": ON_A_GPU["run"] | {"overlap": "off"},
}


@pytest.fixture(scope="session")
def small(image_folder, tmp_path_factory, has_values):
    """Two teachers, MINE at every second step, nothing compiled, nothing side by side."""
    folder = tmp_path_factory.mktemp("teacher")
    data = {**SMALL["data"], "train": str(image_folder), "val": str(image_folder)}
    # without values a loss is whatever lay in memory
    run = SMALL["run"] if has_values else {**SMALL["run"], "not_finite": "skip", "not_finite_limit": 1000}
    torch.manual_seed(0)
    weights = timm.create_model("test_resnet", num_classes=3).state_dict()
    save_file(weights, folder / "resnet.safetensors")
    teacher = {"name": "test_resnet", "weights": str(folder / "resnet.safetensors"), "image_size": 16}
    distill = {"mode": "std", "teachers": [teacher] * 2, "mine": {"every": "2 steps"}}
    return from_dict(Recipe, {**SMALL, "data": data, "distill": distill, "run": run})


@pytest.fixture
def at(small, tmp_path):
    """`at(name, **run)`: the recipe with another folder and other fields of its section `run`."""

    def changed(name="run", optim=None, **run):
        optim = replace(small.optim, **(optim or {}))
        return replace(small, optim=optim, run=replace(small.run, out=str(tmp_path / name), **run))

    return changed
