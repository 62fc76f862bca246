"""Options for a budget in real runs: smaller images early, and stochastic depth that skips work."""

import json
from dataclasses import replace

import pytest
import torch

from pipelines.errors import UserError
from std_fast import cli
from std_fast.commands import plan
from std_fast.config import recipe as recipes
from std_fast.models.drop_path import GROUP
from std_fast.teachers.teacher import Teachers
from std_fast.training import build
from std_fast.training.evaluate import trained_student
from std_fast.training.step import Trainer
from std_fast.training.train import train
from tests.small_runs import CYCLE, EARLY, assert_same_bits, at, final_tensors, small_recipe, train_until, write_recipe


@pytest.fixture
def recipe(teacher, image_folder, tmp_path):
    """24 px images, two teachers, MINE; 6 steps in two epochs."""
    distill = {"mode": "std", "teachers": [{"weights": str(teacher), "image_size": 24}] * 2}
    run = {"length": "2 epochs", "eval_every": "1 epoch", "save_every": "10 minutes"}
    recipe = small_recipe(image_folder, tmp_path / "run", student=EARLY, distill=distill, run=run)
    return replace(recipe, data=replace(recipe.data, image_size=24))


def sizes_seen(monkeypatch):
    """A list to which each step of a run adds the height and width of what its student sees."""
    seen = []

    class Looking(Trainer):
        def step(self, batch, now):
            inner = self.forward
            self.forward = lambda images, *rest: seen.append(tuple(images.shape[2:])) or inner(images, *rest)
            super().step(batch, now)
            self.forward = inner

    monkeypatch.setattr(build, "Trainer", Looking)
    return seen


def test_the_student_sees_smaller_images_early_and_the_teachers_never(recipe, tmp_path, monkeypatch):
    seen, asked = sizes_seen(monkeypatch), []
    kept = Teachers.forward
    monkeypatch.setattr(Teachers, "forward", lambda self, images: asked.append(images.shape[2]) or kept(self, images))
    train(recipe, quiet=True)
    assert seen == [(16, 16)] * 2 + [(24, 24)] * 4  # progress 1/6 and 2/6 are early, 3/6 is not
    assert asked == [24] * 6


def test_a_convolutional_network_of_timms_sees_smaller_images_early(recipe, monkeypatch):
    seen = sizes_seen(monkeypatch)
    sgd = recipes.Optim(name="sgd", momentum=0.9, lr=0.1, warmup="5 %")
    plain = replace(recipe, distill=recipes.Distill(mode="none"), optim=sgd)
    with pytest.raises(UserError, match="early_size: test_vit takes images of one size only"):
        train(replace(plain, student=replace(recipe.student, name="test_vit", options={})), quiet=True)
    train(replace(plain, student=replace(recipe.student, name="test_resnet", options={})), quiet=True)
    assert seen == [(16, 16)] * 2 + [(24, 24)] * 4


def test_it_goes_on_to_the_bit_and_reads_what_others_stored(recipe, tmp_path):
    train(recipe, quiet=True)
    expected = final_tensors(tmp_path / "run")
    for stop_at in (1, 3):
        part = at(recipe, tmp_path / str(stop_at))
        train_until(part, stop_at)
        train(part, quiet=True, resume=True)
        assert_same_bits(final_tensors(tmp_path / str(stop_at)), expected)
    # targets stored by a run that always sees full-size images
    store = replace(recipe, distill=replace(recipe.distill, target_cache=str(tmp_path / "store")))
    train(at(replace(store, student=replace(store.student, early_size=0)), tmp_path / "full-size"), quiet=True)
    train(at(store, tmp_path / "stored"), quiet=True, on_step=no_teachers)
    assert_same_bits(final_tensors(tmp_path / "stored"), expected)


def no_teachers(run):
    assert run.parts.teachers is None


def test_skipping_trains_and_goes_on_to_the_bit(recipe, image_folder, tmp_path):
    mixer = {"patch_size": 4, "dim": 16, "depth": 3, "token_dim": 8, "channel_dim": 32}
    student = replace(recipe.student, name="mixer", options=mixer, early_size=0, drop_path_mode="subset")
    links = tmp_path / "data" / "ant"
    links.mkdir(parents=True)
    files = sorted(image_folder.glob("*/*.jpg"))
    for number in range(2 * GROUP):
        (links / f"{number}.jpg").symlink_to(files[number % len(files)])
    recipe = replace(recipe, student=student, data=replace(recipe.data, train=str(tmp_path / "data"), val=""))
    recipe = at(replace(recipe, distill=recipes.Distill(mode="none")), tmp_path / "run", batch=GROUP)
    train(recipe, quiet=True)
    assert trained_student(tmp_path / "run").step == 4
    train_until(at(recipe, tmp_path / "part"), 3)
    train(at(recipe, tmp_path / "part"), quiet=True, resume=True)
    assert_same_bits(final_tensors(tmp_path / "part"), final_tensors(tmp_path / "run"))


def test_plan_measures_both_sizes(recipe, tmp_path, capsys):
    path = write_recipe(at(recipe, tmp_path / "none"), tmp_path / "recipe.yaml")
    stored = tmp_path / "measured.json"
    assert cli.main(["plan", path, "--seconds", "0.4", "--save", str(stored), "--json"]) == 0
    capsys.readouterr()
    measured = json.loads(stored.read_text())
    assert "running" in measured["modes"]  # a slow machine leaves the others out
    for mode in measured["modes"].values():
        assert mode["early_images_per_second"] > 0
        mode |= {"images_per_second": 100.0, "early_images_per_second": 300.0}

    def rate(share, length):
        changed = replace(recipe, student=replace(recipe.student, early_share=share))
        return plan.buy(measured, at(changed, "", length=length)).rows[0].images_per_second

    assert rate(0.5, "8 gpu-hours") == 200.0  # half of the hours each
    assert rate(0.5, "8 epochs") == 150.0  # half of the images each


@pytest.mark.parametrize(
    ("student", "complaint"),
    [
        ({"name": "mixer", "options": {"patch_size": 4, "dim": 16, "depth": 3}}, "early_size: mixer takes images of"),
        ({"early_size": 24}, "early_size: 24 is not smaller than data.image_size 24"),
        ({"early_size": 0, "drop_path": 0.2, "drop_path_mode": "subset"}, "multiple of 32, 32 for each process"),
    ],
)
def test_what_does_not_fit_is_said(recipe, student, complaint):
    with pytest.raises(UserError, match=f"^student.*{complaint}"):
        train(replace(recipe, student=replace(recipe.student, **student)), quiet=True)


@pytest.mark.parametrize("side", (16, 20, 24))
def test_features_of_smaller_images_fit_the_modules(side):
    torch.manual_seed(0)
    model = build.build_classifier("cyclemlp", 3, 24, 0.0, **CYCLE).eval()
    images = torch.randn(2, 3, side, side)
    taps = model.forward_taps(images, (1, 2))
    assert [z.shape for z in taps.features] == [(2, model.patches, model.dim)] * 2 and taps.logits.shape == (2, 3)
    full_size = model._stages(images, (2,), None)[1][2].flatten(1, 2)
    if side == 24:
        assert torch.equal(taps.features[1], full_size)
    torch.testing.assert_close(taps.features[1].mean(), full_size.mean(), rtol=0.2, atol=0.02)
