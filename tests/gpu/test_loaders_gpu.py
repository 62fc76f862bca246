"""Loaders on a GPU: the CPU's batches, delivered by copies that run beside the consumer's work."""

import importlib.util

import numpy as np
import pytest
import torch

from pipelines import open_loader
from pipelines.batch import LoaderSpec
from pipelines.crops import CropSpec
from tests.beton_tools import jpeg_sample, raw_sample, write_beton

pytestmark = pytest.mark.gpu

BACKENDS = ["torch", "resident"]
BACKENDS += ["ffcv"] if importlib.util.find_spec("ffcv") else []
BACKENDS += ["dali"] if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali") else []
# ffcv and torch decode on the host; resident adds in another order; nvJPEG has its own DCT, DALI its own filter.
LARGEST_MEAN = {"torch": 0.0, "ffcv": 0.0, "resident": 0.01, "dali": 1.5}


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    samples = [(raw_sample if i % 5 == 4 else jpeg_sample)(200 + i, 260 - i, i % 3, i) for i in range(64)]
    return str(write_beton(tmp_path_factory.mktemp("beton") / "some.beton", samples))


def spec(path, device):
    return LoaderSpec(path, 96, 8, shuffle=True, drop_last=True, crop=CropSpec(), seed=3, threads=4, device=device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_are_the_cpu_s(beton, backend):
    """The consumer keeps the GPU busy, so that a copy that nobody waited for would be seen."""
    options = {"hw_decoder_load": 0.5} if backend == "dali" else {}
    with open_loader(spec(beton, "cpu"), backend) as loader:
        expected = list(loader.epoch(1))
    busy = torch.randn(2048, 2048, device="cuda")
    found = []
    with open_loader(spec(beton, "cuda"), backend, **options) as loader:
        for batch in loader.epoch(1):
            found.append((batch, batch.images.float().mean(dim=(1, 2, 3)), batch.images.clone()))
            for _ in range(20):
                busy = torch.nn.functional.normalize(busy @ busy)
    torch.cuda.synchronize()
    for (batch, means, images), reference in zip(found, expected, strict=True):
        assert batch.images.device.type == batch.labels.device.type == batch.positions.device.type == "cuda"
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert np.array_equal(batch.indices, reference.indices)
        assert torch.equal(batch.labels.cpu(), reference.labels)
        assert torch.equal(batch.positions.cpu(), reference.positions)
        assert torch.equal(images, batch.images)  # nothing changed under the consumer
        assert torch.allclose(means, images.float().mean(dim=(1, 2, 3)))
        difference = (images.cpu().int() - reference.images.int()).abs().float()
        assert difference.mean() <= LARGEST_MEAN[backend]
