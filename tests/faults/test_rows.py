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

QUICK = ("beton is cut off while", "has a flipped bit", "all checkpoints", "the reader of its log", "convert: kill")


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
