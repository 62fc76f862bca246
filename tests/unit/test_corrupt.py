"""Corrupt images inside good data: the same ones for every backend, named, counted, and replaced by a rule that depends
on the dataset alone."""

import contextlib
import io
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import open_loader
from pipelines.errors import CorruptImage, DataError
from pipelines.read.crops import CropSpec
from pipelines.read.turbojpeg import turbojpeg
from tests.beton_tools import Sample, encoded, jpeg_sample, pixels, raw_sample, write_beton
from tests.unit.test_loaders import BACKENDS, THREADED, batches, evaluation, training

needs_turbojpeg = pytest.mark.skipif(turbojpeg() is None, reason="libturbojpeg is not installed")
SMALL_BOXES = CropSpec(scale=(0.08, 0.2))  # most do not reach an image's last rows


def segments(data):
    """(marker, start, end) of a JPEG's header segments."""
    at, found = 2, []
    while data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        found.append((data[at + 1], at, end))
        at = end
    return found


def without(data, *markers):
    cut = b"".join(data[a:b] for marker, a, b in segments(data) if marker not in markers)
    return data[:2] + cut + data[segments(data)[-1][2] :]


def doubled(data, marker):
    _, a, b = next(segment for segment in segments(data) if segment[0] == marker)
    return data[:b] + data[a:b] + data[b:]


def of_unknown_revision(data):
    _, at, _ = next(segment for segment in segments(data) if segment[0] == 0xE0)
    return data[: at + 9] + b"\x07" + data[at + 10 :]


GOOD = jpeg_sample(64, 56, 1, 4).data
LAST = len(GOOD) - 60
DAMAGED = {
    "cut short": GOOD[: len(GOOD) // 2],
    "cut short, with an end": GOOD[: len(GOOD) // 2] + b"\xff\xd9",
    "last bytes gone": GOOD[:-30] + b"\xff\xd9",
    "last rows overwritten": GOOD[:LAST] + b"\xff\xd8" * 10 + GOOD[LAST + 20 :],
    "zeros": GOOD[:700] + bytes(400) + GOOD[1100:],
    "no quantization tables": without(GOOD, 0xDB),
    "no tables": without(GOOD, 0xDB, 0xC4),
    "two frame headers": doubled(GOOD, 0xC0),
    "unknown revision, and cut short": of_unknown_revision(GOOD)[: len(GOOD) // 2] + b"\xff\xd9",
    "no JPEG": b"GIF89a" + bytes(100),
}


def mixture():
    """Good samples of all sizes with damaged ones between them; and as it should look: the next good one for each."""
    rng = np.random.default_rng(1)
    good = [
        (jpeg_sample, raw_sample)[i % 4 == 3](*(int(x) for x in rng.integers(30, 60, 2)), i % 3, i) for i in range(14)
    ]
    found, shown = [], []
    for i, (data, sample) in enumerate(zip(DAMAGED.values(), good, strict=False)):
        found += [Sample(data, 64, 56, 2), sample]
        shown += [sample, sample]
        if i == 3:  # two beside each other
            found.append(Sample(data, 64, 56, 2))
            shown.append(good[i + 1])
    bad = [Sample(DAMAGED["zeros"], 64, 56, 2)]  # the last one: the first of all good ones follows
    return found + bad, shown + [good[0]]


@pytest.fixture(scope="module")
def betons(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corrupt")
    found, shown = mixture()
    return str(write_beton(folder / "found.beton", found)), str(write_beton(folder / "shown.beton", shown))


def number_of_bad():
    return sum(one.data in DAMAGED.values() for one in mixture()[0])


@needs_turbojpeg
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_next_good_sample_takes_the_place(betons, backend, caplog):
    """Over epochs whose small boxes seldom reach the damage: as if the dataset had held the others from the start."""
    path, as_shown = betons
    spec = training(path, 6, crop=SMALL_BOXES, on_corrupt="skip")
    good_spec = training(as_shown, 6, crop=SMALL_BOXES)
    with caplog.at_level(logging.WARNING, "std_fast"), open_loader(spec, backend) as loader:
        with open_loader(good_spec, backend) as good:
            for epoch in range(3):
                for found, expected in zip(loader.epoch(epoch), good.epoch(epoch), strict=True):
                    assert torch.equal(found.labels, expected.labels)
                    assert torch.equal(found.positions, expected.positions)
                    assert torch.equal(found.images, expected.images)
        assert len(loader.corrupt) == number_of_bad()
    assert caplog.text.count("is shown in its place") == number_of_bad()
    assert "found.beton: sample 0: cannot be decoded (damaged JPEG" in caplog.text


@needs_turbojpeg
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_evaluation_the_place_stays_empty(betons, backend):
    path, as_shown = betons
    bad = torch.tensor([one.data in DAMAGED.values() for one in mixture()[0]])
    everything = []
    with open_loader(evaluation(path, on_corrupt="skip"), backend) as loader:
        for _ in range(2):
            everything = list(loader.epoch(0))
    for batch, good in zip(everything, batches(evaluation(as_shown), backend), strict=True):
        here = bad[6 * batch.step :][:6]
        empty = torch.cat([here, torch.ones(6 - len(here), dtype=torch.bool)])
        assert torch.equal(batch.labels < 0, empty) and torch.equal(batch.positions < 0, empty)
        assert (batch.indices < 0).tolist() == empty.tolist()
        assert not batch.images[empty].any() and torch.equal(batch.images[~empty], good.images[~empty])


@needs_turbojpeg
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", DAMAGED)
def test_it_is_noticed_whatever_the_box(tmp_path, backend, kind):
    """With the default rule the first sight of it ends the epoch, also where the box lies above the damage."""
    good = [jpeg_sample(40, 40, 0, seed) for seed in range(3)]
    path = str(write_beton(tmp_path / "one.beton", [*good, Sample(DAMAGED[kind], 64, 56, 0)]))
    for epoch in range(2):
        with pytest.raises(CorruptImage, match=r"one\.beton: sample 3: cannot be decoded"):
            batches(training(path, 2, crop=SMALL_BOXES), backend, epoch)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_the_limit_is_an_error(betons, backend):
    with pytest.raises(
        DataError, match=r"sample \d+: cannot be decoded .*; 3 others were corrupt too \(data.corrupt_limit\)"
    ):
        batches(training(betons[0], 6, on_corrupt="skip", corrupt_limit=3), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_good_at_all(tmp_path, backend):
    path = str(write_beton(tmp_path / "bad.beton", [Sample(DAMAGED["zeros"], 64, 56, 0)] * 4))
    with pytest.raises(DataError, match=r"bad\.beton: no sample in it can be decoded"):
        batches(training(path, 2, on_corrupt="skip"), backend)


@needs_turbojpeg
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_folders_too(tmp_path, backend):
    """Empty, no image at all, a JPEG cut short, a PNG cut short: each is replaced by the next one."""
    for name, damage in (("found", True), ("shown", False)):
        folder = tmp_path / name / "only"
        folder.mkdir(parents=True)
        for i in range(8):
            kind = ("JPEG", "PNG")[i in (6, 7)]
            data = encoded(pixels(50, 60 + (i | 1), i | 1), kind)  # 0 and 1 are alike, 2 and 3, ...
            if damage and i % 2 == 0:
                data = {0: b"", 2: b"no image", 4: data[: len(data) // 2], 6: data[: len(data) // 2]}[i]
            (folder / f"{i}.{kind.lower()}").write_bytes(data)
    expected = batches(training(str(tmp_path / "shown"), 4), backend)
    found = batches(training(str(tmp_path / "found"), 4, on_corrupt="skip"), backend)
    assert all(torch.equal(a.images, b.images) for a, b in zip(found, expected, strict=True)) and len(found) == 2
    with pytest.raises(CorruptImage, match="only/"):
        batches(training(str(tmp_path / "found"), 4), backend)


@pytest.mark.parametrize("backend", THREADED)
def test_a_file_that_is_gone_is_no_corrupt_image(tmp_path, backend):
    folder = tmp_path / "images" / "only"
    folder.mkdir(parents=True)
    for i in range(4):
        (folder / f"{i}.jpg").write_bytes(encoded(pixels(50, 60, i)))
    spec = training(str(tmp_path / "images"), 2, on_corrupt="skip", shuffle=False, threads=1)
    with open_loader(spec, backend) as loader, contextlib.closing(loader.epoch(0)) as epoch:
        (folder / "2.jpg").unlink()
        next(epoch)
        if backend != "dali":  # it is known before its step: the only thread has come to it
            loader._pool.submit(int).result()
            assert "2.jpg: not a readable" in str(loader.fault)
        with pytest.raises(DataError, match=r"2\.jpg: not a readable image \(.*No such file") as error:
            next(epoch)
    assert not isinstance(error.value, CorruptImage)


@needs_turbojpeg
def test_a_remark_about_the_header_hides_no_damage():
    """libjpeg tells the first of its warnings alone."""
    from pipelines.read.turbojpeg import BadImage

    decoder = turbojpeg()
    strange = of_unknown_revision(GOOD)
    known = decoder.header(strange)
    out = np.empty((64, 56, 3), np.uint8)
    assert "revision" in decoder.decode(strange, known, 1, out)
    assert np.array_equal(out, np.asarray(Image.open(io.BytesIO(GOOD))))
    with pytest.raises(BadImage, match="damaged JPEG"):
        decoder.decode(DAMAGED["unknown revision, and cut short"], decoder.header(strange), 1)


@needs_turbojpeg
def test_a_run_passes_over_them_and_says_so(betons, tmp_path):
    """Trained and evaluated on the damaged set: the weights are those of the set that holds the others instead."""
    from std_fast.config.recipe import Recipe
    from std_fast.config.schema import from_dict
    from std_fast.runtime import checkpoint
    from std_fast.training.train import train

    tensors = {}
    for name, path in zip(("found", "shown"), betons, strict=True):
        recipe = from_dict(
            Recipe,
            {
                "data": {"train": path, "val": path, "image_size": 16, "threads": 1, "on_corrupt": "skip"},
                "student": {"name": "mixer", "options": {"patch_size": 4, "dim": 8, "depth": 2}},
                "run": {"batch": 8, "length": "3 epochs", "device": "cpu", "out": str(tmp_path / name)},
            },
        )
        summary = train(recipe, quiet=True)
        bad = number_of_bad() if name == "found" else 0
        assert summary["corrupt_images"] == len(summary["corrupt_names"]) == bad
        assert summary["result"].get("corrupt_images", 0) == bad
        assert summary["result"]["images"] == len(mixture()[0]) - bad
        tensors[name] = checkpoint.newest(tmp_path / name / "checkpoints")[1]
    assert all(torch.equal(tensor, tensors["shown"][key]) for key, tensor in tensors["found"].items())
