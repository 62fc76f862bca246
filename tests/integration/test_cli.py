"""The commands as a user types them, and the README's claims about them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.errors import UserError
from std_fast import cli
from std_fast.commands.arguments import recipe_fields, split_overrides
from std_fast.config import files as recipe_files
from std_fast.config.options import EVAL_FIELDS

LONG = "x" * 300
ROOT = Path(__file__).resolve().parents[2]


def run(capsys, *words):
    code = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def test_convert_inspect_verify_warm(image_folder, tmp_path, capsys):
    beton = tmp_path / "x.beton"
    code, out, err = run(capsys, "convert", image_folder, beton, "--size", 32, "--seed", "none", "--json")
    assert code == 0 and json.loads(out)["counts"]["samples"] == 24
    assert "24/24 images" in err  # progress, on standard error
    out = run(capsys, "convert", image_folder, beton, "--size", 32, "--seed", "none")[1]
    assert out.startswith(f'{beton}: {{"samples": 24, ') and "\n24 images stored, " in out
    code, out, _ = run(capsys, "inspect", beton, "--json", "--sheet", tmp_path / "sheet.png")
    assert code == 0 and json.loads(out)["samples"] == 24
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    lines = run(capsys, "inspect", beton, "--sheet", tmp_path / "sheet.png")[1].splitlines()
    assert "class_names: 0 = ant, 1 = bee, 2 = cat" in lines and lines[-1] == f"sheet: {tmp_path}/sheet.png"
    assert "manifest.settings.size: 32" in lines and "manifest.samples: 24" in lines
    assert run(capsys, "verify", beton, "--decode")[0] == 0
    assert run(capsys, "warm", beton)[0] == 0
    beton.write_bytes(beton.read_bytes()[:-9])
    code, out, err = run(capsys, "verify", beton)
    assert code in (1, 2) and str(beton) in out + err


@pytest.mark.parametrize("policy", ["randaugment", "trivial_augment", "three_augment"])
def test_preview_draws_what_the_student_sees(image_folder, tmp_path, capsys, policy):
    png = tmp_path / "p.png"
    words = ["--data.train", image_folder, "--out", png, "--data.backend", "torch", "--augment.policy", policy]
    code, out, _ = run(capsys, "preview", "digits_std", *words, "--images", 8)
    assert code == 0 and png.read_bytes().startswith(b"\x89PNG") and str(png) in out


def test_a_sheet_of_more_images_than_there_are(image_folder, tmp_path, capsys):
    code, _, err = run(
        capsys, "preview", "digits_mixer", "--data.train", image_folder, "--out", tmp_path / "p.png", "--images", 64
    )
    assert code == 2 and "std-fast: --images: 64 is larger than the dataset (24 samples): take at most 24" in err
    code, out, _ = run(capsys, "preview", "digits_mixer", "--data.train", image_folder, "--out", tmp_path / "p.png")
    assert code == 0 and out == f"{tmp_path}/p.png\n"  # 24, as nothing else was asked for


def test_info_and_recipes(capsys):
    options = "{patch_size: 4, dim: 8, depth: 2, token_dim: 4, channel_dim: 8}"
    words = ["--options", options, "--image-size", 16, "--classes", 3, "--teachers", 1, "--json"]
    code, out, _ = run(capsys, "info", "mixer", *words)
    assert code == 0 and json.loads(out)["taps"] == [2]
    code, out, _ = run(capsys, "info", "imagenette_std", "--classes", 10, "--json")
    found = json.loads(out)
    assert code == 0 and [found[key] for key in ("model", "teachers", "image_size", "dim")] == ["mixer", 2, 128, 128]
    code, _, err = run(capsys, "info", "imagenette_std", "--teachers", 1)
    assert code == 2 and "--teachers: a recipe has its own" in err
    code, out, _ = run(capsys, "recipes", "--json")
    listed = json.loads(out)
    assert code == 0 and listed.keys() == {p.stem for p in recipe_files.RECIPES.glob("*.yaml")} and all(listed.values())


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["trian", "x"], "did you mean 'train'"),
        (["frobnicate"], "frobnicate: unknown verb (verbs: convert"),
        (["train", "xyzzy"], "nor a built-in recipe; `std-fast recipes` lists them"),
        (["info", "xyzzy"], "`timm.list_models()` lists them"),
        (["train"], "the following arguments are required: recipe"),
        (["train", "digits_sdt"], "did you mean 'digits_std'"),
        (["train", "--resume", "--optim.lrr", "3", "digits_mixer"], "optim.lrr: unknown key; did you mean 'lr'"),
        (["train", "digits_mixer", "--optim.lr"], "--optim.lr: needs a value"),
        (["train", "digits_mixer", "extra"], "unrecognized arguments: extra; see"),
        (["train", "digits_mixer", "--resume", "x.pt"], "unrecognized arguments: x.pt; --resume takes no file"),
        (["train", "--amp", "digits_mixer", "-b", "16"], "--amp is --run.precision (auto: bfloat16 autocast on a GPU"),
        (["train", "digits_mixer", "--grad-accum-steps", "2"], "in one forward and backward pass, not the number of"),
        (["train", "digits_mixer", "--quiett"], "--quiett is unknown; did you mean '--quiet'?"),
        (["train", "digits_mixer", "--optim.lr", "--quiet"], "--optim.lr: needs a value"),
        (["inspect", "/nothing.beton"], "/nothing.beton"),
        (["inspect", __file__], "test_cli.py"),
        (["inspect", "/"], "/: cannot be opened (Is a directory); give a .beton"),
        (["teach", "digits_mixer", "--distill.target_cache", "x"], "no effect with distill.mode none"),
        (["convert", "/nothing", "x.beton"], "/nothing"),
        (["convert", ".", "x.beton", "--shard", "2"], "--shard"),
        (["convert", ".", "x.beton", "--quality", "high"], "quality"),
        (["convert", ".", "x.beton", "--label-from", "name"], "--label-from 'name' is unknown"),
        (["convert", "x-*.tar", "x.beton"], "only a URL may be a pattern, for files on a disk name their folder"),
        (["convert", "x-{0..1}.tar", "x.beton"], "only a URL may be a pattern, for files on a disk name their folder"),
        (["predict"], "std-fast: predict: the following arguments are required"),
        (["eval", "/nothing"], "/nothing"),
        (
            ["eval", "digits_std"],
            "digits_std: is a recipe; name the folder of a run, or a teacher of the recipe: --teac",
        ),
        (
            ["train", "digits_mixer", "--run.length", "1step"],
            "run.length: '1step' is no duration; write one like '300 e",
        ),
        (["info", "mixer_s17"], "did you mean 'mixer_s16'"),
        (["info", "mixer", "--options", "["], "--options"),
        (["doctor", "extra"], "extra"),
        (["preview", "digits_mixer", "--data.train", "/nothing"], "/nothing"),
        (["train", "digits_mixer", "--run.out", ""], "run.out: is empty; name the folder of the run"),
        (["train", "digits_mixer", "--run.out", LONG], "run.out: holds a name of 300 bytes; use at most 255"),
        (["train", "digits_mixer", "--run.out", "a\0b"], "run.out: "),
        (["train", "digits_mixer", "--run.out", "~/runs"], "run.out: '~/runs': ~ is not expanded here"),
        (["train", "digits_mixer", "--data.train=~/x"], "data.train: '~/x': ~ is not expanded here"),
        (["train", "digits_mixer", "run.batch=64"], "run.batch=64: write --run.batch 64"),
        (
            ["train", "imagenette_std"],
            "imagenette-val.beton: not there; make it with `std-fast convert` (README: Imagenette), or name other data "
            "by --data.train PATH --data.val PATH",
        ),
        (["teach", "digits_std", "--distill.target_cache", "x"], "train.beton: not there; make it with"),
        (["plan", "digits_std"], "not there; make it with `std-fast demo`, or name other data"),
        (["train", "/"], "/: is no recipe; give it as --data.train /, or name the folder of a run"),
        (
            ["train", "digits_mixer", "--data.train", "", "--data.val", "", "--run.out", __file__],
            f"run.out: {__file__} is a file, or lies below one; name",
        ),
        (["train", "digits_mixer", "--resume", "--run.out", __file__ + "/x"], "/x is a file, or lies below one; name"),
        (
            ["train", "digits_mixer", "--data.train", str(ROOT / "tests"), "--data.val", ""]
            + ["--run.out", str(ROOT / "tests" / "run")],
            "run.out: " + str(ROOT / "tests" / "run") + " lies within the images of data.train",
        ),
        (["preview", "digits_mixer", "--data.train", LONG], LONG),
        (["train", LONG], LONG),
        (["eval", LONG], LONG),
        (["export", LONG, "out"], LONG),
        (["report", LONG], LONG),
        (["inspect", LONG], LONG),
        (["convert", LONG, "x.beton"], LONG),
        (["convert", ".", LONG], ""),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(words, complaint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    lines = [line for line in err.splitlines() if line.startswith("std-fast: ")]
    assert code == 2 and len(lines) == 1 and complaint in lines[0] and not out
    assert not list(tmp_path.iterdir())  # nothing is left behind


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["eval", "no\nrun"], r"evaluating no\nrun"),
        (["predict", "none", "x.jpg"], "loading the model of none"),
        (["report", "none"], "reading 1 run, then predicting 12 images of each"),
        (["export", "none", "out"], "exporting none: each format is written, read back and compared"),
    ],
)
def test_a_verb_that_takes_a_minute_begins_with_what_it_does(words, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, _, err = run(capsys, *words)
    assert err.splitlines()[0] == line


def test_empty_class_and_unreadable_image(image_folder, tmp_path, capsys):
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    (folder / "ant" / "99.jpg").write_bytes(b"not an image")
    code, _, err = run(capsys, "convert", folder, tmp_path / "x.beton")
    assert code == 2 and "99.jpg" in err and not (tmp_path / "x.beton").exists()
    (folder / "dog").mkdir()
    code, _, err = run(capsys, "convert", folder, tmp_path / "y.beton")
    assert code == 2 and "dog" in err


def test_the_readme_speaks_of_files_that_exist_and_shows_the_example_as_it_is():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert "://" in target or (ROOT / target).exists(), target
    for name in re.findall(r"`(tests/[\w/]+\.py)`", text):
        assert (ROOT / name).exists(), name
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    example = (ROOT / "examples" / "own_loop.py").read_text(encoding="utf-8")
    assert code[code.index("def distil") :].strip() in example


def test_resume_is_a_flag_and_fields_may_come_first():
    own, overrides = split_overrides(["--resume", "--optim.lr", "-1", "mine", "--run.out=a=b"], {"--resume"})
    assert own == ["--resume", "mine"]
    assert overrides == [("optim.lr", "-1"), ("run.out", "a=b")]


def test_flags_as_others_have_them_are_named_all_at_once_with_the_field_of_the_table():
    wanted = "-b is --run.batch (images per step over all GPUs), --opt is --optim.name (torch's fused AdamW or SGD), "
    with pytest.raises(UserError, match=re.escape(wanted + "--bce-loss is unknown, --mean is --augment.mean (")):
        split_overrides(["-b", "16", "--optim.lr", "1", "--opt=sgd", "--bce-loss", "--mean", "0.5", "0.5", "0.5"])
    table = (ROOT / "docs" / "COMING_FROM.md").read_text(encoding="utf-8").partition("\n|---")[2].splitlines()
    rows = [
        row.split(" | ") for row in table if row.startswith("| ") and "`--resume" not in row and "torchrun" not in row
    ]
    assert len(rows) > 30
    for *theirs, ours in rows:
        for flag in re.findall(r"(?<=[` ])--?[A-Za-z][\w.-]*", " ".join(theirs)):
            with pytest.raises(UserError) as caught:
                split_overrides([flag])
            found = re.search(r"is --([\w.]+)", str(caught.value))
            assert found and f"--{found[1]}" in ours, (flag, str(caught.value))


def test_the_help_of_eval_lists_what_a_run_takes_and_that_of_train_all(capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])
    assert set(re.findall(r"--(\w+\.\w+)", capsys.readouterr().out)) == {*EVAL_FIELDS}
    text = " ".join(recipe_fields().split())
    assert "--optim.lr " in text and "hold (tensorboard, wandb, mlflow, trackio)" in text


def test_a_run_that_was_moved_continues_where_it_is(tmp_path, capsys):
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    recipe, other = tmp_path / "new" / "recipe.yaml", tmp_path / "new" / "mine.yaml"
    for file in (recipe, other):
        file.write_text(f"run: {{out: {tmp_path}/old}}")
    (tmp_path / "new" / "checkpoints" / "resnet50.pth").touch()
    assert run(capsys, "train", recipe, "--resume")[0] == 2 and (tmp_path / "old").is_dir()  # no checkpoint of a run
    (tmp_path / "old" / ".lock").unlink()
    (tmp_path / "old").rmdir()
    (tmp_path / "new" / "summary.json").touch()  # of a run whose checkpoints were deleted
    assert run(capsys, "train", recipe, "--resume")[0] == 2 and not (tmp_path / "old").exists()
    (tmp_path / "new" / "summary.json").unlink()
    (tmp_path / "new" / "checkpoints" / "step-00000001.safetensors").touch()
    said = f"{tmp_path}/new: its recipe names {tmp_path}/old; the run continues in {tmp_path}/new"
    for words, moved in (([recipe], True), ([recipe.parent], True), ([other], False)):
        code, _, err = run(capsys, "train", *words, "--resume")
        assert code == 2 and (said in err) == moved
        assert (tmp_path / "old").exists() != moved


def test_a_reader_that_leaves_is_no_error():
    """As in `std-fast recipes | head -1`; the words are flushed by the interpreter's end, if not before."""
    command = [sys.executable, "-m", "std_fast.cli", "recipes"]
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0)
    process.stderr.close()


def test_a_class_name_that_the_terminal_lacks_is_escaped(image_folder, tmp_path):
    """An old cluster's locale is ASCII."""
    (tmp_path / "src").mkdir()
    shutil.copytree(next(image_folder.iterdir()), tmp_path / "src" / "Ärger")
    beton = tmp_path / "x.beton"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    for words in (["convert", tmp_path / "src", beton], ["inspect", beton]):
        command = [sys.executable, "-m", "std_fast.cli", *map(str, words)]
        done = subprocess.run(command, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr
    assert rb"\xc4rger" in done.stdout


@pytest.mark.parametrize(("verb", "continues"), [("convert", True), ("eval", False)])
def test_an_interrupted_command_that_continues_says_so(verb, continues, monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupted)
    assert cli.main([verb]) == cli.INTERRUPTED
    assert ("the same command continues" in capsys.readouterr().err) == continues
