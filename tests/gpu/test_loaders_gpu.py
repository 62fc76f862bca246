"""Loaders on a GPU: the CPU's batches, delivered by copies that run beside the consumer's work."""

import importlib.util
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import open_loader
from pipelines.errors import DataError
from pipelines.loaders.torch import TorchLoader
from pipelines.read.batch import LoaderSpec
from pipelines.read.crops import CropSpec
from pipelines.read.source import open_source
from tests.beton_tools import Sample, encoded, jpeg_sample, pixels, raw_sample, write_beton

pytestmark = pytest.mark.gpu

without = pytest.mark.not_rehearsed
INDEXES = "takes its batches from the device's memory by kernels"
BACKENDS = ["torch", pytest.param("resident", marks=without(INDEXES, ways=("lazy", "compiled")))]
BACKENDS += ["ffcv"] if importlib.util.find_spec("ffcv") else []
if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"):
    BACKENDS.append(pytest.param("dali", marks=without("the fake GPU has no DALI")))
SLOW = 20_000_000  # cycles, some 10 ms
# ffcv decodes on the host; resident adds in another order; nvJPEG has its own DCT and chroma, DALI its own filter.
LARGEST_MEAN = {"torch": 2.0, "ffcv": 0.0, "resident": 0.01, "dali": 1.5}


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    samples = [(raw_sample if i % 5 == 4 else jpeg_sample)(200 + i, 260 - i, i % 3, i) for i in range(64)]
    return str(write_beton(tmp_path_factory.mktemp("beton") / "some.beton", samples))


def spec(path, device):
    options = {"threads": 4, "device": device, "hw_decoder_load": 0.5}
    return LoaderSpec(path, 8, image_size=96, shuffle=True, drop_last=True, crop=CropSpec(), seed=3, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_are_the_cpu_s(beton, has_values, backend):
    """The consumer keeps the GPU busy, so that a copy that nobody waited for would be seen."""
    with open_loader(spec(beton, "cpu"), backend) as loader:
        expected = list(loader.epoch(1))
    found = []
    with open_loader(spec(beton, "cuda"), backend) as loader:
        for batch in loader.epoch(1):
            found.append((batch, batch.images.float().mean(dim=(1, 2, 3)), batch.images.clone()))
            torch.cuda._sleep(SLOW)
    torch.cuda.synchronize()
    for (batch, means, images), reference in zip(found, expected, strict=True):
        assert batch.images.device.type == batch.labels.device.type == batch.positions.device.type == "cuda"
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert np.array_equal(batch.indices, reference.indices)
        assert torch.equal(batch.labels.cpu(), reference.labels)
        assert torch.equal(batch.positions.cpu(), reference.positions)
        if has_values:
            assert torch.equal(images, batch.images)  # nothing changed under the consumer
            assert torch.allclose(means, images.float().mean(dim=(1, 2, 3)))
        difference = (batch.images.cpu().int() - reference.images.int()).abs().float()
        assert difference.mean() <= LARGEST_MEAN[backend]


@without("the fake GPU has no nvJPEG")
def test_torch_decodes_a_batch_s_jpegs_on_the_gpu(tmp_path):
    """Colour, gray and progressive by nvJPEG (a mean of 2 of 255: its DCT and chroma); raw and CMYK exactly, on the
    host. A damaged one is named.
    """
    image = pixels(120, 160)
    gray, cmyk = Image.fromarray(image).convert("L"), Image.fromarray(image).convert("CMYK")
    kinds = [encoded(image), encoded(np.asarray(gray)), encoded(image, progressive=True), encoded(image, subsampling=0)]
    stream = io.BytesIO()
    cmyk.save(stream, "JPEG")
    samples = [Sample(data, 120, 160, 0) for data in [*kinds, stream.getvalue()]] + [raw_sample(120, 160, 0)] * 2
    bad = Sample(kinds[0][: len(kinds[0]) // 2], 120, 160, 0)
    path = str(write_beton(tmp_path / "some.beton", [*samples, bad]))
    on_gpu = replace(spec(path, "cuda"), shuffle=False, drop_last=False, global_batch=7)
    with open_loader(replace(on_gpu, device="cpu"), "torch") as loader:
        plain = next(loader.epoch(0)).images.int()
    with TorchLoader(on_gpu, open_source(path)) as loader:
        assert loader.together
        epoch = loader.epoch(0)
        difference = (next(epoch).images.cpu().int() - plain).abs().float()
        with pytest.raises(DataError, match="sample 7"):
            next(epoch)
    assert (difference[:4].mean(dim=(1, 2, 3)) <= 2).all()
    assert not difference[4:].any()
