"""Teachers of low precision: which layers change, what they answer, who is refused (float8: tests/gpu)."""

import copy
import logging
import sys
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file

from pipelines.augment.device import Augment
from pipelines.errors import UserError
from std_fast.config.recipe import Recipe
from std_fast.config.schema import from_dict
from std_fast.teachers.classifiers import build_classifier
from std_fast.teachers.fold import random_image
from std_fast.teachers.quantize import quantize
from std_fast.training.build import build_teachers, make_fast, teacher_dtype

CPU = torch.device("cpu")
MIXER = dict(patch_size=8, dim=32, depth=2, token_dim=16, channel_dim=64)
try:
    import torchao.quantization  # noqa: F401

    WHY_NOT = ""
except ImportError as error:  # not there, or not for this torch
    WHY_NOT = f"torchao cannot be used: {error}"
needs_torchao = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


def vit():
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=7, img_size=32).eval().requires_grad_(False)


def recipe(folder, precision, name="test_vit"):
    save_file(vit().state_dict(), folder / "vit.safetensors")
    teacher = {"name": name, "weights": str(folder / "vit.safetensors"), "precision": precision, "image_size": 32}
    return from_dict(Recipe, {"data": {"image_size": 32}, "distill": {"mode": "std", "teachers": [teacher]}})


@needs_torchao
def test_int8_changes_the_linear_layers_but_the_last():
    model, images = vit(), torch.randn(64, 3, 32, 32)
    low = copy.deepcopy(model)
    assert quantize(low, "int8", random_image(32), "distill.teachers.0") == 24  # four in each of six blocks
    kinds = {name: type(p).__name__ for name, p in low.named_parameters()}
    assert {name for name, kind in kinds.items() if kind == "Int8Tensor"} == {
        f"blocks.{i}.{layer}.weight" for i in range(6) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    exact, found = model(images), low(images)
    assert 0 < (found - exact).norm() / exact.norm() < 0.05  # 1 / 254 of the largest, in each layer
    assert (found.argmax(1) == exact.argmax(1)).float().mean() > 0.9


@needs_torchao
def test_a_layer_whose_weight_the_model_uses_itself_is_left_alone():
    model = build_classifier("mixer", 7, 32, **MIXER).eval()
    assert quantize(model, "int8", random_image(32), "t") == 4  # channel mixing; token mixing is a batched product
    with pytest.raises(UserError, match="t.precision: int8 is for linear layers, and this model has none"):
        quantize(build_classifier("resmlp", 7, 32, patch_size=8, dim=16, depth=1).eval(), "int8", random_image(32), "t")
    with pytest.raises(UserError, match="set it to auto"):
        quantize(timm.create_model("test_resnet").eval(), "int8", random_image(32), "t")


@needs_torchao
@pytest.mark.parametrize("backend", ["off", "aot_eager"])
def test_a_recipes_teacher_is_quantized_and_compiles(tmp_path, caplog, backend):
    r = recipe(tmp_path, "int8")
    r = replace(r, run=replace(r.run, compile=backend))
    images = torch.randn(8, 3, 32, 32)
    exact = build_teachers(r, 7, CPU)(images)
    with caplog.at_level(logging.INFO, logger="std_fast"):
        teachers, _ = make_fast(r, CPU, Augment(r.augment, 0), build_teachers(r, 7, CPU))
    assert "distill.teachers.0: 24 linear layers in int8, logits of noise off by" in caplog.text
    found = teachers(images)
    assert not torch.equal(found.confidence, exact.confidence)
    torch.testing.assert_close(found.confidence, exact.confidence, rtol=0, atol=0.05)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"distill.teachers.1.precision: int8 needs torchao .*pip install torchao"):
        quantize(vit(), "int8", random_image(32), "distill.teachers.1")


@needs_torchao
def test_float8_needs_its_gpu():
    with pytest.raises(UserError, match="float8 needs a GPU of compute capability 8.9 or more; set it to int8 or auto"):
        quantize(vit(), "float8", random_image(32), "t")


@pytest.mark.parametrize(
    ("precision", "run", "expected"),
    [
        ("auto", "float32", torch.float32),
        ("auto", "bfloat16", torch.bfloat16),
        ("float32", "bfloat16", torch.float32),
        ("bfloat16", "float32", torch.bfloat16),
        ("int8", "float32", torch.float32),
        ("int8", "bfloat16", torch.bfloat16),
        ("float8", "float32", torch.bfloat16),
    ],
)
def test_the_precision_of_what_is_not_quantized(tmp_path, precision, run, expected):
    r = recipe(tmp_path, precision)
    r = replace(r, run=replace(r.run, precision=run))
    assert teacher_dtype(r.distill.teachers[0], r, CPU) == expected
    assert build_teachers(r, 7, CPU).teachers[0].dtype == expected
