"""What earlier versions wrote (tests/data/vVERSION, made by tests/data/make.py) is read by this one."""

import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipelines.convert.verify import verify
from pipelines.errors import UserError
from pipelines.read.beton import BetonSource
from std_fast import __version__
from std_fast.config import legacy
from std_fast.config import recipe as recipes
from std_fast.runtime import checkpoint
from std_fast.teachers.target_cache import TargetCache
from std_fast.teachers.target_format import read_header
from std_fast.training.evaluate import evaluate_run, trained_student
from tests.data.make import STEPS, STOP, go_on

DATA = Path(__file__).resolve().parents[1] / "data"
VERSIONS = sorted(path for path in DATA.glob("v*") if path.is_dir())


@pytest.fixture(params=VERSIONS, ids=lambda path: path.name)
def old(request, tmp_path, monkeypatch):
    """A copy of one version's files, as the present folder."""
    shutil.copytree(request.param, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    packed = Path("images.beton.gz")
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    return tmp_path / "old"


def test_this_version_has_its_files():
    assert DATA / f"v{__version__}" in VERSIONS, "run `python -m tests.data.make` and commit what it makes"


def test_a_beton_and_its_manifest(old):
    assert verify("images.beton", decode=True) == []
    source = BetonSource("images.beton")
    assert source.num_samples == 24 and source.class_names == ["class0", "class1", "class2"]
    assert 0 < source.jpeg.sum() < 24
    assert np.bincount(source.labels).tolist() == [8, 8, 8]


def test_training_goes_on_from_a_checkpoint_and_stored_targets(old):
    """Its teacher is not there any more, so each of its targets comes from the store."""
    expected = json.loads(Path("expected.json").read_text())
    path, _, meta = checkpoint.newest(Path("run/checkpoints"))
    assert (path.stem, meta["step"], meta["num_classes"]) == (f"step-{STOP:08d}", STOP, 3)
    found = go_on(recipes.read_saved(Path("run")), "run")
    assert found["steps"] == expected["steps"] == STEPS
    assert found["parameters"] == expected["parameters"] and found["samples"] == expected["samples"]
    assert found["result"]["loss"] == pytest.approx(expected["result"]["loss"], rel=1e-3)
    assert found["result"]["top1"] == pytest.approx(expected["result"]["top1"])


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("run", "cuda_graphs", "teachers"),
        ("run", "compress_gradients", "true"),
        ("augment", "erase_scale", "[0.1, 0.2]"),
        ("distill", "loss", "ofa"),
    ],
)
def test_a_recipe_with_a_field_that_is_gone(section, field, value, tmp_path, monkeypatch):
    """It is read where the field has its default, and refused in one line where it asks for something: in a recipe, a
    run's recipe, a checkpoint's, and on the command line."""
    monkeypatch.chdir(tmp_path)
    texts = [(version / "run" / "recipe.yaml").read_text(encoding="utf-8") for version in VERSIONS]
    text = next(text for text in texts if f"  {field}:" in text)
    assert recipes.loads(text)
    Path("recipe.yaml").write_text(re.sub(rf"  {field}:.*(\n  - .*)*", f"  {field}: {value}", text), encoding="utf-8")
    name = f"{section}.{field}"
    for read in (
        lambda: recipes.load("recipe.yaml"),
        lambda: recipes.read_saved(Path()),
        lambda: recipes.loads(Path("recipe.yaml").read_text(encoding="utf-8"), "step-1.safetensors"),
        lambda: recipes.load("mixer_s16_std", [(name, value)]),
    ):
        with pytest.raises(UserError, match=f"{name}: .* was removed; leave {name} out[,:] ") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_a_run_with_a_loss_that_is_gone(old):
    """Its checkpoint, used or continued, names itself, what was removed, and what remains."""
    path, tensors, meta = checkpoint.newest(Path("run/checkpoints"))
    meta["recipe"] = re.sub(r"  labels: soft\n(  loss: kl\n)?", "  labels: soft\n  loss: ofa\n", meta["recipe"])
    checkpoint.save(path, tensors, {key: value for key, value in meta.items() if key != "digest"})
    gone = f"{path}: distill.loss: 'ofa' was removed; leave distill.loss out: KL (distill.labels: soft) and hard"
    for use in (lambda: evaluate_run(Path("run")), lambda: go_on(recipes.read_saved(Path("run")), "run")):
        with pytest.raises(UserError, match=re.escape(gone)):
            use()


def test_a_run_is_evaluated_and_exported(old):
    student = trained_student(Path("run"))
    assert student.step == STOP and student.class_names == ["class0", "class1", "class2"]
    expected = json.loads(Path("expected.json").read_text())["stopped"]
    assert evaluate_run(Path("run")) == pytest.approx(expected, rel=1e-3)


def test_targets_are_replayed(old):
    folder = next(path for path in (Path("targets"), Path(legacy.CACHE_HEADER).with_suffix("")) if path.is_dir())
    header = read_header(folder)
    assert (header.classes, header.teachers, header.top_k) == (3, 1, 2)
    store = TargetCache(folder, header, 24, 8, soft=True)
    for epoch in range(2):
        words = store.open(epoch)
        assert words.shape == (24, 1, header.words) and words[..., 0].all()
    store.close()
