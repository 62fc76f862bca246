"""--resume compares content: the same bytes on other paths go on to the same bits, other bytes on one path do not."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.convert.job import ConvertSettings, convert
from pipelines.errors import UserError
from pipelines.read.crops import CropSpec
from std_fast.config.recipe import Recipe
from std_fast.runtime import checkpoint
from std_fast.training.train import train
from tests.small_runs import RESNET, assert_same_bits, small_recipe, train_until

STEPS = 4


def make_recipe(base: Path, out: Path, **sections) -> Recipe:
    """A student of one teacher, with the files of `base`."""
    given = {
        "data": {"val": str(base / "val")},
        "student": {"weights": str(base / "first")},
        "distill": {"mode": "std", "teachers": [{"weights": str(base / "teacher")}]},
        "run": {"length": f"{STEPS} steps", "eval_every": "1 epoch", "save_every": "10 minutes"},
    }
    return small_recipe(base / "train.beton", out, **given | sections)


@pytest.fixture(scope="module")
def base(image_folder, tmp_path_factory):
    """A beton with its manifest, a validation folder, a teacher's run, and first weights."""
    folder = tmp_path_factory.mktemp("content")
    convert(str(image_folder), str(folder / "train.beton"), settings=ConvertSettings(size=None))
    shutil.copytree(image_folder, folder / "val")
    for name, sections in (("teacher", {"student": {}, "distill": {}}), ("first", {"student": {}})):
        recipe = make_recipe(folder, folder / name, **sections)
        train(replace(recipe, run=replace(recipe.run, length="1 steps")), quiet=True)
    return folder


@pytest.fixture(scope="module")
def expected(base):
    train(make_recipe(base, base / "complete"), quiet=True)
    return newest(base / "complete")[0]


def newest(folder):
    _, tensors, meta = checkpoint.newest(folder / "checkpoints")
    return tensors, meta


@pytest.fixture
def here(base, tmp_path):
    """Copies of the files, and of a run on those of `base` that was stopped after its second step."""
    if not (base / "run").exists():
        train_until(make_recipe(base, base / "run"), 2)
    for name in ("train.beton", "train.beton.json"):
        shutil.copy(base / name, tmp_path / name)
    for name in ("val", "teacher", "first", "run"):
        shutil.copytree(base / name, tmp_path / name)
    return tmp_path


def refusal(recipe: Recipe) -> str:
    with pytest.raises(UserError) as caught:
        train(recipe, resume=True, quiet=True)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_moved_files_and_other_ways_to_evaluate_are_no_other_training(here, expected):
    """Data, teacher and first weights on another path; other validation data and batch; backend by `auto`."""
    recipe = make_recipe(here, here / "run")
    shutil.copytree(here / "val" / "ant", here / "some" / "ant")
    moved = replace(
        recipe,
        data=replace(recipe.data, val=str(here / "some"), backend="auto"),
        run=replace(recipe.run, eval_batch=4, device="auto" if not torch.cuda.is_available() else "cpu"),
    )
    summary = train(moved, resume=True, quiet=True)
    got, meta = newest(here / "run")
    assert meta["step"] == STEPS
    assert_same_bits(got, expected)
    assert summary["result"]["images"] == 8 and summary["best"]["step"] == STEPS  # not of the former data
    again = train(recipe, resume=True, quiet=True)
    assert again["result"]["images"] == 24  # the finished run on the former data
    data = replace(moved.data, val=recipe.data.val, eval_resample="bicubic", eval_crop=CropSpec("full"))
    other = replace(moved, data=data, run=replace(moved.run, eval_every="2 epochs"))
    assert train(other, resume=True, quiet=True)["result"]["loss"] != again["result"]["loss"]  # of other pixels


def test_an_image_folder_on_another_path(base, tmp_path):
    recipe = make_recipe(base, tmp_path / "run", distill={}, student={})
    for name, accent in (("here", "\u00e5"), ("elsewhere", "a\u030a")):  # as Linux and macOS store it
        shutil.copytree(base / "val", tmp_path / name)
        (tmp_path / name / "cat").rename(tmp_path / name / f"cat {accent}")
    train_until(replace(recipe, data=replace(recipe.data, train=str(tmp_path / "here"), val="")), 2)
    moved = replace(recipe, data=replace(recipe.data, train=str(tmp_path / "elsewhere"), val=""))
    image = tmp_path / "elsewhere/ant/00.jpg"
    content = image.read_bytes()
    for other in (content[:-1] + b"x", None):  # the same length, and no such image
        image.unlink() if other is None else image.write_bytes(other)
        assert "elsewhere holds other data than this run was trained with" in refusal(moved)
    image.write_bytes(content)
    assert train(moved, resume=True, quiet=True)["steps"] == STEPS
    image.unlink()
    assert train(moved, resume=True, quiet=True)["steps"] == STEPS  # it is complete, and reads nothing


def test_other_data_on_the_same_path(here, base):
    recipe = make_recipe(here, here / "run")
    before = newest(here / "run")[1]
    (here / "train.beton.json").unlink()
    convert(str(base / "val"), str(here / "new.beton"), settings=ConvertSettings(size=None, seed=5))
    (here / "new.beton").replace(here / "train.beton")
    (here / "new.beton.json").replace(here / "train.beton.json")
    assert refusal(recipe).startswith(f"data.train: {here}/train.beton holds other data than this run was trained with")
    (here / "val" / "bee").rename(here / "val" / "wasp")
    convert(str(here / "val"), str(here / "other.beton"), settings=ConvertSettings(size=None))
    other = replace(recipe, data=replace(recipe.data, train=str(here / "other.beton")))
    assert "data.train: class 1 is 'cat', and was 'bee' in the run" in refusal(other)
    shutil.rmtree(here / "val" / "wasp")
    fewer = replace(recipe, data=replace(recipe.data, train=str(here / "val")))
    assert "data.train: has 2 classes, the run 3" in refusal(fewer)
    assert newest(here / "run")[1] == before  # nothing was written


def test_data_that_is_gone(here, base):
    (here / "train.beton").unlink()
    shutil.rmtree(here / "val")
    assert refusal(make_recipe(here, here / "run")) == (
        f"data.train: {here}/train.beton, data.val: {here}/val: not there; this run read {base}/train.beton and "
        f"{base}/val; where the same data is elsewhere now, resume with --data.train PATH --data.val PATH"
    )


def test_another_backend_and_other_weights_of_a_teacher(here, base):
    recipe = make_recipe(here, here / "run")
    resident = replace(recipe, data=replace(recipe.data, backend="resident"))
    assert refusal(resident).endswith("differ by roundings; resume with --data.backend torch")
    shutil.rmtree(here / "teacher")
    again = make_recipe(base, here / "teacher", distill={}, student=RESNET)
    train(replace(again, run=replace(again.run, length="1 steps")), quiet=True)
    assert f"distill.teachers.0.weights: {here}/teacher holds other weights" in refusal(recipe)
    convert(str(base / "val"), str(here / "new.beton"), settings=ConvertSettings(size=None, seed=5))
    both = refusal(replace(recipe, data=replace(recipe.data, train=str(here / "new.beton"))))
    assert both.count(" holds other ") == 2 and both.startswith("data.train: ")


def test_checkpoints_of_earlier_versions_compare_paths(here, base):
    """They hold the class names, but no content. No resumed run needs its first weights."""
    path = sorted((here / "run" / "checkpoints").iterdir())[-1]
    tensors, meta = checkpoint.load(path)
    checkpoint.save(path, tensors, {key: value for key, value in meta.items() if key not in ("digest", "content")})
    assert "another recipe (data.train, student.weights, " in refusal(make_recipe(here, here / "run"))
    recipe, manifest = make_recipe(base, here / "run"), base / "train.beton.json"
    text = manifest.read_text()
    (base / "first").rename(base / "gone")
    try:
        manifest.write_text(text.replace('"bee"', '"wasp"'))
        assert "data.train: class 1 is 'wasp', and was 'bee' in the run" in refusal(recipe)
        manifest.write_text(text)
        assert train(recipe, resume=True, quiet=True)["steps"] == STEPS
    finally:
        manifest.write_text(text)
        (base / "gone").rename(base / "first")


@pytest.mark.parametrize(
    ("sections", "complaint"),
    [
        ({"distill": {"mode": "std", "teachers": [{"weights": "pretrained"}]}}, "distill.teachers.0.name: is needed"),
        ({"distill": {"mode": "std", "teachers": [{"name": "test_resnet"}]}}, "distill.teachers.0.weights: is empty"),
        (
            {"student": {"name": "cyclemlp_b1", "options": {}, "weights": "pretrained"}},
            "no pretrained weights for cycle",
        ),
        ({"student": {"weights": "nowhere"}}, "nowhere: no such weights file"),
    ],
)
def test_a_mistake_in_what_is_compared_is_reported_by_its_field(base, tmp_path, sections, complaint):
    plain = {} if "distill" in sections else {"distill": {"mode": "none"}}
    with pytest.raises(UserError, match=complaint):
        train(make_recipe(base, tmp_path / "run", **plain, **sections), quiet=True)
