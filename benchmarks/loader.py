"""How fast, and at what cost, the loaders give batches; in turns with them, the plain libraries that they stand on.

Every contestant lives in a process of its own and is asked for one epoch after the other, in turns, so that all meet
the same weather on the machine; between its turns it does nothing. All read the same encoded images: the rivals that
want files get the beton's JPEGs, written to a temporary folder. A turn gives: images per second (from asking for
the epoch to its last batch) and CPU time per image (the process and its children). Once: seconds from opening (imports
of the library included, of torch not) to the first batch, the most memory beyond what the process held before, and the
images per second when the files have to be read from the disk.

    std-fast bench loader --data X.beton --json
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import mmap
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmarks import harness
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


def _spec(s: Settings, resample: Resample = "auto") -> LoaderSpec:
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

        loader = open_loader(_spec(s), backend)
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
_NEEDS = {"ffcv": "ffcv", "dali": "nvidia.dali"}


# How alike the pixels are

_CAUSES = {
    "ffcv": "the filter's weights: 12 bits here, 15 in torch",
    "ffcv, area": "FFCV's filter, INTER_AREA, instead of the antialiased triangle",
    "dali": "on a CPU as ffcv; on a GPU nvJPEG's DCT and DALI's filter",
    "resident": "rounds to 8 bits once instead of after each pass",
}
_COMPARED_STEPS = 2


def differences(settings: Settings, names: list[str]) -> list[dict[str, Any]]:
    """Mean and largest absolute difference of the first batches' pixels, of 255, from those of the torch backend, after
    checking that boxes, labels and order are the same."""
    from pipelines import open_loader
    from pipelines.loaders.resident import decoded_bytes, free_memory
    from pipelines.read.source import open_source

    def first_batches(name: str) -> list[Any]:
        backend, _, resample = name.partition(", ")
        with open_loader(_spec(settings, cast(Resample, resample or "auto")), backend) as loader:
            return [batch for batch, _ in zip(loader.epoch(0), range(_COMPARED_STEPS), strict=False)]

    reference = first_batches("torch")
    rows = []
    for name in (*names, *(["ffcv, area"] if "ffcv" in names else []), "resident"):
        device = reference[0].images.device
        if name == "torch" or (
            name == "resident" and decoded_bytes(open_source(settings.data)) > free_memory(device) / 4
        ):
            continue
        means, largest = [], 0
        for batch, other in zip(first_batches(name), reference, strict=True):
            if not all(a.equal(b) for a, b in ((batch.labels, other.labels), (batch.positions, other.positions))):
                raise UserError(
                    f"bench: {name} gives other samples than torch: a fault of this program, please report it"
                )
            apart = (batch.images.int() - other.images.int()).abs()
            means.append(apart.float().mean().item())
            largest = max(largest, int(apart.max()))
        rows.append(
            {"pair": f"{name} and torch", "mean": float(np.mean(means)), "largest": largest, "cause": _CAUSES[name]}
        )
    return rows


# Measuring


def _of_tree(read: Callable[[int], int]) -> int:
    """Sum of a figure over this process and its descendants."""
    total, todo = 0, [os.getpid()]
    while todo:
        pid = todo.pop()
        try:
            total += read(pid)
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                todo += [int(child) for child in task.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            pass
    return total


def _cpu_seconds() -> float:
    def ticks(pid: int) -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 0 if pid == os.getpid() else int(fields[11]) + int(fields[12])  # user, system

    return time.process_time() + _of_tree(ticks) / os.sysconf("SC_CLK_TCK")


def _memory() -> float:
    """MiB that the process tree holds, without pages of files."""

    def kilobytes(pid: int) -> int:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)

    return _of_tree(kilobytes) / 1024


def _serve(connection: Any, name: str, settings: Settings) -> None:
    """A contestant's process: takes epoch numbers, returns the measurements of each."""
    import torch

    try:
        before, started = _memory(), time.perf_counter()
        epoch = CONTESTANTS[name](settings)
        opened: float | None = None
        while (number := connection.recv()) is not None:
            cpu, began = _cpu_seconds(), time.perf_counter()
            sizes, most, first = [], 0.0, 0.0
            for size in epoch(number):
                first = first or time.perf_counter()
                sizes.append(size)
                most = max(most, _memory())
            if settings.device != "cpu":
                torch.cuda.synchronize()
            ended = time.perf_counter()
            opened = opened or first - started
            connection.send(
                {
                    "images_per_second": sum(sizes) / (ended - began),
                    "after_first_batch": sum(sizes[1:]) / (ended - first),
                    "cpu_us_per_image": 1e6 * (_cpu_seconds() - cpu) / sum(sizes),
                    "first_batch_seconds": opened,
                    "memory_mib": most - before,
                }
            )
    except Exception as error:  # reported by the parent, with the contestant's name
        connection.send(f"{type(error).__name__}: {error}")


class _Contestant:
    """A contestant in its process, started when it is first asked."""

    def __init__(self, name: str, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._connection, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, name, settings))
        self._process.start()
        child.close()

    def run(self, number: int) -> dict[str, float]:
        self._connection.send(number)
        try:
            answer = self._connection.recv()
        except EOFError:
            answer = f"its process ended with code {self._process.exitcode}"
        if isinstance(answer, str):
            raise UserError(f"bench: {self.name} failed ({answer}); leave it out with --backends")
        return answer

    def close(self) -> None:
        try:
            self._connection.send(None)
        except OSError:
            pass
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def _extract(data: str, folder: str) -> tuple[int, dict[str, float]]:
    """Writes a beton's JPEGs to folder/CLASS/NUMBER.jpg; returns how many and what they are like."""
    from pipelines.read.source import open_source

    source = open_source(data)
    everything = np.arange(source.num_samples)
    if not all(source.is_jpeg(index) for index in everything.tolist()):
        raise UserError(f"bench: {data} holds raw images, which the rivals that read files cannot take; convert as jpg")
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


def _drop_from_cache(paths: list[str]) -> float:
    """Asks the kernel to forget files; returns the share of their pages that it still holds."""
    libc = ctypes.CDLL(None)
    held = pages = 0
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as view:
                data = np.frombuffer(view, np.uint8)
                count = -(-data.size // mmap.PAGESIZE)
                there = (ctypes.c_ubyte * count)()
                libc.mincore(ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(data.size), there)
                del data
                held += sum(byte & 1 for byte in there)
                pages += count
    return held / pages


def main(
    data: str,
    *,
    backends: tuple[str, ...] = ("ffcv", "dali", "torch"),
    repeats: int = 7,
    threads: int = 0,
    batch: int = 64,
    image_size: int = 224,
    device: str = "cpu",
    cold: bool = True,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measures our `backends`, what each stands on (PAIRS), and decoding alone, on a beton of JPEGs.

    Each is opened and asked for one epoch to warm up, then all take `repeats` turns. With `cold`, each is then started
    anew after the kernel has been made to forget the files, if it does. Backends that are not installed are left out,
    and said so. Returns a JSON-able report. Raises UserError.
    """
    from pipelines.loaders.base import available_cores

    for backend in backends:
        if backend not in PAIRS:
            raise UserError(f"backends: {backend!r} is unknown: choose from {', '.join(PAIRS)}")
    say = progress or (lambda line: None)
    missing = [name for name in backends if name in _NEEDS and not _installed(_NEEDS[name])]
    names = [name for ours in backends if ours not in missing for name in (ours, *PAIRS[ours])] + ["decoding alone"]
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="std-fast-bench-") as files:
        count, shape = _extract(data, files)
        if count < 2 * batch:
            raise UserError(
                f"bench: {data} has {count} images, too few for batches of {batch}: take at most {count // 2}"
            )
        settings = Settings(data, files, threads or available_cores(), batch, image_size, device)
        turns = _alternate(names, settings, repeats, say)
        cold_rows, still_held = _cold(names, settings, say) if cold else ({}, None)
        pixels = differences(settings, [name for name in backends if name not in missing])
    rows = []
    for name in names:
        values_of = {key: [turn[key] for turn in turns[name][1:]] for key in ("images_per_second", "cpu_us_per_image")}
        rows.append(
            {
                "name": name,
                **{key: _summary(values) for key, values in values_of.items()},
                "turns": [round(value, 1) for value in values_of["images_per_second"]],
                "first_batch_seconds": turns[name][0]["first_batch_seconds"],
                "memory_mib": max(turn["memory_mib"] for turn in turns[name]),
                "cold_images_per_second": cold_rows.get(name),
            }
        )
    settings_shown = {key: value for key, value in asdict(settings).items() if key != "files"}
    return {
        "question": "loader",
        "variant": Path(data).stem,
        "conditions": harness.conditions(device) | {"load_average": load_before, "load_average_after": os.getloadavg()},
        "settings": settings_shown | {"repeats": repeats, "images": count, **shape},
        "left_out": missing,
        "cold_share_still_cached": still_held,
        "rows": rows,
        "ratios": _ratios(rows, backends, missing),
        "pixel_differences": pixels,
    }


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _alternate(
    names: list[str], settings: Settings, repeats: int, say: Callable[[str], None]
) -> dict[str, list[dict[str, float]]]:
    """Measurements of each contestant's turns, the first to warm up."""
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    contestants: list[_Contestant] = []
    try:
        for turn in range(repeats + 1):
            for place, name in enumerate(names):
                if turn == 0:
                    contestants.append(_Contestant(name, settings))
                turns[name].append(contestants[place].run(turn))
                say(f"turn {turn}/{repeats}: {name}: {turns[name][-1]['images_per_second']:.0f} images/s")
    finally:
        for contestant in contestants:
            contestant.close()
    return turns


def _cold(names: list[str], settings: Settings, say: Callable[[str], None]) -> tuple[dict[str, float | None], float]:
    """Images per second of a fresh process after dropping the files from the page cache, from its first batch on (what
    comes before is importing and compiling); None where the files stay."""
    paths = [settings.data, *(str(path) for path in Path(settings.files).rglob("*.jpg"))]
    rows: dict[str, float | None] = {}
    most = 0.0
    for name in names:
        held = _drop_from_cache(paths)
        most = max(most, held)
        if held > 0.05:
            rows[name] = None
            continue
        contestant = _Contestant(name, settings)
        try:
            rows[name] = contestant.run(0)["after_first_batch"]
        finally:
            contestant.close()
        say(f"cold: {name}: {rows[name]:.0f} images/s")
    return rows, most


def _ratios(rows: list[dict[str, Any]], backends: tuple[str, ...], missing: list[str]) -> list[dict[str, Any]]:
    """Ours over the rival: medians of images per second and of CPU time per image (the rival's over ours)."""
    by_name = {row["name"]: row for row in rows}
    ratios = []
    for ours in backends:
        for rival in PAIRS[ours] if ours not in missing else ():
            a, b = by_name[ours], by_name[rival]
            each = [x / y for x, y in zip(a["turns"], b["turns"], strict=True)]
            ratios.append(
                {
                    "ours": ours,
                    "rival": rival,
                    "images_per_second": a["images_per_second"]["median"] / b["images_per_second"]["median"],
                    "turn_by_turn": _summary(each),
                    "cpu_time": b["cpu_us_per_image"]["median"] / a["cpu_us_per_image"]["median"],
                }
            )
    return ratios


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        "| loader | images/s | lowest to highest | CPU us/image | first batch, s | memory, MiB | cold, images/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        speed, cold = row["images_per_second"], row["cold_images_per_second"]
        lines.append(
            f"| {row['name']} | {speed['median']:.0f} | {speed['lowest']:.0f} to {speed['highest']:.0f} | "
            f"{row['cpu_us_per_image']['median']:.0f} | {row['first_batch_seconds']:.2f} | {row['memory_mib']:.0f} | "
            f"{'-' if cold is None else f'{cold:.0f}'} |"
        )
    lines += ["", "| ours | over | images/s | turn by turn | CPU time |", "|---|---|---|---|---|"]
    for ratio in report["ratios"]:
        each = ratio["turn_by_turn"]
        lines.append(
            f"| {ratio['ours']} | {ratio['rival']} | {ratio['images_per_second']:.2f} | "
            f"{each['lowest']:.2f} to {each['highest']:.2f} | {ratio['cpu_time']:.2f} |"
        )
    lines += ["", "| pixels of | mean difference, of 255 | largest | cause |", "|---|---|---|---|"]
    for row in report["pixel_differences"]:
        lines.append(f"| {row['pair']} | {row['mean']:.3f} | {row['largest']} | {row['cause']} |")
    return "\n".join(lines)


def command(argv: list[str] | None = None) -> int:
    """`std-fast bench loader`; returns the exit code."""
    parser = argparse.ArgumentParser("std-fast bench loader", description=__doc__)
    parser.add_argument("--data", required=True, help="a beton of JPEGs")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument("--out", metavar="FOLDER", help="also write QUESTION-DATA-HARDWARE-DATE.json there")
    parser.add_argument("--backends", default="ffcv,dali,torch", help="ours, each with what it stands on")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--no-cold", dest="cold", action="store_false", help="do not drop the files from the page cache"
    )
    options = vars(parser.parse_args(argv))
    as_json, out = options.pop("json"), options.pop("out")
    options["backends"] = tuple(options["backends"].split(","))
    try:
        result = main(options.pop("data"), **options, progress=harness.progress)
    except UserError as error:
        print(f"std-fast bench loader: {error}", file=sys.stderr)
        return 2
    if out:
        harness.progress(str(harness.write(result, Path(out))))
    print(json.dumps(result, indent=1) if as_json else table(result))
    return 0


if __name__ == "__main__":
    sys.exit(command())
