"""The loaders' benchmark, at its smallest: real contestants in their processes, and a report that adds up."""

import json

import pytest

from benchmarks import loader
from pipelines.errors import UserError
from tests.beton_tools import jpeg_sample, raw_sample, write_beton


def test_the_report_adds_up(tmp_path, monkeypatch):
    monkeypatch.setitem(loader.PAIRS, "torch", ("torch DataLoader",))  # one rival, for the test's time
    path = str(write_beton(tmp_path / "some.beton", [jpeg_sample(40, 50, i % 3, i) for i in range(24)]))
    said = []
    report = loader.main(
        path, backends=("torch",), repeats=1, threads=1, batch=4, image_size=32, cold=False, progress=said.append
    )
    names = ["torch", "torch DataLoader", "decoding alone"]
    assert [row["name"] for row in report["rows"]] == names and len(said) == 2 * len(names)
    for row in report["rows"]:
        assert row["images_per_second"]["median"] > 0 and row["cpu_us_per_image"]["median"] >= 0
        assert row["first_batch_seconds"] > 0
    ours, rival = report["rows"][:2]
    assert report["ratios"][0]["images_per_second"] == pytest.approx(
        ours["images_per_second"]["median"] / rival["images_per_second"]["median"]
    )
    assert report["pixel_differences"][-1]["pair"] == "resident and torch"
    assert report["settings"]["images"] == 24 and report["conditions"]["versions"]["torch"] != "missing"
    assert all(f"| {name} |" in loader.table(report) for name in names)
    assert json.loads(json.dumps(report))["rows"]


def test_mistakes_are_named(tmp_path, capsys):
    raw = str(write_beton(tmp_path / "raw.beton", [raw_sample(8, 8, 0, i) for i in range(4)]))
    few = str(write_beton(tmp_path / "few.beton", [jpeg_sample(8, 8, 0, i) for i in range(4)]))
    for path, backends, message in (
        (few, ("fast",), "'fast' is unknown"),
        (raw, ("torch",), "raw images"),
        (few, ("torch",), "too few for batches of 64"),
    ):
        with pytest.raises(UserError, match=message):
            loader.main(path, backends=backends)
    assert loader.command(["--data", few, "--backends", "torch"]) == 2
    assert capsys.readouterr().err.startswith(f"std-fast bench loader: {few} has 4 images, too few")
