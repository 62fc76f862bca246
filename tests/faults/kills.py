"""What is killed, and how it is known that nothing was lost: each task here is done once undisturbed, and again under
kills, and both must end with the same bytes."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from std_fast.config import recipe as recipes
from std_fast.config.recipe import Recipe
from std_fast.config.schema import from_dict
from std_fast.runtime import checkpoint
from std_fast.runtime.metrics import read_jsonl
from tests.killing import Child, Kills, get_ready, kill_again_and_again


def small_recipe(on: Path, out: Path, **sections: dict) -> Recipe:
    """A plain Mixer of a second's training on a dataset (image folder or beton), into `out`; sections: over it."""
    values: dict = {
        "data": {"train": str(on), "val": str(on), "image_size": 16, "crop": {"scale": [0.5, 1.0]}, "threads": 1,
                 "backend": "torch"},
        "augment": {"erase": 0.25},
        "student": {"name": "mixer", "drop_path": 0.2,
                    "options": {"patch_size": 4, "dim": 16, "depth": 3, "token_dim": 8, "channel_dim": 32}},
        "optim": {"lr": 1e-3, "lr_batch": 0, "warmup": "2 steps", "ema": 0.9, "ema_batch": 8, "clip": 1.0},
        "run": {"batch": 8, "length": "14 epochs", "eval_every": "5 epochs", "log_every": 2, "device": "cpu",
                "save_every": "0.1 seconds", "out": str(out)},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return from_dict(Recipe, values)


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


@dataclass
class KilledTraining:
    """A training that is killed again and again. Its recipe must not be one of hours, which the clock decides."""

    recipe: Recipe
    folder: Path

    def run(self, kills: int, random: np.random.Generator) -> Kills:
        """Kills it; raises AssertionError unless each end has the bits of the undisturbed run and a complete record."""
        out = Path(self.recipe.run.out)
        path = write_recipe(self.recipe, self.folder / "killed.yaml")

        def start() -> Child:
            return Child(["train", path, "--quiet", "--resume"], self.folder / "killed.log")

        get_ready(self.folder)
        began = time.monotonic()
        with start() as child:
            assert child.wait() == 0, child.text
        duration = time.monotonic() - began
        expected = final_tensors(out)
        steps = [record["step"] for record in read_jsonl(out / "metrics.jsonl") if record["kind"] == "train"]
        shutil.rmtree(out)

        def finished() -> None:
            assert_same_bits(final_tensors(out), expected)
            records = [record["step"] for record in read_jsonl(out / "metrics.jsonl") if record["kind"] == "train"]
            assert records == steps, "lines of the log are missing or doubled"
            litter = [file.name for file in (out / "checkpoints").glob(".*")]
            assert not litter, f"drafts were left behind: {litter}"
            shutil.rmtree(out)

        return kill_again_and_again(start, finished, kills, duration, random)
