"""The students as timm users meet them."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import std_fast
from pipelines.errors import UserError
from std_fast.models import BACKBONES
from std_fast.registry import TimmStudent, architecture

ROOT = Path(std_fast.__file__).parents[1]
K, SIZE = 5, 32
SHAPES = {
    "std_mixer": dict(patch_size=8, dim=16, depth=3),
    "std_resmlp": dict(patch_size=8, dim=16, depth=3),
    "std_cyclemlp": dict(layers=[1, 1, 1, 3], embed_dims=[8, 8, 16, 16], mlp_ratios=[2] * 4),
}


def create(name="std_mixer", **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **{**dict(num_classes=K, img_size=SIZE), **SHAPES.get(name, {}), **kwargs})
    if isinstance(model.backbone.head, torch.nn.Linear):
        torch.nn.init.normal_(model.backbone.head.weight)  # it starts at zero, which hides the trunk
    return model


def images(B=4):
    return torch.randn(B, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def test_only_the_import_of_the_registry_registers():
    """A program of the project that builds an exported student as a teacher imports it itself."""
    code = """
import sys
import timm
hooks = list(sys.meta_path)
import std_fast
assert not timm.is_model("std_mixer_s16_224") and sys.meta_path == hooks
from std_fast.teachers.classifiers import timm_config
assert timm_config("std_mixer_s16_224").num_classes == 1000
assert timm.is_model("std_mixer_s16_224")
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_backbone_has_a_name_in_timm():
    names = set(timm.list_models("std_*"))
    assert names == {architecture(name) for name in BACKBONES}
    assert {"std_mixer_b16_224", "std_resmlp_s24_224", "std_cyclemlp_b5_224", "std_mixer"} <= names


@pytest.mark.parametrize("name", SHAPES)
def test_training_as_timm_does_it(name):
    model, x = create(name, drop_path_rate=0.1).train(), images()
    assert max(model.backbone.drop_rates) == pytest.approx(0.1)
    logits = model(x)
    assert logits.shape == (4, K)
    model.set_distilled_training(True)
    main, distilled = model(x)  # timm's token distillation task takes this pair
    assert main.shape == distilled.shape == (4, K)
    (main.square().sum() + distilled.square().sum()).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without
    model.eval()
    with torch.no_grad():
        out = model.outputs(x)
        assert torch.equal(model(x), (out.class_logits + out.dist_logits.mean(1)) / 2)


@pytest.mark.parametrize("name", SHAPES)
def test_names_in_pretrained_cfg_are_parameters(name):
    for kwargs in ({}, {"teachers": 1}, {"assign": [[0, 1], [0, 1]]}, {"teachers": 0}):
        model = create(name, **kwargs)
        cfg, names = model.pretrained_cfg, model.state_dict()
        heads = model.get_classifier() if isinstance(model.get_classifier(), tuple) else (model.get_classifier(),)
        assert all(model.get_submodule(n) is head for n, head in zip(cfg["classifier"], heads, strict=True))
        assert f"{cfg['first_conv']}.weight" in names
    assert len(create(name, assign=[[0, 1], [0, 1]]).get_classifier()) == 5


@pytest.mark.parametrize("kwargs", [{}, {"tokens": "spatial"}, {"tokens": "none"}, {"tokens": "deit"}])
def test_reset_classifier_renews_every_head_and_zero_leaves_features(kwargs):
    model, x = create(**kwargs).eval(), images()
    model.reset_classifier(3)
    assert model.num_classes == 3
    assert model(x).shape == (4, 3)
    assert model.outputs(x).dist_logits.shape == (4, 2, 3)
    model.reset_classifier(0)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    assert features.shape == (4, model.num_features)
    assert torch.equal(model(x), features)
    bare = create(**kwargs, num_classes=0).eval()
    assert bare(x).shape == (4, bare.num_features)
    model.reset_classifier(7)
    assert model(x).shape == (4, 7)
    assert all(head.weight.std() > 0.01 for head in model.get_classifier()[1:])


def test_the_head_alone_is_refused_where_it_is_not_the_prediction():
    x = images()
    model = create().eval()
    with pytest.raises(RuntimeError, match="predict='class'"):
        model.forward_head(model.forward_features(x))
    of_class = create(predict="class").eval()
    assert torch.equal(of_class.forward_head(of_class.forward_features(x)), of_class(x))


@pytest.mark.parametrize("name, channels", [("std_mixer", [16] * 3), ("std_cyclemlp", [8, 8, 16, 16])])
def test_features_only(name, channels):
    model = timm.create_model(name, features_only=True, img_size=SIZE, **SHAPES[name])
    maps = model(images())
    assert [m.shape[1] for m in maps] == model.feature_info.channels() == channels
    assert not any(n.startswith("model.std") for n, _ in model.named_parameters())


@pytest.mark.parametrize(
    "kwargs, complaint",
    [
        ({"in_chans": 1}, "in_chans"),
        ({"drop_rate": 0.1}, "drop_rate"),
        ({"img_size": (32, 64)}, "square"),
        ({"taps": [9]}, "taps"),
        ({"tokens": "deit", "taps": [3]}, "no effect"),
        ({"patchsize": 4}, "patch_size"),
    ],
)
def test_what_cannot_be_built_is_named(kwargs, complaint):
    with pytest.raises(UserError, match=complaint):
        create(**kwargs)


def test_there_are_no_pretrained_weights_to_pretend():
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        create(pretrained=True)
    assert isinstance(create(), TimmStudent)
