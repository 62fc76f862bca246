"""A few kills of each task, in every run of the tests; many in the campaign (`make faults`)."""

import os
import time
from pathlib import Path

import numpy as np

from tests.faults.kills import KilledTraining, small_recipe

KILLS = int(os.environ.get("STD_FAST_KILLS", "3"))


def test_a_training_killed_at_random_moments_ends_with_the_same_bits(image_folder: Path, tmp_path: Path) -> None:
    """STD_FAST_KILLS: how often."""
    seed = time.time_ns()
    print("seed", seed)
    recipe = small_recipe(image_folder, tmp_path / "run")
    seen = KilledTraining(recipe, tmp_path).run(KILLS, np.random.default_rng(seed))
    assert len(seen.moments) == KILLS and seen.finished >= 1
