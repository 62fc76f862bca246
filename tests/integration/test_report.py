"""The report of real runs: what is on the page, that it needs nothing else, and that a browser draws it."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import UserError
from std_fast import cli
from std_fast.commands import report, report_data, report_plots
from std_fast.training.train import train
from tests.small_runs import RESNET, small_recipe, train_until

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
NASTY = "<script>alert(1)</script> $x_&"
RUN = {"length": "2 epochs", "eval_every": "1 epoch", "log_every": 1, "save_every": "10 minutes"}


@pytest.fixture(scope="module")
def runs(image_folder, tmp_path_factory):
    """A teacher with a nasty name, a student of it, and a run that was stopped."""
    folder = tmp_path_factory.mktemp("runs")

    def recipe(name, **sections):
        return small_recipe(image_folder, folder / name, run=RUN, **sections)

    train(replace(recipe("teacher", student=RESNET), summary=NASTY, name=NASTY), quiet=True)
    std = {"mode": "std", "teachers": [{"weights": str(folder / "teacher")}] * 2}
    train(recipe("std", distill=std), quiet=True)
    train_until(recipe("stopped"), 2)
    return [folder / name for name in ("teacher", "std", "stopped")]


class Page(HTMLParser):
    """Tags, attributes and text; notices what is not closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_and_its_plots(runs, tmp_path, capsys):
    out = tmp_path / "report"
    assert cli.main(["report", *map(str, runs), "--out", str(out), "--images", "4", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [shown["runs"][name]["finished"] for name in ("teacher", "std", "stopped")] == [True, True, False]
    text = (out / "report.html").read_text()
    page = Page(text)
    assert re.findall("<h2>(.*?)</h2>", text) == [
        "Runs", "Accuracy", "Training loss and speed", "Where the hours went", "Teachers and tokens", "Heads",
        "Recipes", "Predictions",
    ]  # fmt: skip
    # self-contained: no script, no address, and a policy that forbids both
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    addresses = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href")]
    assert addresses and all(value.startswith("data:image/png;base64,") for value in addresses)
    assert "default-src 'none'" in text and "url(" not in text
    assert NASTY in "".join(page.text) and NASTY not in text  # escaped
    # the plots are on the page as they are in the files
    plots = {path.name: path.read_bytes() for path in out.glob("*.png")}
    assert set(plots) == {
        f"{name}.png"
        for name in ("accuracy_gpu_hours", "accuracy_epoch", "loss", "throughput", "hours", "teacher_weights",
                     "information", "heads")
    }  # fmt: skip
    on_page = [base64.b64decode(value.split(",", 1)[1]) for value in addresses]
    assert all(png in on_page for png in plots.values())
    for png in on_page:
        Image.open(io.BytesIO(png)).verify()
    samples = [attrs["class"] for tag, attrs in page.tags if attrs.get("class", "").startswith("sample ")]
    assert len(samples) == 3 * 4
    words = " ".join(page.text)
    assert "not finished" in words and "distill.teachers" in words and "STD, 2 teachers" in words


def test_lost_writes_of_a_run_are_shown(runs, tmp_path):
    one = tmp_path / "one"
    shutil.copytree(runs[0], one, ignore=shutil.ignore_patterns("checkpoints"))
    summary = json.loads((one / "summary.json").read_text()) | {"lost_writes": {"<wandb>": 1204}}
    (one / "summary.json").write_text(json.dumps(summary))
    report.write_report([one], tmp_path / "out", images=0)
    text = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>Lost</h2>" in text and "&lt;wandb&gt;" in text and "1,204" in text


def test_predictions_are_those_of_evaluation(runs):
    run = report_data.read_runs(runs)[1]
    samples = report_data.predictions(run, 24)  # all images
    right = sum(s.truth == s.guess for s in samples)
    assert 100 * right / 24 == pytest.approx(run.summary["result"]["top1"])
    assert [s.truth for s in samples] == ["ant"] * 8 + ["bee"] * 8 + ["cat"] * 8
    assert all(1 / 3 <= s.confidence <= 1 for s in samples)
    (file,) = (runs[1] / "checkpoints").glob("*.safetensors")
    (named,) = report_data.read_runs([file])
    assert named.name == "std" and named.evals == run.evals and report_data.predictions(named, 24) == samples


def test_what_is_missing_is_said_or_left_out(runs, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    recipe = (runs[2] / "recipe.yaml").read_text()
    (bare / "recipe.yaml").write_text(recipe)
    (bare / "metrics.jsonl").write_text(
        '[]\n{"kind": "train"}\n{"kind": "eval", "step": 1, "top1": NaN}\n{"kind": "tra'
    )
    data = report.write_report([bare], tmp_path / "out")
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert data["png"] == [] and "No predictions: " in "".join(page.text)
    assert "holds no complete checkpoint" in "".join(page.text)
    (bare / "summary.json").write_text("")
    with pytest.raises(UserError, match=r"bare/summary.json: cannot be read \(.*; restore or remove it"):
        report.write_report([bare], tmp_path / "out")
    (bare / "summary.json").unlink()
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match="holds no run"):
            report.write_report([folder], tmp_path / "out")
    with pytest.raises(UserError, match="--out"):
        report.write_report([bare], bare / "recipe.yaml")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")
def test_a_browser_draws_it(runs, tmp_path):
    report.write_report(runs, tmp_path, images=3)
    shot = tmp_path / "shot.png"
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         f"--user-data-dir={tmp_path}/user",
         "--window-size=1200,3600", f"--screenshot={shot}", (tmp_path / "report.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert shot.is_file(), done.stderr[-2000:]
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape == (3600, 1200, 3)
    # every part of the page has something drawn on it, and the plots' colours are there
    for top in range(0, 2400, 400):
        assert pixels[top : top + 400].std() > 5, top
    for colour in report_data.COLOURS[:3]:
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        assert (np.abs(pixels - rgb).sum(-1) < 12).sum() > 200, colour
    # nothing is wider than the window: the right margin is empty
    assert (pixels[:, -20:] == pixels[0, -1]).all()


def test_a_folder_whose_name_is_no_text(runs, tmp_path):
    """Bytes that are not UTF-8, as any name beyond ASCII is in an ASCII locale."""
    folder = tmp_path / "r\udcc3"
    folder.mkdir()
    shutil.copy(runs[2] / "recipe.yaml", folder)
    (run,) = report_data.read_runs([folder])
    curve = (run.name, report_data.COLOURS[0], "-", ([0.0, 1.0], [1.0, 2.0]))
    assert "r\\udcc3" in report_plots.Plots(tmp_path).curves("plot", [curve], "x", "y")


def test_names_that_matplotlib_would_read(tmp_path):
    for name in (NASTY, "_hidden", "$", "a$b$"):
        curve = (name, report_data.COLOURS[0], "-", ([0.0, 1.0], [1.0, 2.0]))
        drawn = report_plots.Plots(tmp_path).curves("plot", [curve], "x", "y")
        assert html.escape(name) in drawn


def test_two_runs_of_the_same_name(runs, tmp_path):
    copy = tmp_path / "std"
    shutil.copytree(runs[1], copy)
    read = report_data.read_runs([runs[1], copy])
    assert [t.name for t in read] == ["std", str(copy)]
    assert report.differences(read).startswith('<p class="none">None')
    changed = replace(read[1], recipe=replace(read[1].recipe, optim=replace(read[1].recipe.optim, lr=0.5)))
    rows = re.findall(r"<td><code>(.*?)</code></td>", report.differences([read[0], changed]))
    assert rows == ["optim.lr", "0.001", "0.5"]
