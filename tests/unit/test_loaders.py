"""Every backend: the plan's batches, whatever the threads; clean ends, early or by an error; bounded memory."""

import contextlib
import ctypes
import gc
import importlib.util
import io
import logging
import shutil
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines import open_loader
from pipelines.errors import DataError, UserError
from pipelines.loaders import factory, resident
from pipelines.loaders.torch import TorchLoader
from pipelines.read.batch import LoaderSpec
from pipelines.read.crops import CropSpec
from pipelines.read.order import Shard
from pipelines.read.source import open_source
from tests.beton_tools import Sample, encoded, jpeg_sample, pixels, raw_sample, write_beton

needs_ffcv = pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed")
needs_dali = pytest.mark.skipif(importlib.util.find_spec("nvidia.dali") is None, reason="DALI is not installed")
THREADED = ["torch", pytest.param("ffcv", marks=needs_ffcv), pytest.param("dali", marks=needs_dali)]
BACKENDS = [*THREADED, "resident"]
FORMS = [*BACKENDS, "together"]  # decoding a batch in one call, as on a GPU, by torchvision's decoder for CPUs
SIZE = 24


def samples(n):
    """JPEGs and raw images of various sizes; sample i has label i % 3."""
    rng = np.random.default_rng(0)
    make = [jpeg_sample, jpeg_sample, raw_sample]
    return [make[i % 3](*(int(side) for side in rng.integers(20, 60, 2)), i % 3, i) for i in range(n)]


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    return str(write_beton(tmp_path_factory.mktemp("beton") / "some.beton", samples(37)))


def training(path, batch=6, **changes):
    spec = {"shuffle": True, "drop_last": True, "crop": CropSpec(), "seed": 5, "threads": 2} | changes
    return LoaderSpec(path, batch, image_size=SIZE, **spec)


def evaluation(path, batch=6, **changes):
    return training(path, batch, **({"shuffle": False, "drop_last": False, "crop": CropSpec("center")} | changes))


def opened(spec, form):
    return TorchLoader(spec, open_source(spec.path), together=True) if form == "together" else open_loader(spec, form)


def batches(spec, form, epoch=0, start_step=0):
    with opened(spec, form) as loader:
        return list(loader.epoch(epoch, start_step))


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert (a.epoch, a.step) == (b.epoch, b.step)
        assert np.array_equal(a.indices, b.indices)
        assert torch.equal(a.labels, b.labels) and torch.equal(a.positions, b.positions)
        assert torch.equal(a.images, b.images)


# What a batch is


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_is_what_the_plan_and_the_boxes_say(beton, backend):
    """Compared with PIL's crop and resize of PIL's decoding: at most 1 of 255 (rounding between the passes)."""
    source = open_source(beton)
    spec = training(beton)
    plan, order = spec.sampler(37), spec.sampler(37).order(2)
    found = batches(spec, backend, epoch=2)
    assert [batch.step for batch in found] == list(range(6))
    for batch in found:
        assert batch.images.shape == (6, 3, SIZE, SIZE) and batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        positions = plan.positions(batch.step)
        assert batch.epoch == 2 and batch.positions.tolist() == positions.tolist()
        assert batch.indices.tolist() == order[positions].tolist()
        assert batch.labels.dtype == torch.int64 and batch.labels.tolist() == (batch.indices % 3).tolist()
        boxes = spec.crop.boxes(*source.sizes(batch.indices), spec.seed, 2, positions)
        for image, index, (top, left, height, width) in zip(batch.images, batch.indices, boxes.tolist(), strict=True):
            if source.is_jpeg(index):
                full = Image.open(io.BytesIO(source.read(index).tobytes()))
            else:
                (h,), (w,) = source.sizes(np.array([index]))
                full = Image.fromarray(source.read(index).reshape(h, w, 3))
            crop = full.crop((left, top, left + width, top + height)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            difference = np.abs(image.permute(1, 2, 0).numpy().astype(int) - np.asarray(crop))
            assert difference.max() <= 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeated_augmentation_shows_other_crops_of_an_image(beton, backend):
    found = batches(training(beton, batch=12, aug_repeats=3), backend)
    assert len(found) == 3 and all(np.unique(b.indices, return_counts=True)[1].tolist() == [3] * 4 for b in found)
    for batch in found:
        for index in set(batch.indices):
            one, two, three = batch.images[batch.indices == index]
            assert not (torch.equal(one, two) or torch.equal(two, three) or torch.equal(one, three))
    assert_same(batches(training(beton, batch=12, aug_repeats=3), backend, start_step=1), found[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_number_of_threads_changes_nothing(beton, backend):
    one = batches(training(beton, threads=1, ahead=1), backend)
    for threads, ahead in ((2, 1), (4, 3)):
        assert_same(batches(training(beton, threads=threads, ahead=ahead), backend), one)


@pytest.mark.parametrize("backend", BACKENDS)
def test_resumes_at_any_step(beton, backend):
    with open_loader(training(beton), backend) as loader:
        full = list(loader.epoch(3))
        for step in range(1, len(full)):
            assert_same(list(loader.epoch(3, step)), full[step:])
        assert list(loader.epoch(3, len(full))) == []
        for step in (-1, len(full) + 1):
            with pytest.raises(UserError, match="start_step"):
                loader.epoch(3, step)


@pytest.mark.parametrize("backend", BACKENDS)
def test_epochs_follow_each_other_and_differ(beton, backend):
    with open_loader(training(beton), backend) as loader:
        first, second = list(loader.epoch(0)), list(loader.epoch(1))
        assert_same(list(loader.epoch(0)), first)
    assert [b.indices.tolist() for b in first] != [b.indices.tolist() for b in second]
    assert_same(batches(training(beton), backend, epoch=1), second)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_covers_each_image_once(beton, backend, world):
    spec = evaluation(beton, batch=6 * world)
    ranks = [batches(evaluation(beton, 6 * world, shard=Shard(rank, world)), backend) for rank in range(world)]
    assert [len(rank) for rank in ranks] == [spec.sampler(37).steps_per_epoch] * world
    seen = []
    for batch in (batch for rank in ranks for batch in rank):
        there = batch.indices >= 0
        assert len(there) == 6
        assert np.array_equal(batch.positions.numpy() >= 0, there)
        assert batch.labels.tolist() == np.where(there, batch.indices % 3, -1).tolist()
        assert not batch.images[torch.from_numpy(~there)].any()
        seen += batch.indices[there].tolist()
    assert sorted(seen) == list(range(37))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_owns_its_memory(beton, backend):
    with open_loader(training(beton, ahead=1), backend) as loader:
        kept = []
        for batch in loader.epoch(0):
            kept.append((batch.images, batch.images.clone()))
    gc.collect()
    assert all(torch.equal(images, copy) for images, copy in kept)


@pytest.mark.parametrize("backend", FORMS)
def test_a_folder_gives_what_pil_and_exif_say(tmp_path, backend):
    """Rotated, CMYK, gray, PNG with alpha, plain: each as it looks upright, in RGB."""
    folder = tmp_path / "images" / "only"
    folder.mkdir(parents=True)
    image = Image.fromarray(pixels(30, 44))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "a.jpg", quality=95)
    image.save(folder / "b.jpg", quality=95, exif=exif)
    image.convert("CMYK").save(folder / "c.jpg", quality=95)
    image.convert("L").save(folder / "d.jpg", quality=95)
    image.convert("RGBA").save(folder / "e.png")
    exif[0x0112] = 1
    image.save(folder / "f.jpg", quality=95, exif=exif, progressive=True)
    (batch,) = batches(evaluation(str(tmp_path / "images"), crop=CropSpec("full")), backend)
    upright = [image, image.rotate(-90, expand=True), image, image.convert("L").convert("RGB"), image, image]
    for found, expected in zip(batch.images, upright, strict=True):
        expected = np.asarray(expected.resize((SIZE, SIZE), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(found.permute(1, 2, 0).numpy() - expected).mean() < 2.5  # JPEG's loss


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_betons_are_one_dataset(tmp_path, beton, backend):
    everything = samples(37)
    paths = tuple(str(write_beton(tmp_path / f"{n}.beton", everything[n * 19 : (n + 1) * 19])) for n in range(2))
    assert_same(batches(training(paths), backend), batches(training(beton), backend))


@pytest.mark.parametrize("backend", ["torch", pytest.param("dali", marks=needs_dali)])
def test_without_libturbojpeg_and_numba_the_pixels_are_the_same(tmp_path, backend, monkeypatch):
    """torchvision decodes as exactly, torch resizes nearly as exactly; gray, too."""
    gray = Sample(encoded(pixels(30, 40)[:, :, 0], quality=90), 30, 40, 0)
    path = str(write_beton(tmp_path / "some.beton", [*samples(7), gray]))
    expected = batches(evaluation(path, 8), backend)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba" else find(name))
    monkeypatch.setattr("pipelines.read.decode.turbojpeg", lambda: None)
    for batch, other in zip(batches(evaluation(path, 8), backend), expected, strict=True):
        assert (batch.images.int() - other.images.int()).abs().max() <= (1 if backend == "dali" else 0)


# Ends


class Counting:
    """A source that knows the reads and the samples asked for."""

    def __init__(self, source):
        self._source, self.reads, self.samples = source, 0, set()

    def __getattr__(self, name):
        return getattr(self._source, name)

    def read(self, index):
        self.reads += 1
        self.samples.add(index)
        return self._source.read(index)


def counting_loader(spec, backend, monkeypatch):
    """A loader and its source, which counts. (Of a source that is no BetonSource, ffcv too reads one by one.)"""
    source = Counting(open_source(spec.path))
    monkeypatch.setattr(factory, "open_source", lambda path, one_part=False: source)
    return open_loader(spec, backend), source


@pytest.mark.parametrize("backend", THREADED)
def test_an_epoch_left_early_stops_the_work(beton, backend, monkeypatch):
    before = threading.active_count()
    loader, source = counting_loader(training(beton, batch=2, ahead=4), backend, monkeypatch)
    with loader:
        epoch = loader.epoch(0)
        next(epoch)
        epoch.close()
        assert len(list(loader.epoch(1))) == 18  # a new epoch is legal
        epoch = loader.epoch(2)
        next(epoch)
        epoch.close()
        reads = source.reads
    assert source.reads == reads  # nothing had been left running or waiting
    assert threading.active_count() == before


@pytest.mark.parametrize("device", ["cuda:1", "cuda"])
@pytest.mark.parametrize("backend", THREADED)
def test_the_threads_that_copy_work_on_the_process_s_own_gpu(beton, backend, device, monkeypatch):
    """A new thread's CUDA device is 0: each process of the other GPUs would take memory there for a context."""
    seen = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda at: seen.append((threading.current_thread().name, at)))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    with open_loader(training(beton, threads=1, device=device, hw_decoder_load=0.5), backend) as loader:
        thread, submit = ("dali", loader._driver.submit) if backend == "dali" else ("loader", loader._pool.submit)
        submit(int).result()
    assert seen == [(f"std_fast-{thread}_0", 1)]


def test_that_nvjpeg_lacks_is_said_once(monkeypatch, caplog):
    from pipelines.loaders import torch as module

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(module, "decode_together", lambda images, device: [None])
    with caplog.at_level(logging.INFO, "std_fast"):
        assert not any(module._nvjpeg_works(torch.device("cuda", 7)) for _ in range(2))
    assert [record.getMessage() for record in caplog.records] == [
        "torch backend: torchvision has no nvJPEG on cuda:7; the host decodes"
    ]


@pytest.mark.parametrize("backend", THREADED)
def test_memory_is_bounded_by_batches_ahead(beton, backend, monkeypatch):
    batch, ahead = 2, 2
    loader, source = counting_loader(training(beton, batch, ahead=ahead, threads=4), backend, monkeypatch)
    with loader:
        for taken, _ in enumerate(loader.epoch(0), 1):
            most = taken + (2 * ahead + 3 if backend == "dali" else ahead)  # dali: see its docstring
            assert len(source.samples) <= most * batch
    assert len(source.samples) == 36


@needs_ffcv
def test_scratch_is_one_largest_image_per_thread(beton):
    source = open_source(beton)
    with open_loader(training(beton, threads=3), "ffcv") as loader:
        list(loader.epoch(0))
        scratch = list(loader._workspaces)
    assert 1 <= len(scratch) <= 3
    largest = 3 * int((source.heights.astype(int) * source.widths)[source.jpeg].max())
    assert all(0 < s.pixels.size <= largest and s.encoded.size <= source.byte_sizes.max() for s in scratch)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_closed_loader_is_refused(beton, backend):
    loader = open_loader(training(beton), backend)
    begun = loader.epoch(0)
    loader.close()
    loader.close()
    with pytest.raises(UserError, match="closed"):
        loader.epoch(0)
    with pytest.raises(UserError, match="closed"):
        next(begun)


@pytest.mark.parametrize("backend", BACKENDS)
def test_closing_in_mid_epoch_ends_the_epoch(beton, backend):
    loader = open_loader(training(beton, batch=2), backend)
    epoch = loader.epoch(0)
    next(epoch)
    loader.close()
    with pytest.raises(UserError, match="closed"):
        list(epoch)


# Bad data


def damaged(kind):
    data = bytearray(encoded(pixels(40, 50, 4), quality=90, progressive=kind == "odd scan"))
    middle = len(data) // 2
    if kind == "truncated":
        data[middle:] = b""
    elif kind == "overwritten":
        data[middle : middle + 40] = b"\xff\xd8" * 20
    elif kind == "not a JPEG":
        data[:] = b"GIF89a" + bytes(100)
    elif kind == "odd scan":  # an impossible first one after a sound header
        data[data.index(b"\xff\xda") + 13] = 14  # bits of the coefficients that are left out: at most 13
    elif kind == "other size":
        return Sample(bytes(data), 39, 50, 0)
    return Sample(bytes(data), 40, 50, 0)


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("kind", ["truncated", "overwritten", "not a JPEG", "other size", "odd scan"])
def test_a_damaged_image_is_named_and_ends_the_epoch(tmp_path, backend, kind):
    """Batches before it are delivered; no thread stays behind; the error names file and sample."""
    good = samples(11)
    path = str(write_beton(tmp_path / "bad.beton", good[:8] + [damaged(kind)] + good[8:]))
    before = threading.active_count()
    taken = []
    with pytest.raises(DataError, match=r"bad\.beton: sample 8: cannot be decoded") as error:
        with opened(evaluation(path, batch=2, crop=CropSpec("full"), ahead=3), backend) as loader:
            for batch in loader.epoch(0):
                taken.append(batch.step)
    assert "\n" not in str(error.value)
    assert taken == ([] if backend == "resident" else [0, 1, 2, 3])
    assert threading.active_count() == before


@pytest.mark.parametrize("backend", THREADED)
def test_a_missing_file_is_named(tmp_path, backend, image_folder):
    folder = tmp_path / "images"
    for file in image_folder.rglob("*.jpg"):
        target = folder / file.relative_to(image_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    with open_loader(training(str(folder)), backend) as loader:
        (folder / "bee" / "03.jpg").unlink()
        with pytest.raises(DataError, match=r"bee/03\.jpg"):
            list(loader.epoch(0))
            list(loader.epoch(1))


# Which backend


def test_auto_takes_resident_for_small_images_only(tmp_path, beton, caplog, monkeypatch):
    small = str(write_beton(tmp_path / "small.beton", [jpeg_sample(16, 20, i % 3, i) for i in range(8)]))
    with caplog.at_level(logging.INFO, "std_fast"):
        for path, backend in ((small, "ResidentLoader"), (beton, "FfcvLoader")):
            if backend == "FfcvLoader" and importlib.util.find_spec("ffcv") is None:
                backend = "TorchLoader"
            with open_loader(training(path)) as loader:
                assert type(loader).__name__ == backend
        monkeypatch.setattr(factory, "RESIDENT_BYTES", 100)
        with open_loader(training(small)) as loader:
            assert type(loader).__name__ != "ResidentLoader"
    assert "small.beton: backend resident (0 MiB decoded, kept on cpu)" in caplog.text


def test_without_ffcv_there_is_torch_and_a_line_that_installs_it(beton, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ffcv" else find(name))
    with pytest.raises(UserError, match="ffcv is not installed: pip install ffcv"):
        open_loader(training(beton), "ffcv")
    with open_loader(training(beton)) as loader:
        assert type(loader).__name__ == "TorchLoader"


def test_without_dali_a_line_that_installs_it(beton, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match="dali is not installed .*: pip install .*nvidia-dali-cuda120"):
        open_loader(training(beton), "dali")


@needs_dali
def test_sweep_measures_each_load_and_names_the_best(beton):
    from pipelines.loaders.dali.sweep import sweep

    best, rows = sweep(training(beton), open_source(beton), loads=(0.0, 1.0), steps=3)
    assert [row["hw_decoder_load"] for row in rows] == [0.0, 1.0]
    assert best == max(rows, key=lambda row: row["images_per_second"])["hw_decoder_load"]
    assert all(row["images_per_second"] > 0 for row in rows)


def test_the_sweep_runs_once_for_a_machine_and_a_dataset(beton, tmp_path, monkeypatch):
    from pipelines.loaders.dali import sweep as module

    calls = []

    def sweep(spec, source):
        calls.append(spec.path)
        return 0.65, [{"hw_decoder_load": 0.65, "images_per_second": 1.0}]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "sweep", sweep)
    monkeypatch.setattr(module, "import_dali", lambda: SimpleNamespace(__version__="2.0"))
    copy, other = str(tmp_path / "copy.beton"), str(write_beton(tmp_path / "other.beton", samples(9)))
    shutil.copy(beton, copy)
    for path in (beton, beton, copy, other):  # a copy is the same dataset
        assert module.best_load(training(path), open_source(path)) == 0.65
    assert calls == [beton, other]
    module.best_load(training(beton, threads=3), open_source(beton))
    assert len(calls) == 3
    for file in (tmp_path / "cache").rglob("*.json"):
        file.write_text('{"hw_decoder_load": 7}')
    assert module.best_load(training(beton), open_source(beton)) == 0.65
    assert len(calls) == 4
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # cannot be written: measured, not refused
    assert module.best_load(training(beton), open_source(beton)) == 0.65


@pytest.mark.parametrize(
    ("changes", "backend", "message"),
    [
        ({}, "fast", "data.backend: 'fast' is unknown"),
        ({"resample": "area"}, "torch", "resample: 'area'"),
        ({"resample": "area"}, "resident", "resample: 'area'"),
        pytest.param({"resample": "area"}, "dali", "resample: 'area'", marks=needs_dali),
        ({"hw_decoder_load": 1.5}, "dali", "data.hw_decoder_load: 1.5 must lie in 0..1"),
    ],
)
def test_mistakes_are_named(beton, changes, backend, message):
    with pytest.raises(UserError, match=message):
        open_loader(training(beton, **changes), backend)


# Decoding a batch in one call: what a GPU does, here by the same code and torchvision's decoder for CPUs


@pytest.mark.parametrize("make", [training, evaluation])
def test_decoding_together_gives_the_same_batches(beton, make):
    """Raw samples among the JPEGs, places without a sample; bicubic overshoots. Rounding differs by 1 of 255."""
    spec = make(beton, resample="bicubic")
    for batch, plain in zip(batches(spec, "together", 2), batches(spec, "torch", 2), strict=True):
        assert np.array_equal(batch.indices, plain.indices) and torch.equal(batch.labels, plain.labels)
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert (batch.images.int() - plain.images.int()).abs().max() <= 1


def test_what_the_decoder_refuses_is_decoded_on_the_host(beton, monkeypatch, caplog):
    """As nvJPEG may refuse a sound image: its row is exactly the plain path's, and it is not tried again."""
    source = open_source(beton)
    refused, decode, calls = source.read(4).tobytes(), torchvision.io.decode_jpeg, []

    def picky(data, mode, device="cpu"):
        calls.append([one.numpy().tobytes() == refused for one in data])
        if any(calls[-1]):
            raise RuntimeError("unsupported")
        return decode(data, mode, device)

    plain = batches(evaluation(beton), "torch")
    monkeypatch.setattr(torchvision.io, "decode_jpeg", picky)
    with caplog.at_level(logging.WARNING), TorchLoader(evaluation(beton), source, together=True) as loader:
        first = list(loader.epoch(0))
        assert any(map(any, calls))
        calls.clear()
        assert_same(list(loader.epoch(0)), first)
        assert not any(map(any, calls))
    assert torch.equal(first[0].images[4], plain[0].images[4])
    assert all((a.images.int() - b.images.int()).abs().max() <= 1 for a, b in zip(first, plain, strict=True))
    assert caplog.text.count("sample 4: refused by the decoder on cpu") == 1


def test_resident_refuses_what_does_not_fit(beton, monkeypatch):
    monkeypatch.setattr("pipelines.loaders.resident.free_memory", lambda device: 100_000)
    with pytest.raises(UserError, match="data.backend: resident would keep"):
        open_loader(training(beton), "resident")


def test_resident_keeps_full_images_of_the_right_size_exactly(tmp_path):
    everything = [raw_sample(SIZE, SIZE, 0, i) for i in range(6)]
    path = str(write_beton(tmp_path / "raw.beton", everything))
    (batch,) = batches(evaluation(path, crop=CropSpec("full")), "resident")
    assert batch.images.permute(0, 2, 3, 1).numpy().tobytes() == b"".join(s.data for s in everything)


@pytest.mark.parametrize("cubic", [False, True])
def test_the_resident_table_holds_the_filter_of_every_interval(cubic, monkeypatch):
    starts, lengths = np.array([0, 3, 0, 10, 2]), np.array([11, 4, 1, 1, 9])
    table = resident.AxisFilter(11, 5, cubic, torch.device("cpu"))
    monkeypatch.setattr(resident, "TABLE_BYTES", 0)
    computed = resident.AxisFilter(11, 5, cubic, torch.device("cpu"))
    assert table.table is not None and computed.table is None
    found, expected = (one.weights(torch.from_numpy(one.keys(starts, lengths))) for one in (table, computed))
    assert torch.equal(found, expected)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        assert not found[row, :, :start].any() and not found[row, :, start + length :].any()


def test_a_resident_batch_takes_few_operations(tmp_path):
    """Each operation that is not a view launches a kernel on a GPU."""
    path = str(write_beton(tmp_path / "small.beton", [jpeg_sample(16, 20, i % 3, i) for i in range(8)]))
    views = ("view", "permute", "select.int", "slice", "transpose", "expand", "unsqueeze", "detach", "empty", "lift")

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            launched.extend([str(function)] * (not any(name in str(function) for name in views)))
            return function(*args, **(kwargs or {}))

    with open_loader(training(path), "resident") as loader:
        launched: list[str] = []
        epoch = loader.epoch(0)
        with Count():
            next(epoch)
    assert 8 < len(launched) <= 11, launched


# FFCV's native code


@needs_ffcv
@pytest.mark.parametrize("options", [{"subsampling": s} for s in (0, 1, 2)] + [{"progressive": True}, {"grey": True}])
@pytest.mark.parametrize("height", [48, 61])
def test_decoding_only_the_needed_rows_changes_no_pixel(options, height):
    """Against PIL's decoding of the full image, for every last row."""
    from pipelines.loaders import ffcv as ffcv_backend
    from pipelines.loaders import native

    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, 37, 3), np.uint8)).resize((37, height))
    options = dict(options)
    if options.pop("grey", False):
        image = image.convert("L")
    data = np.frombuffer(encoded(np.asarray(image), quality=90, **options), np.uint8)
    full = np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))
    native.load(ffcv_backend.library())
    for bottom in range(1, height + 1):
        out = np.empty((1, bottom, 3 * bottom), np.uint8)  # a box of the output's size: nothing to resize
        box = np.array([[0, 0, bottom, bottom]], np.int32)
        if bottom > 37:
            box[0, 3] = 37
        rows = np.zeros(3 * height * 37, np.uint8)
        known = (np.array([height]), np.array([37]), box, out, rows, np.empty(data.size, np.uint8), native.BILINEAR)
        where = np.array([data.ctypes.data], np.uint64), np.array([data.size]), np.array([True]), np.array([True])
        assert native.decode_samples(*where, *known) == (1, native.OK)
        assert np.array_equal(rows.reshape(height, 37, 3)[:bottom], full[:bottom])
        if bottom <= 37:
            assert np.array_equal(out.reshape(bottom, bottom, 3), full[:bottom, :bottom])


@needs_ffcv
def test_area_is_ffcv_s_own_resize(beton):
    """The path of FFCV's decoder operation, with our boxes: its library's resize of the decoded image."""
    from pipelines.loaders import ffcv as ffcv_backend
    from pipelines.loaders import native
    from pipelines.read.decode import decode_rgb

    native.load(ffcv_backend.library())
    resize = ctypes.CDLL(ffcv_backend.library()).resize
    resize.argtypes = [ctypes.c_int64] * 11  # ffcv/libffcv.py
    source = open_source(beton)
    spec = training(beton, resample="area")
    for batch in batches(spec, "ffcv"):
        boxes = spec.crop.boxes(*source.sizes(batch.indices), spec.seed, 0, batch.positions.numpy())
        for image, index, (top, left, height, width) in zip(batch.images, batch.indices, boxes.tolist(), strict=True):
            out = np.empty((SIZE, SIZE, 3), np.uint8)
            full = np.ascontiguousarray(decode_rgb(source, int(index)))
            box = top, top + height, left, left + width
            resize(0, full.ctypes.data, *full.shape[:2], *box, out.ctypes.data, SIZE, SIZE)
            assert np.array_equal(image.permute(1, 2, 0).numpy(), out)


@needs_ffcv
@pytest.mark.parametrize("cubic", [False, True])
def test_native_resize_is_pil_s(cubic):
    """Every scale from 8 times smaller to 20 times larger; hard edges, for the cubic's overshoot."""
    from pipelines.loaders import native

    rng = np.random.default_rng(2)
    kind = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
    for _ in range(40):
        height, width = (int(side) for side in rng.integers(1, 190, 2))
        image = (rng.integers(0, 2, (height, width, 3)) * 255).astype(np.uint8)
        out = np.empty((SIZE, 3 * SIZE), np.uint8)
        native.resample(image.reshape(-1), 3 * width, 0, 0, height, width, out, cubic)
        # Horizontal pass first, as torch and PIL up to version 12.
        narrow = Image.fromarray(image).resize((SIZE, height), kind)
        expected = np.asarray(narrow.resize((SIZE, SIZE), kind)).astype(int)
        difference = np.abs(out.reshape(SIZE, SIZE, 3) - expected)
        assert difference.max() <= 1 + cubic and difference.mean() < 0.1


@needs_ffcv
def test_mutated_jpegs_never_write_outside(beton):
    """Whatever the bytes, the decoder stays within its buffer and returns a code."""
    from pipelines.loaders import ffcv as ffcv_backend
    from pipelines.loaders import native

    native.load(ffcv_backend.library())
    rng = np.random.default_rng(3)
    good = [s for s in samples(12) if s.mode == 0]
    codes = set()
    for round_ in range(600):
        sample = good[round_ % len(good)]
        data = np.frombuffer(sample.data, np.uint8).copy()
        places = rng.integers(2, data.size if round_ % 2 else 640, 3)
        data[places] = rng.integers(0, 256, 3)
        data = data[: rng.integers(data.size // 2, data.size + 1)]
        size = 3 * sample.height * sample.width
        scratch = np.full(size + 1024, 99, np.uint8)
        height = int(rng.integers(1, sample.height + 1))
        out = np.empty((1, SIZE, 3 * SIZE), np.uint8)
        done, code = native.decode_samples(
            np.array([data.ctypes.data], np.uint64),
            np.array([data.size]),
            np.array([True]),
            np.array([round_ % 3 > 0]),
            np.array([sample.height]),
            np.array([sample.width]),
            np.array([[0, 0, height, sample.width]], np.int32),
            out,
            scratch,
            np.empty(data.size, np.uint8),
            native.BILINEAR,
        )
        assert done == (code == native.OK) and (scratch[size:] == 99).all()
        codes.add(code)
    assert {native.OK, native.NOT_JPEG, native.OTHER_SIZE, native.BROKEN} <= codes
