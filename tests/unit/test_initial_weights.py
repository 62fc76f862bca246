"""What a training starts from: weights of the same model, of other classes, and what is said where they do not fit."""

import shutil
from dataclasses import replace

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file

from pipelines.errors import UserError
from std_fast.config import files
from std_fast.config.recipe import Recipe
from std_fast.config.schema import from_dict
from std_fast.runtime import checkpoint
from std_fast.teachers.classes import imagenet
from std_fast.teachers.classifiers import build_classifier
from std_fast.training.build import build_student
from std_fast.training.evaluate import evaluate_run, trained_student
from std_fast.training.initial_weights import read_initial_weights
from tests.small_runs import store_run, write_recipe

OPTIONS = {"patch_size": 8, "dim": 16, "depth": 2, "token_dim": 8, "channel_dim": 32}
STD = {"mode": "std", "teachers": [{"name": "a"}, {"name": "b"}]}


def recipe_of(distill, size=16, **student):
    return from_dict(
        Recipe,
        {
            "student": {"name": "mixer", "options": OPTIONS, **student},
            "distill": distill,
            "data": {"image_size": size, "val": "elsewhere/val"},
            "run": {"seed": 5, "device": "cpu"},
        },
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a distilled run of three classes."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    recipe = recipe_of(STD)
    student = build_student(recipe, 3)
    tensors = {f"model.{name}": torch.randn_like(t) for name, t in student.state_dict().items()}
    return store_run(folder, recipe, tensors, 3)


def stored(run):
    _, tensors, _ = checkpoint.newest(run / "checkpoints")
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def is_head(name):
    return ".head" in name or ".heads." in name


@pytest.mark.parametrize("distill", [STD, {"mode": "none"}])
def test_a_new_head_keeps_fresh_heads_and_takes_all_else(run, distill):
    student = build_student(recipe_of(distill, weights=str(run), new_head=True), 5)
    fresh = build_student(recipe_of(distill), 5).state_dict()
    heads = {name for name in fresh if is_head(name)}
    assert "backbone.head.weight" in heads and len(heads) == (6 if distill is STD else 2)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, fresh[name] if name in heads else stored(run)[name]), name


def test_a_file_with_another_head_goes_into_the_backbone(run, tmp_path):
    backbone = {n.removeprefix("backbone."): t for n, t in stored(run).items() if n.startswith("backbone.")}
    save_file(backbone, tmp_path / "w.safetensors")
    student = build_student(recipe_of(STD, weights=str(tmp_path / "w.safetensors"), new_head=True), 5)
    own = student.backbone.state_dict()
    assert all(torch.equal(tensor, backbone[name]) for name, tensor in own.items() if "head" not in name)
    assert own["head.weight"].shape == (5, 16)
    with pytest.raises(UserError, match="of 3 classes, but the data has 5; set student.new_head true"):
        build_student(recipe_of(STD, weights=str(tmp_path / "w.safetensors")), 5)


def test_a_file_of_imagenets_classes_gives_a_subset_its_rows(tmp_path):
    names = [imagenet("imagenet-1k")[i] for i in (7, 3)]
    recipe = recipe_of({"mode": "none"}, weights=str(tmp_path / "w.safetensors"))
    backbone = build_classifier("mixer", 1000, 16, **OPTIONS)
    torch.nn.init.normal_(backbone.head.weight)
    save_file(backbone.state_dict(), tmp_path / "w.safetensors")
    student = build_student(recipe, 2, names)
    assert torch.equal(student.backbone.head.weight, backbone.head.weight[[7, 3]])
    with pytest.raises(UserError, match="of 1000 classes, but the data has 2; set student.new_head true"):
        build_student(recipe, 2, "01")  # which may be any two of them


def test_what_does_not_fit_names_the_field_that_makes_it_fit(run):
    def complaint(recipe, classes=3):
        with pytest.raises(UserError) as caught:
            build_student(recipe, classes)
        return str(caught.value)

    weights = {"weights": str(run)}
    assert "of 3 classes, but the data has 5; set student.new_head true" in complaint(recipe_of(STD, **weights), 5)
    assert "set data.image_size 16 and student.options" in complaint(recipe_of(STD, 32, **weights))
    assert "set data.image_size 16 and student.options" in complaint(recipe_of(STD, 32, **weights, new_head=True), 5)
    hint = "student.weights: timm has no pretrained weights for mixer, as it has for mixer_s16, mixer_b16, resmlp_s12"
    assert hint in complaint(recipe_of(STD, weights="pretrained"))
    small = recipe_of({"mode": "none"}, name="resnet18", options={"small_stem": True}, weights="pretrained")
    assert "student.options: small_stem makes a layer" in complaint(small)
    same = build_student(recipe_of(STD, **weights), 3).state_dict()
    assert all(torch.equal(tensor, stored(run)[name]) for name, tensor in same.items())


@pytest.mark.parametrize(("name", "timms"), [("test_resnet", "test_resnet"), ("resmlp_s12", "resmlp_12_224")])
def test_pretrained_is_timms_own_download(monkeypatch, name, timms):
    """The download is replaced by random weights; the smallest model of timm's, and a student that timm has too."""
    asked, create = [], timm.create_model

    def download(model, pretrained=False, **options):
        if pretrained:
            asked.append(model)
            options["num_classes"] = 7
        return create(model, **options)

    monkeypatch.setattr(timm, "create_model", download)
    recipe = recipe_of({"mode": "none"}, 224, name=name, options={}, weights="pretrained")
    with pytest.raises(UserError, match="of 7 classes, but the data has 3; set student.new_head true"):
        build_student(recipe, 3)
    student = build_student(replace(recipe, student=replace(recipe.student, new_head=True)), 3)
    assert set(asked) == {timms} and student.num_classes == 3


def test_pretrained_without_a_network_says_which_file_to_put_where(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    recipe = recipe_of({"mode": "none"}, 32, name="test_resnet", options={}, weights="pretrained")
    with pytest.raises(
        UserError, match=r"student.weights: test_resnet could not .* set student.weights to weights/test"
    ):
        build_student(recipe, 1000)


def test_a_checkpoint_file_names_the_folder_of_its_run(run):
    (file,) = checkpoint.listed(run / "checkpoints")[-1:]
    with pytest.raises(UserError, match=f"is a checkpoint of a run; give the run's folder, {run}$"):
        read_initial_weights(file)


def test_evaluating_from_another_folder_names_the_way_on(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"elsewhere/val.*for data elsewhere: std-fast eval {run} DATA"):
        evaluate_run(run)
    with pytest.raises(UserError) as caught:
        evaluate_run(run, "nowhere")
    assert "eval RUN" not in str(caught.value)
    assert files.find(str(run)) == run / "recipe.yaml"


def test_a_run_that_began_with_a_new_head_is_built_without_its_first_weights(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    recipe = recipe_of(STD, weights=str(tmp_path / "gone"), new_head=True)
    write_recipe(recipe, tmp_path / "run" / "recipe.yaml")
    assert trained_student(tmp_path / "run").student.num_classes == 3
