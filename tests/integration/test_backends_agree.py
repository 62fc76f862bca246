"""On photographs: the same boxes, labels and order from every backend, and how far their pixels differ."""

import importlib.util

import numpy as np
import pytest
import torch

from pipelines import open_loader
from pipelines.convert.job import ConvertSettings, convert
from pipelines.read.batch import LoaderSpec
from pipelines.read.crops import CropSpec

needs_ffcv = pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed")
needs_dali = pytest.mark.skipif(importlib.util.find_spec("nvidia.dali") is None, reason="DALI is not installed")
NATIVE = [pytest.param("ffcv", marks=needs_ffcv), pytest.param("dali", marks=needs_dali)]
CLASSES = 40
RANDOM, CENTRE = CropSpec(), CropSpec("center")


@pytest.fixture(scope="module")
def photographs(shared_data, tmp_path_factory):
    """A folder of 40 of the photographs, one a class, by links."""
    folder = tmp_path_factory.mktemp("photographs")
    for place in sorted((shared_data / "imagenet-sample").iterdir())[::22][:CLASSES]:
        (folder / place.name).symlink_to(place)
    return str(folder)


@pytest.fixture(scope="module")
def beton(photographs, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("beton") / "photographs.beton")
    convert(photographs, path, settings=ConvertSettings(size=256))
    return path


def one_epoch(path, backend, crop=RANDOM, size=160, resample="auto"):
    spec = LoaderSpec(
        path, 8, image_size=size, shuffle=crop is RANDOM, drop_last=crop is RANDOM, crop=crop, seed=1, resample=resample
    )
    with open_loader(spec, backend) as loader:
        return list(loader.epoch(1))


def difference(first, second):
    """Mean and maximum absolute difference of the pixels, of 255, of batches that agree in all else."""
    assert len(first) == len(second) == CLASSES // 8
    means, largest = [], 0
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.indices, b.indices)
        assert torch.equal(a.labels, b.labels) and torch.equal(a.positions, b.positions)
        apart = (a.images.int() - b.images.int()).abs()
        means.append(apart.float().mean().item())
        largest = max(largest, apart.max().item())
    return float(np.mean(means)), largest


@pytest.mark.parametrize("crop", [RANDOM, CENTRE], ids=["random", "centre"])
@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("backend", NATIVE)
def test_they_decode_alike_and_filter_alike(beton, backend, crop, resample):
    """All decode exactly and use PIL's filter; what remains is the filter's weights, of 12 bits here, 15 in torch."""
    mean, largest = difference(*(one_epoch(beton, name, crop, resample=resample) for name in (backend, "torch")))
    assert 0 < mean < 0.05 and largest <= 3


@pytest.mark.parametrize("backend", NATIVE)
def test_photographs_of_a_folder_agree_too(photographs, backend):
    mean, largest = difference(*(one_epoch(photographs, name) for name in (backend, "torch")))
    assert 0 < mean < 0.05 and largest <= 3


def test_resident_rounds_once_and_the_others_twice(beton):
    mean, largest = difference(*(one_epoch(beton, backend) for backend in ("resident", "torch")))
    assert 0 < mean < 0.3 and largest <= 2


@needs_ffcv
def test_ffcv_s_own_area_filter_is_under_2_of_255_away(beton):
    """INTER_AREA averages entire pixels where the antialiased triangle looks a little farther: the filter is the cause,
    since both decode exactly. (Magnified crops are bilinear in both.)"""
    mean, _ = difference(one_epoch(beton, "ffcv", resample="area"), one_epoch(beton, "torch"))
    assert 0.1 < mean < 2
