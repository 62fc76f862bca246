"""Looking into betons: counts, contact sheet, every kind of damage named."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from pipelines.convert.job import ConvertSettings, classes_in_words, convert
from pipelines.convert.verify import inspect, sample_sheet, verify
from pipelines.convert.warm import warm
from pipelines.errors import UserError
from pipelines.read.beton import BetonSource
from tests.beton_tools import encoded, jpeg_sample, pixels, raw_sample, write_beton


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 images in 2 classes, a quarter of them raw."""
    folder = tmp_path_factory.mktemp("verify")
    for number in range(12):
        path = folder / "src" / ("ant", "bee")[number % 2]
        path.mkdir(parents=True, exist_ok=True)
        (path / f"{number}.jpg").write_bytes(encoded(pixels(40 + number, 130, number)))
    settings = ConvertSettings(mode="proportion", raw_share=0.25)
    convert(str(folder / "src"), str(folder / "x.beton"), settings=settings, workers=1)
    return folder / "x.beton"


@pytest.fixture
def beton(made: Path, tmp_path: Path) -> Path:
    """A copy to be harmed."""
    for name in ("x.beton", "x.beton.json"):
        (tmp_path / name).write_bytes((made.parent / name).read_bytes())
    return tmp_path / "x.beton"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def test_of_many_classes_the_first_and_the_last_are_named() -> None:
    names = [f"n{i}" for i in range(900)]
    assert classes_in_words(names).split(", ") == [*(f"{i} = n{i}" for i in range(11)), "...", "899 = n899"]


def test_inspect(made: Path) -> None:
    found = inspect(str(made))
    assert json.loads(json.dumps(found)) == found
    assert found["samples"] == 12 and found["classes"] == 2 and found["class_names"] == ["ant", "bee"]
    assert found["jpeg"] + found["raw"] == 12 and found["raw"] > 0
    assert found["bytes"] == made.stat().st_size
    assert found["shortest_side"] == {"min": 40, "median": 45.5, "mean": 45.5, "max": 51, "histogram": {"32-63": 12}}
    assert found["longest_side"]["histogram"] == {"128-191": 12}
    assert found["samples_per_class"] == {"min": 6, "median": 6, "mean": 6, "max": 6}
    assert found["manifest"]["settings"]["raw_share"] == 0.25


def test_inspect_without_a_manifest(tmp_path: Path) -> None:
    path = write_beton(tmp_path / "x.beton", [jpeg_sample(20, 30, 0), raw_sample(20, 30, 2)])
    found = inspect(str(path))
    assert found["manifest"] is None and found["classes"] == 3 and found["empty_classes"] == 1


def test_sample_sheet(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thumbnails of the samples, in rows of eight."""
    monkeypatch.setattr("pipelines.convert.verify.SAMPLES", 10)
    sample_sheet(str(made), str(tmp_path / "sheet.png"))
    with PIL.Image.open(tmp_path / "sheet.png") as sheet:
        drawn = np.asarray(sheet)
    height, width = drawn.shape[0] // 2, drawn.shape[1] // 8  # of a cell
    assert width <= 128 + 4 and drawn[height // 2, width // 2 :: width].std() > 0  # eight pictures
    assert (drawn[height + height // 2, 2 * width + 4 :] == 255).all()  # two in the second row, then paper
    with pytest.raises(UserError, match="cannot be written"):
        sample_sheet(str(made), str(tmp_path / "no" / "sheet.png"))


def test_a_sound_beton_has_no_faults(made: Path) -> None:
    assert verify(str(made)) == []
    assert verify(str(made), decode=True) == []


def test_a_flipped_bit_is_found_by_checksum_and_decoding(beton: Path) -> None:
    source = BetonSource(str(beton))
    index = int(np.flatnonzero(source.jpeg)[0])
    flip(beton, int(source.pointers[index]))  # of the mark with which a JPEG begins
    faults = verify(str(beton))
    assert len(faults) == 1 and "checksum" in faults[0]
    faults = verify(str(beton), decode=True)
    assert len(faults) == 2 and f"sample {index}:" in faults[1]


def test_sizes_that_the_images_do_not_have_are_found(beton: Path) -> None:
    source = BetonSource(str(beton))
    index = int(np.flatnonzero(source.jpeg)[0])
    row = 24 + 2 * 1041 + 24 * index
    flip(beton, row + 1)  # the lower byte of its width
    assert any(f"sample {index}: cannot be decoded (it is 130x" in fault for fault in verify(str(beton), decode=True))


def test_labels_and_counts_are_held_against_the_manifest(beton: Path) -> None:
    flip(beton, 24 + 2 * 1041 + 16)
    data = beton.read_bytes()
    assert data[24 + 2 * 1041 + 16] in (0xFF, 0xFE)
    faults = verify(str(beton))
    assert len(faults) == 1 and "names 2 classes, but the beton has label" in faults[0]
    manifest = json.loads(Path(f"{beton}.json").read_text())
    manifest |= {"samples": 13, "samples_per_class": [7, 6]}
    flip(beton, 24 + 2 * 1041 + 16)
    Path(f"{beton}.json").write_text(json.dumps(manifest))
    faults = verify(str(beton))
    assert [fault.split(": ", 1)[1] for fault in faults] == [
        "samples is 12, the manifest says 13",
        "its labels are not those that the manifest counts",
    ]


def test_structure_and_missing_manifests_are_said(beton: Path, tmp_path: Path) -> None:
    Path(f"{beton}.json").write_text("[]")
    assert len(verify(str(beton))) == 1
    Path(f"{beton}.json").unlink()
    assert ["has no manifest" in fault for fault in verify(str(beton))] == [True]
    beton.write_bytes(beton.read_bytes()[:-5])
    assert len(verify(str(beton))) == 1
    beton.write_bytes(b"no beton" * 9)
    assert "not an FFCV beton" in verify(str(beton))[0]
    assert "cannot be opened" in verify(str(tmp_path / "no"))[0]


def test_samples_across_pages_are_said(tmp_path: Path) -> None:
    """FFCV's process cache would read beyond its page."""
    path = write_beton(tmp_path / "x.beton", [raw_sample(500, 1000, 0, i) for i in range(3)])
    crossing = [fault for fault in verify(str(path)) if "cross a page" in fault]
    assert len(crossing) == 1 and "2 samples cross a page of 2097152 bytes" in crossing[0]


def test_warm(made: Path, tmp_path: Path) -> None:
    assert warm(str(made))["bytes"] == made.stat().st_size
    with pytest.raises(UserError, match="cannot be read"):
        warm(str(tmp_path / "no"))
