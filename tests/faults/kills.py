"""A training that is killed, and how it is known that nothing was lost: it runs once undisturbed, then under kills, and
both must end with the same bytes."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from std_fast.config.recipe import Recipe
from std_fast.runtime.metrics import read_jsonl
from tests.killing import Child, Kills, get_ready, kill_again_and_again
from tests.small_runs import assert_same_bits, final_tensors, write_recipe

Leavings = tuple[dict[str, torch.Tensor], dict[str, bytes], list[int]]


@dataclass
class KilledTraining:
    """A training that is killed again and again. Its recipe must not be one of hours, which the clock decides; stored
    targets must lie in the run's folder, which is removed at each end."""

    recipe: Recipe
    folder: Path

    def __post_init__(self) -> None:
        self.out = Path(self.recipe.run.out)
        self.path = write_recipe(self.recipe, self.folder / "killed.yaml")

    def start(self, before: Callable[[], object] | None = None) -> Child:
        return Child(["train", self.path, "--quiet", "--resume"], self.folder / "killed.log", before=before)

    @functools.cached_property
    def undisturbed(self) -> tuple[float, Leavings]:
        """Seconds of a process that nobody disturbs, and what it leaves."""
        get_ready(self.folder)
        began = time.monotonic()
        with self.start() as child:
            assert child.wait() == 0, child.text
        duration, left = time.monotonic() - began, self.leavings()
        shutil.rmtree(self.out)
        return duration, left

    def leavings(self) -> Leavings:
        """Tensors of the last checkpoint, bytes of the targets, steps of the log."""
        targets = {file.name: file.read_bytes() for file in self.out.glob("targets/epoch-*.targets")}
        records = read_jsonl(self.out / "metrics.jsonl")
        return final_tensors(self.out), targets, [r["step"] for r in records if r["kind"] == "train"]

    def check_end(self) -> None:
        """Raises AssertionError unless it left what the undisturbed run left, and nothing else. Removes the folder."""
        (_, expected), found = self.undisturbed, self.leavings()
        assert_same_bits(found[0], expected[0])
        assert found[1] == expected[1], "stored targets differ"
        assert found[2] == expected[2], "lines of the log are missing or doubled"
        litter = [file.name for file in (self.out / "checkpoints").glob(".*")]
        assert not litter, f"drafts were left behind: {litter}"
        shutil.rmtree(self.out)

    def run(self, kills: int, random: np.random.Generator, killed: Callable[[], None] = lambda: None) -> Kills:
        """Kills it; `killed` looks at what a kill has left. Raises AssertionError as `check_end`."""
        duration, _ = self.undisturbed
        return kill_again_and_again(self.start, self.check_end, kills, duration, random, killed)
