"""Image files through `std-fast predict`: what evaluation counts, by a run and by its export; odd and bad files."""

import csv
import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.errors import UserError
from pipelines.loaders.ffcv import library
from std_fast import cli, export_run
from std_fast.commands.predict import evaluate_export, list_images, predict_images
from std_fast.config.recipe import Recipe
from std_fast.config.schema import from_dict
from std_fast.runtime import checkpoint
from std_fast.training.build import build_student
from std_fast.training.evaluate import evaluate_run
from tests.odd_images import encoded, picture, turned
from tests.small_runs import store_run

NAMES = ["n01440764", "bee", "n02102040_springer"]
OPTIONS = {"patch_size": 8, "dim": 16, "depth": 2}
STD = {"mode": "std", "teachers": [{"name": "a"}, {"name": "b"}]}


@pytest.fixture(scope="module")
def val(image_folder, tmp_path_factory):
    """The image folder with, in its first class, what only a careful decoder reads: turned, gray, CMYK, transparent."""
    folder = tmp_path_factory.mktemp("predict") / "val"
    for name, source in zip(NAMES, ("ant", "bee", "cat"), strict=True):
        shutil.copytree(image_folder / source, folder / name)
    for number, data in enumerate((turned(6), turned(3), encoded(picture().convert("L"), "JPEG"))):
        (folder / NAMES[0] / f"odd{number}.jpg").write_bytes(data)
    (folder / NAMES[0] / "cmyk.JPG").write_bytes(encoded(picture().convert("CMYK"), "JPEG"))
    (folder / "bee" / "glass.png").write_bytes(encoded(picture().convert("RGBA"), "PNG"))
    return folder


def make_run(folder, val, distill=STD, backend="torch", **data):
    recipe = from_dict(
        Recipe,
        {
            "student": {"name": "mixer", "options": OPTIONS},
            "distill": distill,
            "data": {"val": str(val), "image_size": 16, "backend": backend, "threads": 1, **data},
            "augment": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]},
            "run": {"batch": 8, "device": "cpu", "seed": 3},
        },
    )
    student = build_student(recipe, len(NAMES))
    tensors = {f"model.{name}": torch.randn_like(t) * 0.3 for name, t in student.state_dict().items()}
    return store_run(folder, recipe, tensors, len(NAMES), NAMES)


def correct(model, val, **options):
    """How many images are predicted as the class of their folder."""
    found = list(predict_images(model, [str(val)], **options))
    assert all(abs(sum(guess.probability for guess in guesses) - 1) < 1e-5 for _, guesses in found)
    return sum(guesses[0].name == Path(path).parent.name for path, guesses in found), len(found)


@pytest.mark.parametrize(
    ("distill", "data"),
    [
        (STD, {"eval_crop": {"kind": "center", "fraction": 0.7}, "eval_resample": "bicubic"}),
        ({"mode": "none"}, {"eval_crop": {"kind": "full"}}),
    ],
)
def test_as_many_are_right_as_evaluation_counts(val, tmp_path, distill, data):
    run = make_run(tmp_path / "run", val, distill, **data)
    result = evaluate_run(run)
    right = round(result["top1"] * result["images"] / 100)
    assert 0 < right < result["images"] == 29
    assert correct(run, val) == (right, 29)
    export_run(run, tmp_path / "export", ("timm",))
    assert correct(tmp_path / "export", val, backend="torch") == (right, 29)
    backend = [("data.backend", "torch"), ("run.device", "cpu")]
    of_export = evaluate_export(tmp_path / "export", str(val), backend)
    assert of_export == pytest.approx({name: result[name] for name in ("top1", "top5", "loss", "images")}, rel=1e-5)


def test_a_checkpoint_is_taken_where_its_run_is(val, tmp_path):
    run = make_run(tmp_path / "run", val)
    older, wanted = run / "checkpoints" / "step-00000001.safetensors", evaluate_run(run)
    tensors, meta = checkpoint.load(older)
    newer = {name: -tensor for name, tensor in tensors.items()}
    del meta["digest"]
    checkpoint.save(older.with_name("step-00000002.safetensors"), newer, meta)
    assert evaluate_run(run) != wanted == evaluate_run(older)
    right = round(wanted["top1"] * wanted["images"] / 100)
    assert correct(older, val)[0] == right
    export_run(older, tmp_path / "export", ("timm",))
    assert correct(tmp_path / "export", val, backend="torch")[0] == right


def test_an_export_is_evaluated_by_the_same_command(run, val, tmp_path, capsys):
    """On some of its classes, in another order; fields that would change the result are refused."""
    export_run(run, tmp_path / "export", ("timm",))
    shutil.copytree(val / NAMES[2], tmp_path / "part" / NAMES[2])
    words = [str(tmp_path / "part"), "--data.threads", "1", "--backend", "torch", "--json"]
    results = []
    for model in (run, tmp_path / "export"):
        assert cli.main(["eval", str(model), *words]) == 0
        out, err = capsys.readouterr()
        results.append(json.loads(out))
        assert "evaluated 0/8 images\n" in err
    assert results[0]["images"] == 8 and results[0]["top1"] == results[1]["top1"]
    for words, complaint in (
        ([], f"an export names no data; name it: std-fast eval {tmp_path}/export DATA"),
        ([str(val), "--data.image_size", "8"], "data.image_size: a trained model is evaluated as its recipe says; it"),
    ):
        assert cli.main(["eval", str(tmp_path / "export"), *words]) == 2
        assert complaint in capsys.readouterr().err
    (tmp_path / "part" / NAMES[2]).rename(tmp_path / "part" / "wasp")
    assert cli.main(["eval", str(tmp_path / "export"), str(tmp_path / "part")]) == 2
    assert "the export lacks the class 'wasp' of the data" in capsys.readouterr().err


def test_accuracy_is_printed_with_top1_first(run, capsys):
    assert cli.main(["eval", str(run)]) == 0
    line = capsys.readouterr().out
    names = r"top1 [\d.]+ %  top5 [\d.]+ %  top1_class [\d.]+ %  top1_distill [\d.]+ %  top1_mean [\d.]+ %"
    assert re.fullmatch(rf"{names}\nloss \d+\.\d{{4}}  images 29\n", line), line


def test_ffcv_reads_them_as_in_its_evaluation(val, tmp_path):
    try:
        library()
    except Exception:
        pytest.skip("FFCV is not installed")
    run = make_run(tmp_path / "run", val, backend="ffcv", eval_resample="area")
    result = evaluate_run(run)
    assert correct(run, val) == (round(result["top1"] * 29 / 100), 29)
    export_run(run, tmp_path / "export", ("timm",))
    assert json.loads((tmp_path / "export/config.json").read_text())["pretrained_cfg"]["interpolation"] == "box"
    assert correct(tmp_path / "export", val, backend="ffcv") == correct(run, val)


@pytest.fixture(scope="module")
def run(val, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run") / "r", val)


def typed(capsys, *words):
    code = cli.main(["predict", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_table_csv_and_json(run, val, capsys):
    """The same classes three times, with ImageNet's words for a WordNet id that has none."""
    image = val / "bee" / "glass.png"
    code, out, _ = typed(capsys, run, image, "--json")
    (row,) = json.loads(out)["images"]
    assert code == 0 and row["image"] == str(image)
    assert sorted(guess["name"] for guess in row["classes"]) == sorted(NAMES)
    words = {guess["name"]: guess["words"] for guess in row["classes"]}
    assert words == {"n01440764": "tench, Tinca tinca", "bee": "", "n02102040_springer": ""}
    probabilities = [guess["probability"] for guess in row["classes"]]
    assert probabilities == sorted(probabilities, reverse=True)
    code, out, _ = typed(capsys, run, image, "--csv")
    table = list(csv.DictReader(io.StringIO(out)))
    assert [(r["image"], r["rank"], r["name"]) for r in table] == [
        (str(image), str(rank), guess["name"]) for rank, guess in enumerate(row["classes"], 1)
    ]
    assert [float(r["probability"]) for r in table] == pytest.approx(probabilities, abs=1e-6)
    code, out, _ = typed(capsys, run, image, "--top", 1)
    first = row["classes"][0]
    assert out.splitlines()[0] == str(image) and len(out.splitlines()) == 2
    assert f"{100 * first['probability']:.2f} %" in out and first["name"] in out
    assert typed(capsys, run, image, "--json", "--csv")[0] == 2


@pytest.mark.parametrize("options", [(), ("--csv",), ("--json",)])
def test_output_that_cannot_be_written_is_said(options, run, val, capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        code = cli.main(["predict", str(run), str(val / NAMES[0] / "00.jpg"), *options])
    assert code == 2
    assert capsys.readouterr().err.endswith("std-fast: standard output: cannot be written (No space left on device)\n")


def test_what_is_no_image_is_named_and_the_others_are_predicted(run, val, tmp_path, capsys, caplog):
    shutil.copy(val / NAMES[0] / "00.jpg", tmp_path / "good.jpg")
    (tmp_path / "text.jpg").write_text("hello")
    data = (val / NAMES[0] / "01.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) * 9 // 10])
    names = [tmp_path / name for name in ("text.jpg", "good.jpg", "gone.jpg", "cut.jpg")]
    code, out, _ = typed(capsys, run, *names, "--json")
    done = json.loads(out)
    assert code == 2 and [row["image"] for row in done["images"]] == [str(tmp_path / "good.jpg")]
    assert sorted(done["not_images"]) == sorted(str(tmp_path / f"{name}.jpg") for name in ("text", "gone", "cut"))
    lines = [record.getMessage() for record in caplog.records]
    for name in ("text.jpg: not a readable image", "gone.jpg: not a readable image", "cut.jpg: cannot be decoded"):
        assert sum(name in line for line in lines) == 1, name
    code, out, _ = typed(capsys, run, tmp_path / "text.jpg")
    assert code == 2 and not out


def test_folders_and_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "b/2.png",
        "b/.hidden.png",
        "b/deep/1.JPEG",
        "b/notes.txt",
        "a[1].jpg",
        "b/.git/x.png",
        "b/__MACOSX/x.png",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(encoded(picture(), "PNG"))
    assert list_images(["b"]) == ["b/2.png", "b/deep/1.JPEG"]
    assert list_images(["a[1].jpg", "*/*.png", "b"]) == ["a[1].jpg", "b/2.png", "b/deep/1.JPEG"]
    assert list_images(["b/notes.txt", "gone.jpg"]) == ["b/notes.txt", "gone.jpg"]  # the reader names them
    for nothing in ("*.gif", "b/.git/empty"):
        Path("b/.git/empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=f"{re.escape(nothing)}: no image is there"):
            list_images([nothing])
    with pytest.raises(UserError, match="b/.git/empty: no image is there"):
        list_images(["b/*.png", "b/.git/*"])
    with pytest.raises(UserError, match="https://host/a.jpg: a URL, .* fetch it"):
        list_images(["https://host/a.jpg"])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"interpolation": "lanczos"}, "interpolation 'lanczos' with crop_mode 'center' is not known here"),
        ({"crop_mode": "border"}, "crop_mode 'border' is not known here"),
        ({"input_size": [3, 0, 0]}, "describes no timm model"),
    ],
)
def test_an_export_that_cannot_be_prepared_for(run, tmp_path, capsys, change, complaint):
    export_run(run, tmp_path / "export", ("timm",))
    config = json.loads((tmp_path / "export/config.json").read_text())
    config["pretrained_cfg"] |= change
    (tmp_path / "export/config.json").write_text(json.dumps(config))
    code, out, err = typed(capsys, tmp_path / "export", tmp_path)
    assert code == 2 and complaint in err and not out


def test_mistakes(run, val, tmp_path, capsys):
    assert "holds no model; give a run's folder" in typed(capsys, tmp_path, val)[2]
    assert "--top: 0 must be 1 or more" in typed(capsys, run, val, "--top", 0)[2]


def test_the_precision_travels_with_the_export(val, tmp_path):
    run = make_run(tmp_path / "run", val)
    text = (run / "recipe.yaml").read_text()
    assert "precision: auto" in text
    path = next((run / "checkpoints").iterdir())
    tensors, meta = checkpoint.load(path)
    meta = {key: value for key, value in meta.items() if key != "digest"}
    checkpoint.save(path, tensors, meta | {"recipe": meta["recipe"].replace("precision: auto", "precision: bfloat16")})
    export_run(run, tmp_path / "export", ("timm",))
    images = [str(val / NAMES[0] / "00.jpg")]
    ((_, of_run),) = predict_images(run, images)
    ((_, of_export),) = predict_images(tmp_path / "export", images, backend="torch")
    assert [guess.label for guess in of_run] == [guess.label for guess in of_export]
    assert np.allclose([g.probability for g in of_run], [g.probability for g in of_export], atol=1e-6)
