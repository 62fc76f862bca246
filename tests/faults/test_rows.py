"""Some rows of the campaign (`make faults`), the quick ones, in every run of the tests."""

import json
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from tests.faults import rows  # noqa: F401 - registers them
from tests.faults.__main__ import as_json
from tests.faults.ground import FAULTS, Ground
from tests.faults.kills import KilledTraining
from tests.small_runs import small_recipe

QUICK = ("beton is cut off while in use", "has a flipped bit", "all checkpoints", "the reader of its log")


def test_a_table_carries_its_conditions() -> None:
    written = json.loads(as_json(28, []))
    assert written["seed"] == 28 and {"cpu", "versions", "commit", "date"} <= written["conditions"].keys()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.mark.parametrize("fault", [f for f in FAULTS if any(q in f.name for q in QUICK)], ids=lambda fault: fault.name)
def test_a_row(fault, shared: Path, tmp_path: Path) -> None:
    if "ffcv" in fault.name:
        pytest.importorskip("ffcv", reason="FFCV is not installed")
    if "dali" in fault.name:
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    seed = time.time_ns()
    print("seed", seed)
    fault.run(Ground(tmp_path, shared, np.random.default_rng([seed, zlib.crc32(fault.name.encode())])))


def test_a_training_killed_at_random_moments_ends_with_the_same_bits(image_folder: Path, tmp_path: Path) -> None:
    seed = time.time_ns()
    print("seed", seed)
    recipe = small_recipe(image_folder, tmp_path / "run", run={"length": "10 epochs"})
    seen = KilledTraining(recipe, tmp_path).run(2, np.random.default_rng(seed))
    assert len(seen.moments) == 2 and seen.finished >= 1
