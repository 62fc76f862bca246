"""What is killed, and how it is known that nothing was lost: each task here is done once undisturbed, and again under
kills, and both must end with the same bytes."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from std_fast.config.recipe import Recipe
from std_fast.runtime.metrics import read_jsonl
from tests.killing import Child, Kills, get_ready, kill_again_and_again
from tests.small_runs import assert_same_bits, final_tensors, write_recipe


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
