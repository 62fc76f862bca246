"""FFCV reads the betons that we write without it."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from pipelines.convert.job import ConvertSettings, convert
from pipelines.read.beton import BetonSource
from pipelines.read.decode import decode_rgb
from tests.beton_tools import encoded, pixels

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed")


def test_ffcv_reads_what_we_write(tmp_path: Path) -> None:
    """FFCV's Reader, and its Loader with both memory managers, over several pages, JPEG and raw: pixels and labels."""
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.reader import Reader

    for number in range(24):
        folder = tmp_path / "src" / str(number % 3)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(encoded(pixels(300, 400, number)))
    path = str(tmp_path / "x.beton")
    convert(str(tmp_path / "src"), path, settings=ConvertSettings(mode="proportion", page_size=1 << 21))
    source = BetonSource(path)
    assert 0 < source.jpeg.sum() < 24
    assert len(np.unique(source.pointers >> np.uint64(21))) > 1
    reader = Reader(path)
    assert reader.num_samples == 24 and list(reader.handlers) == ["image", "label"]
    assert (reader.alloc_table["size"] == source.byte_sizes).all()
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
    for os_cache in (True, False):
        loader = Loader(path, 8, num_workers=1, os_cache=os_cache, order=OrderOption.SEQUENTIAL, pipelines=pipelines)
        index = 0
        for images, labels in loader:
            for image, label in zip(np.asarray(images), np.asarray(labels), strict=True):
                assert int(label[0]) == source.labels[index]
                # FFCV asks for the fast DCT, which is a little less exact.
                assert np.abs(image.astype(int) - decode_rgb(source, index)).mean() < 2
                index += 1
        assert index == 24
