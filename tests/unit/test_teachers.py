"""Teachers: the images they see, the form they compute in, and where their weights come from."""

import argparse
import json
import logging
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipelines.errors import UserError
from std_fast.config import recipe as recipes
from std_fast.config.recipe import Recipe, TeacherSpec
from std_fast.config.schema import from_dict
from std_fast.teachers.classifiers import build_classifier, read_weights
from std_fast.teachers.teacher import Teacher, Teachers, build_teacher, in_precision
from std_fast.training.build import build_teachers, teacher_dtype
from tests.small_runs import store_run

K = 4
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.3, 0.2)  # the student's
OWN = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # in timm's configuration of its test models


def build(size: int = 32, dtype: torch.dtype = torch.float32, **spec) -> Teacher:
    return build_teacher(TeacherSpec(**spec), K, size, MEAN, STD, "distill.teachers.1", dtype)


def complaint(**spec) -> str:
    with pytest.raises(UserError) as caught:
        build(**spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A tiny timm ResNet of K classes with its own statistics and biases."""
    torch.manual_seed(3)
    model = timm.create_model("test_resnet", num_classes=K)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def weights(trained: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "test_resnet.safetensors"
    save_file(trained.state_dict(), path)
    return str(path)


def pixels(count: int = 3, size: int = 32) -> torch.Tensor:
    """In [0, 1]."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def normal(images: torch.Tensor, mean: tuple, std: tuple) -> torch.Tensor:
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


# -- what a teacher sees, and its form --------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [OWN, (MEAN, STD), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
def test_it_sees_the_students_images_in_its_own_normalisation(trained, weights, own):
    spec = {} if own == OWN else {"mean": own[0], "std": own[1]}  # by default timm's configuration says
    teacher = build(name="test_resnet", weights=weights, **spec)
    torch.testing.assert_close(
        teacher(normal(pixels(), MEAN, STD)), trained(normal(pixels(), *own)), atol=2e-5, rtol=1e-5
    )


def test_it_sees_the_students_images_in_its_own_size(trained, weights):
    teacher = build(name="test_resnet", weights=weights, image_size=24)
    smaller = F.interpolate(normal(pixels(), *OWN), (24, 24), mode="bilinear", antialias=True)
    torch.testing.assert_close(teacher(normal(pixels(), MEAN, STD)), trained(smaller), atol=2e-5, rtol=1e-5)


def test_inference_form(weights, caplog):
    with caplog.at_level(logging.INFO, logger="std_fast"):
        teacher = build(name="test_resnet", weights=weights)
    assert "distill.teachers.1: test_resnet" in caplog.text
    assert "0.4 M parameters, 15 batch norms folded, 32 px, float32" in caplog.text
    teachers = Teachers([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teachers.parameters())
    assert not any(isinstance(module, _BatchNorm) for module in teachers.modules())
    kernels = [p for p in teachers.parameters() if p.ndim == 4]
    assert kernels and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    assert not teachers(normal(pixels(), MEAN, STD)).labels.requires_grad


def test_low_precision_is_in_the_weights_and_autocast_changes_nothing(trained, weights):
    images = normal(pixels(), MEAN, STD)
    exact = build(name="test_resnet", weights=weights)
    low = build(name="test_resnet", weights=weights, dtype=torch.bfloat16)
    assert {name for name, p in low.named_parameters() if p.dtype == torch.float32} == {
        "model.fc.weight",
        "model.fc.bias",
    }
    wrong = (low(images) - exact(images)).abs().max() / exact(images).abs().max()
    assert 0 < wrong < 0.03  # 2^-8 in each of some 20 layers
    assert not torch.equal(low(images), low(images).bfloat16().float())  # the last layer is finer than that
    for teacher in (exact, low):
        plain = teacher(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(teacher(images), plain)


@pytest.mark.parametrize(
    ("own", "run", "expected"),
    [
        ("auto", "float32", torch.float32),
        ("auto", "bfloat16", torch.bfloat16),
        ("float32", "bfloat16", torch.float32),
        ("bfloat16", "float32", torch.bfloat16),
    ],
)
def test_precision_is_the_teachers_own_or_the_runs(own, run, expected):
    spec = TeacherSpec(name="resnet18", precision=own)
    assert teacher_dtype(spec, run, torch.device("cpu")) == expected


class Float32Inside(nn.Module):
    """Goes over to float32 on its way, as code written for autocast may."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, K)

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        return self.fc(F.conv2d(x.float(), self.body.weight).mean((2, 3)))


def test_a_model_that_cannot_compute_in_low_precision_stays_as_it_is(caplog):
    model = Float32Inside()
    with caplog.at_level(logging.WARNING, logger="std_fast"):
        assert in_precision(model, torch.bfloat16, 32, "distill.teachers.0") is model
    assert "distill.teachers.0: stays in float32, it cannot compute in torch.bfloat16" in caplog.text
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_it_compiles_as_one_graph(weights):
    teachers = Teachers([build(name="test_resnet", weights=weights, image_size=24, dtype=torch.bfloat16)])
    images = normal(pixels(), MEAN, STD)
    compiled = torch.compile(teachers, backend="eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(images).confidence, teachers(images).confidence)


def test_several_answer_in_the_recipes_order(trained, weights, tmp_path):
    state = trained.state_dict()
    save_file(state | {name: state[name].flip(0) for name in ("fc.weight", "fc.bias")}, tmp_path / "other.safetensors")
    one = build(name="test_resnet", weights=weights)
    other = build(name="test_resnet", weights=str(tmp_path / "other.safetensors"), image_size=24)
    images = normal(pixels(), MEAN, STD)
    targets = Teachers([one, other], temperature=2.0)(images)
    logits = [one(images), other(images)]
    assert targets.labels.tolist() == torch.stack([x.argmax(1) for x in logits], 1).tolist()
    assert (targets.labels[:, 0] != targets.labels[:, 1]).all()
    for i, own in enumerate(logits):
        torch.testing.assert_close(targets.log_probs[:, i], (own / 2).log_softmax(1))


# -- where the weights come from --------------------------------------------------------------------------------------


def write_checkpoint(path: Path, state: dict) -> Path:
    """As timm's train.py does, from a compiled model in DDP, with a moving average."""
    worse = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in state.items()}
    ema = {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}
    arguments = argparse.Namespace(model="test_resnet", lr=0.1, mean=None)
    torch.save({"epoch": 3, "arch": "test_resnet", "state_dict": worse, "state_dict_ema": ema, "args": arguments}, path)
    return path


def write_folder(path: Path, model: nn.Module, **changes) -> Path:
    timm.models.save_for_hf(model, path, safe_serialization=True)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    return path


def write_run(path: Path, state: dict, recipe: recipes.Recipe, classes: int = K) -> Path:
    tensors = {f"model.backbone.{name}": torch.zeros_like(tensor) for name, tensor in state.items()}
    tensors |= {f"ema.backbone.{name}": tensor for name, tensor in state.items()}  # the moving average is preferred
    return store_run(path, recipe, tensors, classes)


def plain_recipe(name: str = "test_resnet", **options) -> recipes.Recipe:
    recipe = recipes.Recipe()
    student = replace(recipe.student, name=name, options=options)
    augment = replace(recipe.augment, mean=OWN[0], std=OWN[1])
    return replace(recipe, student=student, data=replace(recipe.data, image_size=32), augment=augment)


def save(kind: str, folder: Path, model: nn.Module) -> dict:
    """Saves the model; the recipe entry that finds it."""
    state = model.state_dict()
    if kind == "state dict":
        torch.save(state, folder / "w.pth")
        return {"name": "test_resnet", "weights": str(folder / "w.pth")}
    if kind == "timm checkpoint":
        return {"name": "test_resnet", "weights": str(write_checkpoint(folder / "model_best.pth.tar", state))}
    if kind == "hub folder":
        return {"weights": str(write_folder(folder, model))}
    if kind == "local-dir":
        timm.models.save_for_hf(model, folder, safe_serialization=False)  # pytorch_model.bin
        return {"weights": f"local-dir:{folder}", "name": "test_resnet"}
    return {"weights": str(write_run(folder / "run", state, plain_recipe()))}


@pytest.mark.parametrize("kind", ["state dict", "timm checkpoint", "hub folder", "local-dir", "run"])
def test_weights_from(kind, trained, tmp_path):
    teacher = build(**save(kind, tmp_path, trained))
    torch.testing.assert_close(
        teacher(normal(pixels(), MEAN, STD)), trained(normal(pixels(), *OWN)), atol=2e-5, rtol=1e-5
    )


def test_a_hub_folder_says_its_normalisation(trained, tmp_path):
    own = {**trained.pretrained_cfg, "num_classes": K, "mean": [0.2, 0.2, 0.2], "std": [0.5, 0.5, 0.5]}
    teacher = build(weights=str(write_folder(tmp_path, trained, pretrained_cfg=own)))
    expected = trained(normal(pixels(), (0.2,) * 3, (0.5,) * 3))
    torch.testing.assert_close(teacher(normal(pixels(), MEAN, STD)), expected, atol=2e-5, rtol=1e-5)


def test_an_exported_student_can_teach(tmp_path):
    shape = dict(img_size=16, patch_size=4, dim=16, depth=3, token_dim=8, channel_dim=16, teachers=2)
    model = timm.create_model("std_mixer", num_classes=K, **shape).eval()
    timm.models.save_for_hf(model, tmp_path, model_args=shape, safe_serialization=True)
    teacher = build(weights=str(tmp_path))
    assert teacher.image_size == 16
    own = (model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    small = F.interpolate(normal(pixels(), *own), (16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(teacher(normal(pixels(), MEAN, STD)), model(small), atol=2e-5, rtol=1e-5)


def test_a_backbone_of_this_project_from_a_file(tmp_path):
    options = dict(patch_size=8, dim=16, depth=2, token_dim=8, channel_dim=16)
    model = build_classifier("mixer", K, 32, **options).eval()
    save_file(model.state_dict(), tmp_path / "mixer.safetensors")
    teacher = build(name="mixer", weights=str(tmp_path / "mixer.safetensors"), options=options)
    images = normal(pixels(), MEAN, STD)
    assert torch.equal(teacher(images), model(images))  # no configuration: the student's normalisation


def test_models_of_one_size_get_it_and_positions_are_interpolated_only_when_asked(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=K, img_size=96).eval()
    file = str(tmp_path / "vit.safetensors")
    save_file(model.state_dict(), file)
    assert "pos_embed has shape (1, 37, 64), this model needs (1, 101, 64)" in complaint(name="test_vit", weights=file)
    with torch.no_grad():
        sized = build(name="test_vit", weights=file, options={"img_size": 96})
        assert sized.image_size == 96
        larger = F.interpolate(normal(pixels(), *OWN), (96, 96), mode="bilinear", antialias=True)
        images = normal(pixels(), MEAN, STD)
        torch.testing.assert_close(sized(images), model(larger), atol=1e-5, rtol=1e-5)
        asked = build(name="test_vit", weights=file, image_size=32)
    assert asked.model.pos_embed.shape == (1, 5, 64)
    assert torch.equal(asked.model.head.weight, model.head.weight)
    assert "state_dict" not in asked.model.pretrained_cfg


def test_the_stem_for_small_images(tmp_path):
    model = build_classifier("resnet18", 10, 32, small_stem=True)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962  # ResNet-18 for CIFAR-10 as commonly counted
    options = dict(small_stem=True, layers=(1, 1, 1, 1), channels=(8, 8, 16, 16))
    for name in ("resnet18", "resnet18d"):  # a plain stem and a deep one
        model = build_classifier(name, K, 32, **options).eval()
        assert model.forward_features(pixels()).shape[-1] == 4  # 1/8, not 1/32
        assert [info["reduction"] for info in model.feature_info] == [1, 1, 2, 4, 8]
        teacher = build(weights=str(write_run(tmp_path / name, model.state_dict(), plain_recipe(name, **options))))
        images = normal(pixels(), MEAN, STD)
        torch.testing.assert_close(teacher(images), model(normal(pixels(), *OWN)), atol=2e-5, rtol=1e-5)
    with pytest.raises(UserError, match="test_vit: the option small_stem is for timm's ResNets, and test_vit is none"):
        build_classifier("test_vit", K, 32, small_stem=True)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["state dict", "timm checkpoint", "hub folder", "run"])
def test_other_classes_are_refused_with_both_numbers(kind, tmp_path):
    model = timm.create_model("test_resnet", num_classes=9)
    entry = save(kind, tmp_path, model)
    if kind == "run":
        write_run(tmp_path / "run", model.state_dict(), plain_recipe(), classes=9)
    assert "a teacher of 9 classes, but the data has 4" in complaint(**entry)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit_tiny_distilled_patch16_224", dict(depth=1, embed_dim=12, num_heads=1)),  # two heads
        ("swin_tiny_patch4_window7_224", dict(depths=(1, 1), embed_dim=12, num_heads=(1, 2))),
        ("test_efficientnet", {}),
        ("test_convnext", {}),
        ("caformer_s18", {}),  # a head of two layers
        ("mobilenetv3_small_050", {}),
        ("resnetv2_50", dict(layers=(1, 1, 1, 1), channels=(8, 16, 24, 32), stem_chs=8)),  # a convolution
        ("mixer", dict(patch_size=8, dim=16, depth=2, token_dim=8, channel_dim=16)),
    ],
)
def test_the_classifier_is_found_in_every_family(name, options, tmp_path):
    size = 224 if name.endswith("_224") else 32
    model = build_classifier(name, 9, size, **options)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    text = complaint(name=name, weights=str(tmp_path / "w.pth"), options=options)
    assert "a teacher of 9 classes, but the data has 4" in text


def test_pretrained_of_other_classes_is_refused_before_it_is_fetched():
    text = complaint(name="resnet50", weights="pretrained")
    assert "distill.teachers.1 (resnet50): a teacher of 1000 classes, but the data has 4" in text


def test_without_a_network_it_says_which_file_to_put_where(monkeypatch, tmp_path, caplog):
    """A real attempt: nothing listens on that port, and nothing is in the cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    teachers = [{"name": name, "weights": "pretrained"} for name in ("test_resnet", "test_vit")]
    recipe = from_dict(Recipe, {"distill": {"mode": "std", "teachers": teachers}, "data": {"image_size": 32}})
    with pytest.raises(UserError) as caught, caplog.at_level(logging.INFO):
        build_teachers(recipe, 1000, torch.device("cpu"))
    text = str(caught.value)
    assert text.startswith("distill.teachers.0.weights: test_resnet could not be downloaded (LocalEntryNotFoundError)")
    assert [record.name for record in caplog.records if record.name != "timm.models._builder"] == ["std_fast"]
    assert "https://huggingface.co/timm/test_resnet.r160_in1k/resolve/main/model.safetensors" in text
    assert "put it here as weights/test_resnet.safetensors" in text
    assert "set distill.teachers.0.weights to weights/test_resnet.safetensors" in text
    assert "/timm/test_vit.r160_in1k/resolve/main/model.safetensors, put it here as weights/test_vit.saf" in text
    assert "set distill.teachers.1.weights to weights/test_vit.safetensors" in text


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"name": "test_resnet"}, "distill.teachers.1.weights: is empty"),
        ({"weights": "{weights}"}, "distill.teachers.1.name: is needed"),
        ({"weights": "pretrained"}, "distill.teachers.1.name: is needed"),
        ({"name": "resnet5", "weights": "pretrained"}, "resnet5: no such model here or in timm"),
        ({"name": "resnet50.tv_in2k", "weights": "pretrained"}, "did you mean 'resnet50.tv_in1k'"),
        ({"name": "test_resnet", "weights": "{tmp}/none.pth"}, "none.pth: no such weights file"),
        ({"name": "test_vit", "weights": "{weights}"}, "does not fit the model: lacks "),
        ({"name": "resnet18", "weights": "{weights}", "options": {"layers": [1]}}, "timm cannot build it with {{"),
        ({"name": "resnet18", "weights": "{weights}", "options": {"num_classes": 1}}, "num_classes: has its own place"),
        ({"name": "test_resnet", "weights": "{weights}", "std": (0.1, 0.0, 0.1)}, "teacher.std: must be positive"),
        ({"name": "test_resnet", "weights": "{weights}", "options": {"deep": 1}}, "unexpected keyword argument 'deep'"),
        ({"name": "test_mambaout", "weights": "{weights}"}, "more besides; name the model that it was trained as"),
        ({"weights": "{tmp}"}, "holds no run (no recipe.yaml)"),
        ({"weights": "{tmp}/folder", "name": "resnet50"}, "name: resnet50 but {tmp}/folder is a test_resnet"),
        ({"weights": "{tmp}/folder", "options": {"a": 1}}, "options: have no effect"),
        ({"weights": "{tmp}/foreign"}, "foreign/config.json: describes no timm model (KeyError('architecture'))"),
        ({"weights": "{tmp}/torn"}, "torn/config.json: describes no timm model (JSONDecodeError"),
        ({"weights": "{tmp}/bare"}, "bare/model.safetensors: no such weights file"),
        ({"weights": "{tmp}/mixer", "image_size": 48}, "image_size: the model cannot take 48 px"),
        ({"name": "test_resnet", "weights": "{tmp}/nan.pth"}, "a random image gets logits that are not finite"),
        ({"weights": "{tmp}/student"}, "is a distilled student; a teacher is a plain run"),
    ],
)
def test_mistakes_are_named(spec, expected, trained, weights, tmp_path):
    write_folder(tmp_path / "folder", trained)
    for name, text in (("foreign", '{"model_type": "bert"}'), ("torn", '{"archi'), ("bare", None)):
        (tmp_path / name).mkdir()
        config = (tmp_path / "folder" / "config.json").read_text() if text is None else text
        (tmp_path / name / "config.json").write_text(config)
    shape = dict(patch_size=8, dim=16, depth=2, token_dim=8, channel_dim=16)
    mixer = build_classifier("mixer", K, 32, **shape)
    write_run(tmp_path / "mixer", mixer.state_dict(), plain_recipe("mixer", **shape))
    distill = recipes.Distill(teachers=(TeacherSpec("resnet18", "x"),))
    write_run(tmp_path / "student", mixer.state_dict(), replace(plain_recipe("mixer", **shape), distill=distill))
    state = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    state["fc.bias"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")

    def fill(text):
        return text.format(tmp=tmp_path, weights=weights) if isinstance(text, str) else text

    assert fill(expected) in complaint(**{key: fill(value) for key, value in spec.items()})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "holds no state dict of tensors"),
        (b"\x89PNG\r\n\x1a\n", "holds no state dict of tensors"),
        (b"data: {train: x}\n", "holds no state dict of tensors"),
        (b"PK\x03\x04 cut short", "cannot be read as tensors only"),
        ({"optimizer": {"lr": torch.ones(1)}}, "holds no state dict of tensors"),
        ({"state_dict": {"a": 1}}, "holds no state dict of tensors"),
        ({"state_dict": {3: torch.ones(1)}}, "holds no state dict of tensors"),
        ([torch.ones(1)], "holds no state dict of tensors"),
        ({}, "holds no state dict of tensors"),
    ],
)
def test_files_that_hold_something_else(content, expected, tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError) as caught:
        read_weights(path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.float64(3.0), np.ones(3)])
def test_numpy_objects_are_named_without_torchs_advice_to_trust_the_file(value, tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "best": value}, tmp_path / "w.pth")
    with pytest.raises(UserError) as caught:
        read_weights(tmp_path / "w.pth")
    assert "w.pth: cannot be read as tensors only (it holds numpy." in str(caught.value)
    assert "save the model's state_dict() alone" in str(caught.value) and "weights_only" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("prefix", ["module.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.module."])
def test_prefixes_of_wrapped_models_are_taken_off(prefix, suffix, tmp_path):
    state = {"conv.weight": torch.ones(2), "module_list.0.weight": torch.zeros(2)}
    path, wrapped = tmp_path / f"w.{suffix}", {prefix + name: tensor for name, tensor in state.items()}
    save_file(wrapped, path) if suffix == "safetensors" else torch.save(wrapped, path)
    assert read_weights(path).keys() == state.keys()


def test_a_checkpoint_of_composer(tmp_path):
    state = {"module.fc.bias": torch.ones(2), "module.conv.weight": torch.ones(2)}
    torch.save({"state": {"model": state, "optimizers": {}}}, tmp_path / "c.pt")
    torch.save({"state": {"epoch": 3}, "model": state}, tmp_path / "other.pt")
    for name in ("c.pt", "other.pt"):
        assert read_weights(tmp_path / name).keys() == {"fc.bias", "conv.weight"}


def test_a_model_without_stochastic_depth():
    with pytest.raises(UserError, match="it has no stochastic depth: set --student.drop_path 0"):
        build_classifier("vgg11", K, 32, drop_path=0.1)


def test_a_safetensors_file_that_is_cut_short(weights, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(Path(weights).read_bytes()[:-1])
    with pytest.raises(UserError, match="is no complete safetensors file"):
        read_weights(path)
