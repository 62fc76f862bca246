"""Conversion: what becomes of each kind of image, the same bytes however it is run, and every fault said."""

import base64
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from pipelines.convert import job as convert_module
from pipelines.convert import workers as convert_workers
from pipelines.convert.job import ConvertSettings, convert
from pipelines.convert.journal import WorkFolder
from pipelines.convert.progress import ConvertProgress
from pipelines.convert.verify import verify
from pipelines.errors import DataError, UserError, printable
from pipelines.read import image_prep
from pipelines.read.beton import BetonSource
from pipelines.read.decode import decode_rgb
from pipelines.read.source import open_source
from tests import odd_images
from tests.unit.test_journal import full_after

KEEP = ConvertSettings(seed=None)
ODD = odd_images.kinds()


def save(path: Path, seed: int, width: int = 24, height: int = 16) -> None:
    """A small JPEG, other for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).resize((width, height)).save(path, "JPEG", quality=92)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """130 images in 3 classes: five tasks."""
    folder = tmp_path_factory.mktemp("images")
    for label, count in enumerate((50, 50, 30)):
        (folder / f"class {label}").mkdir()
        for number in range(count):
            save(folder / f"class {label}" / f"{number:03}.jpg", 1000 * label + number)
    return folder


@pytest.fixture(scope="module")
def reference(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`images` converted in one go by one process."""
    path = tmp_path_factory.mktemp("reference") / "x.beton"
    convert(str(images), str(path), settings=ConvertSettings(size=12), workers=1)
    return path


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


# every kind of image


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[odd_images.Kind], BetonSource, dict]:
    folder = tmp_path_factory.mktemp("odd")
    made = odd_images.make(folder / "src")
    manifest = convert(str(folder / "src"), str(folder / "x.beton"), settings=KEEP, on_error="skip", workers=2)
    return made, BetonSource(str(folder / "x.beton")), manifest


def test_there_are_forty_kinds() -> None:
    assert len(ODD) >= 40


@pytest.mark.parametrize("number", range(len(ODD)), ids=lambda n: ascii(ODD[n].name[:30]))
def test_odd_image(number: int, odd: tuple[list[odd_images.Kind], BetonSource, dict]) -> None:
    """Each is stored upright in the right colours, or refused by name for the right reason, or listed as ignored."""
    made, source, manifest = odd
    kind = made[number]
    name = printable(f"{odd_images.CLASS}/{kind.name}")
    reasons = {fault["name"]: fault["reason"] for fault in manifest["faults"]}
    if kind.reason == "-":
        assert name in manifest["ignored"]
        return
    if kind.reason:
        if "damaged" in kind.reason and image_prep.turbojpeg() is None:
            pytest.skip("without libturbojpeg, damage within a JPEG is not seen")
        assert kind.reason in reasons[name]
        return
    assert name not in reasons
    stored = sorted(k.name for k in made if not k.reason)
    index = stored.index(kind.name)
    pixels = decode_rgb(source, index).astype(int)
    height, width = pixels.shape[:2]
    assert (width, height) == kind.size
    for colour, (y, x) in zip(kind.colours, ((0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75)), strict=True):
        found = pixels[int(y * height), int(x * width)]
        assert np.abs(found - colour).max() <= 12, f"{found} at {x}, {y} of {kind.name}, not {colour}"


def test_every_odd_image_is_accounted_for(odd: tuple[list[odd_images.Kind], BetonSource, dict]) -> None:
    made, source, manifest = odd
    assert source.num_samples + len(manifest["faults"]) + len(manifest["ignored"]) == len(made)
    assert verify(source.path, decode=True) == []


@pytest.mark.skipif(image_prep.turbojpeg() is None, reason="libturbojpeg is not installed")
def test_pillow_stands_in_for_turbojpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pixels, whichever decodes."""
    big = odd_images.encoded(odd_images.picture(900, 700), "JPEG")
    cases = [odd_images.encoded(odd_images.picture(), "JPEG"), odd_images.turned(6), odd_images.noise_jpeg(), big]
    cases.append(odd_images.encoded(odd_images.picture().convert("L"), "JPEG"))
    settings = ConvertSettings(size=40)
    strict = [image_prep.prepare(data, settings, raw=True) for data in cases]
    monkeypatch.setattr(image_prep, "turbojpeg", lambda: None)
    for data, expected in zip(cases, strict, strict=True):
        found = image_prep.prepare(data, settings, raw=True)
        assert (found.width, found.height) == (expected.width, expected.height)
        difference = np.frombuffer(found.payload, np.uint8).astype(int) - np.frombuffer(expected.payload, np.uint8)
        assert np.abs(difference).max() <= 2


@pytest.mark.skipif(image_prep.turbojpeg() is None, reason="libturbojpeg is not installed")
def test_a_bad_header_does_not_spoil_the_next_image() -> None:
    """TurboJPEG 2.1 gives 0x0 as the size of the image after a header that ends early."""
    plain = odd_images.encoded(odd_images.picture(), "JPEG")
    decoder = image_prep.turbojpeg()
    assert decoder is not None
    assert decoder.header(plain[: plain.index(b"\xff\xda")]) is None
    assert decoder.header(plain) == (odd_images.WIDTH, odd_images.HEIGHT, False, False)


@pytest.mark.skipif(image_prep.turbojpeg() is None, reason="libturbojpeg is not installed")
def test_an_image_without_tables_is_not_decoded_with_the_last_ones() -> None:
    plain = odd_images.encoded(odd_images.picture(), "JPEG")
    bare = plain
    while (start := bare.find(b"\xff\xdb")) >= 0:  # DQT: marker, then a length that counts itself
        bare = bare[:start] + bare[start + 2 + int.from_bytes(bare[start + 2 : start + 4], "big") :]
    image_prep.prepare(plain, ConvertSettings(), raw=False)
    with pytest.raises(image_prep.BadImage):
        image_prep.prepare(bare, ConvertSettings(), raw=False)


# sizes and modes


@pytest.mark.parametrize(
    ("side", "size", "stored"),
    [
        ("shortest", None, (120, 60)),
        ("shortest", 30, (60, 30)),
        ("shortest", 60, (120, 60)),
        ("shortest", 90, (120, 60)),
        ("longest", 30, (30, 15)),
        ("longest", 7, (7, 4)),
        ("longest", 120, (120, 60)),
    ],
)
def test_size(side: str, size: int | None, stored: tuple[int, int]) -> None:
    """Reduced to the size on the chosen side, never enlarged; what fits is kept byte by byte."""
    data = odd_images.encoded(odd_images.picture(120, 60), "JPEG", quality=97)
    made = image_prep.prepare(data, ConvertSettings(side=side, size=size), raw=False)
    assert (made.width, made.height) == stored
    assert (made.payload == data) == (stored == (120, 60))


def test_reducing_in_the_dct_domain_changes_little() -> None:
    """From 8 times the size: close to the exact mean over the footprint of each pixel."""
    rows, columns = np.mgrid[0:512, 0:512]
    waves = 127.5 + 60 * np.stack([np.sin(rows / 40), np.cos(columns / 50), np.sin((rows + columns) / 60)], axis=-1)
    pixels = np.round(waves).astype(np.uint8)
    data = odd_images.encoded(PIL.Image.fromarray(pixels), "JPEG", quality=98)
    made = image_prep.prepare(data, ConvertSettings(size=64), raw=True)
    found = np.frombuffer(made.payload, np.uint8).reshape(64, 64, 3).astype(float)
    expected = pixels.reshape(64, 8, 64, 8, 3).astype(float).mean(axis=(1, 3))
    assert np.abs(found - expected).mean() < 1.5


def test_no_metadata_is_carried_along() -> None:
    """Comments, EXIF and colour profiles of a file that is encoded again."""
    comment = b"where I live"
    for form in ("GIF", "JPEG"):
        data = odd_images.encoded(odd_images.picture(), form, comment=comment, exif=b"Exif\0\0" + comment)
        assert comment in data
        assert comment not in image_prep.prepare(data, ConvertSettings(size=20), raw=False).payload


def test_what_does_not_fit_a_page_is_refused(tmp_path: Path) -> None:
    (tmp_path / "src" / "a").mkdir(parents=True)
    save(tmp_path / "src" / "a" / "large.jpg", 0, 1200, 800)
    settings = ConvertSettings(mode="raw", page_size=1 << 21)
    with pytest.raises(DataError, match=r"large.jpg \(2880000 bytes do not fit a page of 2097152 \(--page-size\)\)"):
        convert(str(tmp_path / "src"), str(tmp_path / "x.beton"), settings=settings)


def test_no_sample_crosses_a_page(tmp_path: Path) -> None:
    (tmp_path / "src" / "a").mkdir(parents=True)
    for number in range(5):
        save(tmp_path / "src" / "a" / f"{number}.jpg", number, 800, 400)
    path = str(tmp_path / "x.beton")
    convert(str(tmp_path / "src"), path, settings=ConvertSettings(mode="raw", page_size=1 << 21, seed=None))
    source = BetonSource(path)
    assert (source.pointers % (1 << 21)).tolist() == [0, 960000, 0, 960000, 0]
    assert verify(path) == []


def test_proportion_is_decided_by_a_hash_of_the_index(images: Path, tmp_path: Path) -> None:
    """The same images are stored raw in whatever order and by however many processes."""
    raw = []
    for seed, count in ((None, 1), (0, 2)):
        settings = ConvertSettings(mode="proportion", raw_share=0.3, seed=seed)
        path = str(tmp_path / f"{seed}.beton")
        convert(str(images), path, settings=settings, workers=count)
        source = BetonSource(path)
        order = np.arange(130) if seed is None else convert_module._order(130, seed)
        raw.append(set(order[~source.jpeg].tolist()))
    assert raw[0] == raw[1]
    assert 20 < len(raw[0]) < 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"side": "short"}, "--side 'short' is unknown; choose one of shortest, longest"),
        ({"mode": "png"}, "mode 'png'"),
        ({"size": 0}, "size 0 must lie in"),
        ({"quality": 101}, "quality 101 must lie in 1..100"),
        ({"raw_share": 1.5}, "--raw-share"),
        ({"page_size": 3 << 20}, "page-size 3145728 must be a power of two"),
        ({"max_pixels": 1 << 40}, "--max-pixels"),
    ],
)
def test_settings_refuse(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ConvertSettings(**change)


# the same bytes


def test_order_and_labels(images: Path, reference: Path) -> None:
    """Shuffled by the seed, and every sample is its image with its label."""
    source = BetonSource(str(reference))
    names = sorted(str(path.relative_to(images)) for path in images.glob("*/*.jpg"))
    order = convert_module._order(len(names), 0)
    assert (order != np.arange(len(names))).any()
    assert source.labels.tolist() == [int(names[i][6]) for i in order]
    assert source.class_names == ["class 0", "class 1", "class 2"]
    for index in (0, 57, 129):
        with PIL.Image.open(images / names[order[index]]) as image:
            expected = np.asarray(image.resize((18, 12), PIL.Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(decode_rgb(source, index) - expected).mean() < 12


@pytest.mark.parametrize("count", [2, 4])
def test_the_same_bytes_for_any_number_of_processes(images: Path, reference: Path, tmp_path: Path, count: int) -> None:
    path = tmp_path / "x.beton"
    manifest = convert(str(images), str(path), settings=ConvertSettings(size=12), workers=count)
    assert path.read_bytes() == reference.read_bytes()
    assert (tmp_path / "x.beton.json").read_bytes() == Path(f"{reference}.json").read_bytes()
    assert json.loads(Path(f"{path}.json").read_text()) == manifest
    assert sorted(os.listdir(tmp_path)) == ["x.beton", "x.beton.json"]


def test_the_source_digest_is_that_of_the_data(images: Path, reference: Path, tmp_path: Path) -> None:
    """Not of the order, the place or the time of the files; another after a change of one byte."""
    before = json.loads(Path(f"{reference}.json").read_text())["source"]["sha256"]
    other = copy(images, tmp_path / "src")
    os.utime(other / "class 0" / "000.jpg", (0, 0))
    moved = convert(str(other), str(tmp_path / "a.beton"), settings=ConvertSettings(seed=7))
    assert moved["source"]["sha256"] == before
    data = bytearray((other / "class 0" / "000.jpg").read_bytes())
    data[-1:] = b"\xd9\n"
    (other / "class 0" / "000.jpg").write_bytes(data)
    changed = convert(str(other), str(tmp_path / "b.beton"), settings=ConvertSettings(seed=7))
    assert changed["source"]["sha256"] != before


def test_shards_hold_every_image_once(images: Path, tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{i}.beton") for i in range(3)]
    for i, path in enumerate(paths):
        convert(str(images), path, settings=KEEP, shard=(i, 3))
    single = str(tmp_path / "single.beton")
    convert(str(images), single, settings=KEEP)
    parts, source = open_source(paths), BetonSource(single)
    assert parts.num_samples == 130
    assert sorted(parts.read(i).tobytes() for i in range(130)) == sorted(source.read(i).tobytes() for i in range(130))
    assert np.bincount(parts.labels).tolist() == [50, 50, 30]


# interruption


def interrupted(images: Path, path: Path) -> Path:
    """Leaves a conversion that has done all its tasks but not made its file; returns its working folder."""
    with pytest.raises(DataError):
        convert(str(images), str(path), settings=ConvertSettings(size=12))
    assert not path.exists() and not Path(f"{path}.json").exists()
    return path.parent / f".{path.name}.converting"


@pytest.fixture
def faulty(images: Path, tmp_path: Path) -> Path:
    """`images` with two files in the first task (in the source's order) that are none."""
    folder = copy(images, tmp_path / "faulty")
    (folder / "class 0" / "000a.jpg").write_bytes(b"nothing")
    (folder / "class 0" / "001a.jpg").write_bytes(b"")
    return folder


def test_stop_reports_all_faulty_images_and_makes_nothing(faulty: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    with pytest.raises(DataError) as error:
        convert(str(faulty), str(path), settings=ConvertSettings(size=12))
    message = str(error.value)
    assert message.startswith("2 of 132 images cannot be converted: class 0/000a.jpg (not an image")
    assert "class 0/001a.jpg (the file is empty)" in message and "--on-error skip" in message and "\n" not in message
    assert not path.exists() and not Path(f"{path}.json").exists()
    listed = Path(f"{path}.faults.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == ["class 0/000a.jpg", "class 0/001a.jpg"]


def test_skip_goes_on_from_what_stop_has_done(faulty: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is converted twice, the result is that of one run, and the faults stand in the manifest."""
    path = tmp_path / "x.beton"
    interrupted(faulty, path)
    with caplog.at_level(logging.INFO, "std_fast"):
        manifest = convert(str(faulty), str(path), settings=ConvertSettings(size=12), on_error="skip")
    assert "5 of 5 tasks were done by an earlier run" in caplog.text
    assert [fault["name"] for fault in manifest["faults"]] == ["class 0/000a.jpg", "class 0/001a.jpg"]
    assert manifest["counts"] == {"samples": 130, "faults": 2, "ignored": 0, "encoded": 130, "resized": 130}
    assert manifest["samples"] == 130 and not Path(f"{path}.faults.txt").exists()
    convert(str(faulty), str(tmp_path / "y.beton"), settings=ConvertSettings(size=12), on_error="skip", workers=1)
    assert path.read_bytes() == (tmp_path / "y.beton").read_bytes()


@pytest.fixture(scope="module")
def stopped(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with `images`, one faulty file among them, and a conversion that stopped because of it; and the beton
    that skipping it makes."""
    folder = tmp_path_factory.mktemp("stopped")
    source = copy(images, folder / "src")
    (source / "class 2" / "zzz.jpg").write_bytes(b"nothing")
    for on_error, name in (("stop", "x.beton"), ("skip", "reference.beton")):
        settings = ConvertSettings(size=12, seed=None)
        try:
            convert(str(source), str(folder / name), settings=settings, on_error=on_error, workers=1)
        except DataError:
            assert on_error == "stop"
    return folder, folder / "reference.beton"


@pytest.mark.parametrize(
    ("harm", "kept"),
    [
        ("none", 5),
        ("journal cut within its last line", 4),
        ("journal cut within its first line", 0),
        ("flipped bit in the third task's record", 2),
        ("flipped bit in the fourth task's data", 3),
        ("data cut short", 4),
        ("data gone", 0),
        ("journal gone", 0),
        ("an image changed", 1),
        ("an image added", 0),
        ("other settings", 0),
    ],
)
def test_resume_believes_only_what_holds(
    harm: str, kept: int, stopped: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After any harm to the working folder or change of the source, the bytes are those of an undisturbed run."""
    folder, reference = stopped
    base = Path(shutil.copytree(folder, tmp_path / "copy"))
    source, path = base / "src", base / "x.beton"
    journal, data = (base / ".x.beton.converting" / name for name in ("journal", "data"))
    settings = ConvertSettings(size=12, seed=None)
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6
    if harm.startswith("journal cut"):
        journal.write_bytes(journal.read_bytes()[: -20 if "last" in harm else 20])
    elif "record" in harm:
        lines[3] = lines[3][:60] + bytes([lines[3][60] ^ 1]) + lines[3][61:]
        journal.write_bytes(b"".join(lines))
    elif "fourth" in harm:
        samples = [np.frombuffer(_samples(line), convert_workers.SAMPLE_TYPE) for line in lines[1:]]
        content = bytearray(data.read_bytes())
        content[(1 << 23) + sum(int(part["size"].sum()) for part in samples[:3]) + 5] ^= 1
        data.write_bytes(content)
    elif harm == "data cut short":
        os.truncate(data, data.stat().st_size - 1)
    elif harm == "data gone":
        data.unlink()
    elif harm == "journal gone":
        journal.unlink()
    elif harm == "an image changed":
        save(source / "class 0" / "040.jpg", 5)
    elif harm == "an image added":
        save(source / "class 0" / "0000.jpg", 6)
    elif harm == "other settings":
        settings = ConvertSettings(size=10, seed=None)
    with caplog.at_level(logging.INFO, "std_fast"):
        convert(str(source), str(path), settings=settings, on_error="skip", workers=1)
    assert (f"{kept} of 5 tasks were done" in caplog.text) == (kept > 0)
    if harm.startswith(("an image", "other")):
        reference = base / "y.beton"
        convert(str(source), str(reference), settings=settings, on_error="skip", workers=1)
    assert path.read_bytes() == reference.read_bytes()


def _samples(line: bytes) -> bytes:
    return base64.b64decode(json.loads(line.split(b" ", 1)[1])["samples"])


def test_a_full_disk_is_reported_and_the_work_is_kept(images: Path, reference: Path, tmp_path: Path) -> None:
    """A limit on the file's size stands for the full disk. What was written before it is used afterwards."""
    path = tmp_path / "x.beton"
    message = r"x.beton: writing failed \(File too large; .* are free\); free some space"
    with full_after((1 << 23) + 30_000), pytest.raises(UserError, match=message):
        convert(str(images), str(path), settings=ConvertSettings(size=12))
    assert not path.exists()
    convert(str(images), str(path), settings=ConvertSettings(size=12))
    assert path.read_bytes() == reference.read_bytes()


def test_too_small_a_disk_is_refused_beforehand(
    images: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    with pytest.raises(UserError, match=r"x.beton: needs about (\d+)\.\d kB more, but 20.0 kB are free") as error:
        convert(str(images), str(tmp_path / "x.beton"), settings=ConvertSettings(size=12))
    needed = float(str(error.value).split("about ")[1].split(" kB")[0])
    actual = (reference.stat().st_size - (1 << 23)) / 1000
    assert 0.8 * actual < needed < 1.5 * actual
    assert not (tmp_path / "x.beton").exists()


def test_a_second_writer_is_refused(images: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "x.beton")
    first = WorkFolder(path)
    with pytest.raises(UserError, match=r"x.beton: another process is converting to it"):
        convert(str(images), path, settings=KEEP)
    first.close()
    assert os.listdir(tmp_path) == []
    convert(str(images), path, settings=KEEP)


def test_run_again_it_finds_its_work_done(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "x.beton"
    manifest = convert(str(images), str(path), settings=KEEP)
    times = path.stat().st_mtime_ns
    assert "was made before" not in caplog.text
    assert convert(str(images), str(path), settings=KEEP) == manifest
    assert "x.beton: was made before, of the same source and settings; not read now" in caplog.text
    assert path.stat().st_mtime_ns == times and len(os.listdir(tmp_path)) == 2
    with pytest.raises(UserError, match="exists, made from something else; remove it"):
        convert(str(images), str(path), settings=ConvertSettings(seed=1))


# processes


def a_task(images: Path) -> tuple[convert_workers.ConvertTask, list[str], list[str]]:
    names = sorted(str(path.relative_to(images)) for path in (images / "class 0").glob("*.jpg"))
    places = [(0, os.path.basename(name), 0, (images / name).stat().st_size) for name in names]
    return convert_workers.ConvertTask(0, list(range(50)), places, [False] * 50), [str(images / "class 0")], names


def test_a_worker_that_is_killed_is_noticed_at_once(images: Path, tmp_path: Path) -> None:
    task, files, names = a_task(images)
    with convert_workers.Workers(2, KEEP, files, False, names, str(tmp_path)) as workers:
        results = workers.run(iter([task] * 1000))
        next(results)
        os.kill(workers._processes[0].pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(UserError, match=r"ended by SIGKILL at class 0/\d+.jpg; if memory was short, use fewer"):
            list(results)
        assert time.monotonic() - began < 30
        pids = [process.pid for process in workers._processes]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_worker_that_stands_still_is_noticed(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_workers, "HANG_SECONDS", 1)
    task, files, names = a_task(images)
    with convert_workers.Workers(1, KEEP, files, False, names, str(tmp_path)) as workers:
        assert os.fstat(workers._beats_file.fileno()).st_blocks > 0  # no hole that a full disk turns into a SIGBUS
        results = workers.run(iter([task] * 1000))
        next(results)
        os.kill(workers._processes[0].pid, signal.SIGSTOP)
        with pytest.raises(UserError, match=r"no progress for 1 s at class 0/\d+.jpg"):
            list(results)
        pids = [process.pid for process in workers._processes]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_workers_start_light() -> None:
    """They must not pay for torch."""
    code = "import sys, pipelines.convert.workers; sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    root = str(Path(convert_workers.__file__).parents[2])
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_a_file_that_shrinks_or_vanishes_is_reported(images: Path, tmp_path: Path) -> None:
    """After it was listed, that is."""
    path = tmp_path / "a.jpg"
    save(path, 0)
    size = path.stat().st_size
    assert len(convert_workers.read_place(str(path), 0, size, True, 1 << 20)) == size
    with pytest.raises(image_prep.BadImage, match="more than 10"):
        convert_workers.read_place(str(path), 0, size, True, 10)
    os.truncate(path, 10)
    with pytest.raises(image_prep.BadImage, match="changed while"):
        convert_workers.read_place(str(path), 0, size, True, 1 << 20)
    with pytest.raises(image_prep.BadImage, match="became shorter"):
        convert_workers.read_place(str(path), 0, size, False, 1 << 20)
    path.unlink()
    with pytest.raises(image_prep.BadImage, match="No such file"):
        convert_workers.read_place(str(path), 0, size, True, 1 << 20)
    os.mkfifo(path)
    with pytest.raises(image_prep.BadImage, match="changed while"):
        convert_workers.read_place(str(path), 0, size, True, 1 << 20)


def test_progress(images: Path, tmp_path: Path) -> None:
    seen: list[ConvertProgress] = []
    path = tmp_path / "x.beton"
    convert(str(images), str(path), settings=KEEP, workers=1, progress=seen.append)
    done = [p.done for p in seen]
    assert done == sorted(done) and done[-1] == 130
    assert [p.phase for p in seen][-1] == "checksum"
    last = [p for p in seen if p.phase == "converting"][-1]
    assert last.rate > 0 and last.seconds_left == 0
    assert abs(last.estimated_bytes - path.stat().st_size) < 64


# mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_error": "ignore"}, "on_error 'ignore' is unknown"),
        ({"shard": (2, 2)}, "shard 2/2"),
        ({"shard": (130, 200)}, "shard 130/200: no image falls to it; make fewer shards of 130 images"),
        ({"workers": -1}, "workers -1"),
        ({"dst": "{tmp}"}, "is a folder; name the file"),
        ({"dst": "{tmp}/no/x.beton"}, "no such folder"),
        ({"dst": "s3://bucket/x.beton"}, "s3://bucket/x.beton: is a URL; write to a disk"),
        ({"dst": "/proc/x.beton"}, "/proc/x.beton: cannot write there"),
        ({"dst": "{tmp}/" + 300 * "x"}, "cannot write there .File name too long"),
        ({"src": "{tmp}/no"}, "cannot be opened"),
    ],
)
def test_mistakes_are_named(arguments: dict, message: str, images: Path, tmp_path: Path) -> None:
    given = {"src": str(images), "dst": str(tmp_path / "x.beton")} | arguments
    given = {key: value.format(tmp=tmp_path) if isinstance(value, str) else value for key, value in given.items()}
    with pytest.raises(UserError, match=message):
        convert(given.pop("src"), given.pop("dst"), **given)
    assert os.listdir(tmp_path) == []


def test_nothing_convertible_makes_no_beton(tmp_path: Path) -> None:
    (tmp_path / "src" / "a").mkdir(parents=True)
    (tmp_path / "src" / "a" / "x.jpg").write_bytes(b"no")
    with pytest.raises(DataError, match="1 of 1 images cannot be converted"):
        convert(str(tmp_path / "src"), str(tmp_path / "x.beton"), on_error="skip")
    assert not (tmp_path / "x.beton").exists()
