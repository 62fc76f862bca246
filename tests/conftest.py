"""For all tests: fair threads for parallel workers, skipping what this machine cannot run, small data made once."""

import gc
import os
from pathlib import Path

import pytest

# Each worker of pytest-xdist takes its share of the cores. Set before torch and numba are imported; children inherit.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
for _name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, str(max(1, len(os.sched_getaffinity(0)) // _workers)))

REPOSITORY = Path(__file__).resolve().parent.parent
REHEARSED = os.environ.get("STD_FAST_REHEARSAL", "")  # the way (tests/rehearsal/ways.py); empty on a real GPU


def pytest_collection_finish() -> None:
    """What the imports have made stays: every run collects garbage first, and would search all of it each time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    for item in marked:
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        for marker in item.iter_markers("not_rehearsed") if REHEARSED else ():
            if REHEARSED in marker.kwargs.get("ways", (REHEARSED,)):
                item.add_marker(pytest.mark.skip(reason=f"not rehearsed: {marker.args[0]}"))


@pytest.fixture(scope="session")
def has_values() -> bool:
    """Whether what kernels compute is true: on a real GPU, and in one way of the rehearsal."""
    return REHEARSED in ("", "values")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images beside the checkout (ImageNet photographs, CIFAR-10); not part of the repository."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real images here: {folder} does not exist")
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SRC/CLASS/NN.jpg: 3 classes of 8 smooth JPEGs in colour, of various sizes, shortest side 40 pixels or more."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for label, name in enumerate(("ant", "bee", "cat")):
        (folder / name).mkdir()
        for number in range(8):
            height, width = (int(side) for side in random.integers(40, 90, 2))
            y, x = np.mgrid[0:height, 0:width] / 30.0
            waves = [np.sin((label + 1) * y + channel + number) + np.cos(x - channel * number) for channel in range(3)]
            pixels = np.round(127.5 + 60 * np.stack(waves, axis=-1)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:02}.jpg", quality=92)
    return folder


@pytest.fixture(scope="session")
def teacher(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain run of one step on `image_folder` at 16 px."""
    from std_fast.training.train import train
    from tests.small_runs import RESNET, small_recipe

    out = tmp_path_factory.mktemp("teacher") / "run"
    run = {"length": "1 step", "eval_every": "0 steps"}
    train(small_recipe(image_folder, out, student=RESNET, run=run), quiet=True)
    return out


@pytest.fixture(scope="session")
def beton(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`image_folder` converted, its images kept at their size."""
    from pipelines.convert.job import ConvertSettings, convert

    path = tmp_path_factory.mktemp("beton") / "images.beton"
    convert(str(image_folder), str(path), settings=ConvertSettings(size=None))
    return path
