"""What `std-fast bench loader` compares: the loaders of this project, the libraries that they stand on, decoding alone.

All read the same encoded images: libraries that read files get the beton's JPEGs from `extract`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.errors import UserError
from pipelines.read.batch import LoaderSpec
from pipelines.read.crops import CropSpec
from pipelines.read.settings import Resample

Epoch = Callable[[int], Iterator[int]]
"""epoch number -> sizes of the batches, each given when it is there"""


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    data: str
    """a beton"""
    files: str
    """folder with the same images as files, CLASS/NUMBER.jpg"""
    threads: int
    batch: int = 64
    image_size: int = 224
    device: str = "cpu"


# The loaders of this project


def loader_spec(s: Settings, resample: Resample = "auto") -> LoaderSpec:
    return LoaderSpec(
        s.data,
        s.batch,
        image_size=s.image_size,
        shuffle=True,
        drop_last=True,
        crop=CropSpec(),
        device=s.device,
        threads=s.threads,
        resample=resample,
    )


def _ours(backend: str) -> Callable[[Settings], Epoch]:
    def start(s: Settings) -> Epoch:
        from pipelines import open_loader

        loader = open_loader(loader_spec(s), backend)
        return lambda epoch: (len(batch.labels) for batch in loader.epoch(epoch))

    return start


# The libraries that they stand on, as their documentation shows them


def _ffcv_loader(s: Settings) -> Epoch:
    """FFCV's Loader with its random-crop decoder."""
    import torch
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToDevice, ToTensor, ToTorchImage

    image: list[Any] = [RandomResizedCropRGBImageDecoder((s.image_size, s.image_size)), ToTensor()]
    label: list[Any] = [IntDecoder(), ToTensor()]
    if s.device != "cpu":
        image.append(ToDevice(torch.device(s.device), non_blocking=True))
        label.append(ToDevice(torch.device(s.device), non_blocking=True))
    image.append(ToTorchImage())
    loader = Loader(
        s.data,
        batch_size=s.batch,
        num_workers=s.threads,
        order=OrderOption.RANDOM,
        seed=0,
        drop_last=True,
        pipelines={"image": image, "label": label},
    )
    return lambda epoch: (len(batch[0]) for batch in loader)


def _dali_reader(s: Settings) -> Epoch:
    """DALI's file reader with image_random_crop and resize."""
    import torch
    from nvidia.dali import fn, pipeline_def

    on_gpu = torch.device(s.device).type == "cuda"
    device: Any = torch.device(s.device).index or 0 if on_gpu else None

    @pipeline_def(batch_size=s.batch, num_threads=s.threads, device_id=device)
    def pipeline() -> Any:
        encoded, labels = fn.readers.file(file_root=s.files, random_shuffle=True, name="files", seed=0)
        images = fn.decoders.image_random_crop(encoded, device="mixed" if on_gpu else "cpu", seed=1)
        return fn.resize(images, size=[s.image_size, s.image_size]), labels

    pipe = pipeline()
    pipe.build()
    steps = pipe.epoch_size("files") // s.batch

    def epoch(number: int) -> Iterator[int]:
        for _ in range(steps):
            images, _labels = pipe.run()
            yield len(images)

    return epoch


def _data_loader(s: Settings) -> Epoch:
    """torch.utils.data.DataLoader over torchvision's ImageFolder and transforms, uint8."""
    import torch
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    dataset = ImageFolder(s.files, v2.Compose([v2.RandomResizedCrop(s.image_size, antialias=True), v2.PILToTensor()]))
    loader = torch.utils.data.DataLoader(
        dataset,
        s.batch,
        shuffle=True,
        drop_last=True,
        num_workers=s.threads,
        persistent_workers=True,
        pin_memory=s.device != "cpu",
    )
    return lambda epoch: (len(images.to(s.device, non_blocking=True)) for images, _ in loader)


def _timm_loader(s: Settings) -> Epoch:
    """timm's create_loader, its random crop alone; on a CPU up to its uint8 batches, without the normalisation."""
    import torch
    from timm.data import create_dataset, create_loader

    loader = create_loader(
        create_dataset("", s.files),
        input_size=(3, s.image_size, s.image_size),
        batch_size=s.batch,
        is_training=True,
        hflip=0.0,
        color_jitter=0.0,
        interpolation="bilinear",
        num_workers=s.threads,
        persistent_workers=True,
        use_prefetcher=True,
        pin_memory=s.device != "cpu",
        device=torch.device(s.device),
    )
    batches = loader if s.device != "cpu" else loader.loader
    return lambda epoch: (len(images) for images, _ in batches)


def _decoding(s: Settings) -> Epoch:
    """Decoding alone: full images by libturbojpeg, exact DCT, in threads; no reading order, no crop, no resizing."""
    from pipelines.read.decode import decode_rgb
    from pipelines.read.source import open_source

    source = open_source(s.data)
    pool = ThreadPoolExecutor(s.threads)

    def decode(start: int) -> int:
        stop = min(start + s.batch, source.num_samples)
        for index in range(start, stop):
            decode_rgb(source, index)
        return stop - start

    return lambda epoch: pool.map(decode, range(0, source.num_samples, s.batch))


CONTESTANTS: dict[str, Callable[[Settings], Epoch]] = {
    "ffcv": _ours("ffcv"),
    "FFCV's Loader": _ffcv_loader,
    "dali": _ours("dali"),
    "DALI's file reader": _dali_reader,
    "torch": _ours("torch"),
    "torch DataLoader": _data_loader,
    "timm's create_loader": _timm_loader,
    "decoding alone": _decoding,
}
PAIRS = {
    "ffcv": ("FFCV's Loader",),
    "dali": ("DALI's file reader",),
    "torch": ("torch DataLoader", "timm's create_loader"),
}
"""our backend -> what it stands on, or is an alternative to"""
NEEDS = {"ffcv": "ffcv", "dali": "nvidia.dali"}
"""backend -> the module that it needs"""


def extract(data: str, folder: str) -> tuple[int, dict[str, float]]:
    """Writes a beton's JPEGs to folder/CLASS/NUMBER.jpg; returns how many and what they are like."""
    from pipelines.read.source import open_source

    source = open_source(data)
    everything = np.arange(source.num_samples)
    if not all(source.is_jpeg(index) for index in everything.tolist()):
        raise UserError(f"{data} holds raw images, which the libraries that read files cannot take; convert as jpg")
    for label in np.unique(source.labels).tolist():
        Path(folder, f"{label:06}").mkdir()
    sizes = []
    for index in everything.tolist():
        encoded = source.read(index)
        sizes.append(encoded.size)
        Path(folder, f"{source.labels[index]:06}", f"{index:08}.jpg").write_bytes(encoded.tobytes())
    heights, widths = source.sizes(everything)
    shape = {"mean_height": heights.mean(), "mean_width": widths.mean(), "mean_bytes": np.mean(sizes)}
    return source.num_samples, {name: round(float(value), 1) for name, value in shape.items()}
