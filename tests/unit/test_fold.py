"""Folding keeps the function, of every family tried here, and leaves alone what it cannot fold."""

import logging

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from std_fast.teachers.classifiers import use_small_stem
from std_fast.teachers.fold import fold_batch_norms

TINY_RESNET = dict(layers=(1, 1, 1, 1), channels=(8, 16, 24, 32))
# name, options, image size, whether all norms go
FAMILIES = [
    ("test_resnet", {}, 32, True),
    ("resnet50", {}, 64, True),
    ("resnet101", TINY_RESNET, 64, True),
    ("resnet26d", TINY_RESNET, 64, True),  # deep stem, average pooling in the shortcuts
    ("seresnet50", TINY_RESNET, 64, True),
    ("regnety_002", {}, 32, True),  # ConvNormAct with timm's BatchNormAct2d
    ("test_efficientnet", {}, 32, True),
    ("tf_efficientnetv2_b0", {}, 32, True),  # Conv2dSame
    ("test_byobnet", {}, 32, True),
    ("resnetv2_50", dict(layers=(1, 1, 1, 1), channels=(8, 16, 24, 32), stem_chs=8), 64, False),  # norm before conv
    ("densenet121", dict(growth_rate=8, block_config=(2, 2)), 64, False),  # norm after concatenation
    ("levit_128s", {}, 224, False),  # norm of a reshaped linear layer
]


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


@torch.no_grad()
def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and affine parameters as if trained: nothing is 0 or 1."""
    random = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if module.track_running_stats:
                module.running_mean.normal_(0, 0.3, generator=random)
                module.running_var.uniform_(0.5, 2, generator=random)
            if module.affine:
                module.weight.uniform_(0.5, 1.5, generator=random)
                module.bias.normal_(0, 0.2, generator=random)
    return model.eval()


def difference(model: nn.Module, image_size: int) -> tuple[int, float]:
    """How many were folded; by how much of the largest logit the targets to other images than its own trial differ."""
    like = next(model.parameters())
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(9)).to(like)
    with torch.no_grad():
        before = model(images)
        folded = fold_batch_norms(model, image_size)
        after = model(images)
    assert before.std() > 0
    return folded, float((after - before).abs().max() / before.abs().max())


@pytest.mark.parametrize(("name", "options", "size", "everything"), FAMILIES)
def test_folding_keeps_the_logits(name, options, size, everything):
    torch.manual_seed(0)
    model = trained(timm.create_model(name, num_classes=7, **options)).double()
    count = norms(model)
    folded, wrong = difference(model, size)
    assert wrong < 1e-10
    assert 0 < folded == count - norms(model)
    assert (norms(model) == 0) == everything


def test_in_float32_only_rounding_remains():
    torch.manual_seed(0)
    model = trained(timm.create_model("test_resnet", num_classes=7))
    folded, wrong = difference(model, 64)
    assert folded == 15
    assert 0 < wrong < 1e-5


def test_a_small_stem_folds_too():
    model = trained(use_small_stem(timm.create_model("resnet18", num_classes=7, **TINY_RESNET), "resnet18")).double()
    folded, wrong = difference(model, 16)
    assert wrong < 1e-10
    assert folded and norms(model) == 0


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("test_convnext", {}, 64),
        ("swin_tiny_patch4_window7_224", dict(depths=(1, 1), embed_dim=12, num_heads=(1, 2)), 224),
        ("test_efficientnet_gn", {}, 64),
    ],
)
def test_models_without_batch_norm_stay_as_they_are(name, options, size):
    model = timm.create_model(name, num_classes=7, **options)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert fold_batch_norms(model, size) == 0
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


class Pooled(nn.Module):
    """Layers, then the mean over the image: logits."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x).mean((2, 3))


class Reused(nn.Module):
    """What comes out of the convolution is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return (self.bn(y) + y).mean((2, 3))


class Twice(nn.Module):
    """One convolution runs twice, and a norm follows one of the two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv(self.conv(x))).mean((2, 3))


class Standardised(nn.Conv2d):
    """Computes its weight from what it stores, so that a factor put into it would vanish."""

    def forward(self, x):
        return self._conv_forward(x, (self.weight - self.weight.mean()) / self.weight.std(), self.bias)


class TokenNorm(nn.Module):
    """A BatchNorm1d after a linear layer on `[B, P, C]` norms the patches P, not the layer's channels C = P."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.bn(self.fc(x.mean(3).mT[:, :3])).mean(2)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: Pooled(Standardised(3, 4, 3), nn.BatchNorm2d(4)), id="computed weight"),
        pytest.param(
            lambda: Pooled(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)),
            id="weight norm",
        ),
        pytest.param(
            lambda: Pooled(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4)), id="in place between"
        ),
        pytest.param(
            lambda: Pooled(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
            id="statistics of the batch",
        ),
        pytest.param(lambda: Pooled(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)), id="transposed"),
        pytest.param(Twice, id="runs twice"),
        pytest.param(TokenNorm, id="norm of tokens"),
    ],
)
def test_what_would_not_be_the_same_function_is_left_alone(model, caplog):
    torch.manual_seed(0)
    model = trained(model()).double()
    with caplog.at_level(logging.WARNING, logger="std_fast"):
        folded, wrong = difference(model, 8)
    assert (folded, wrong, norms(model)) == (0, 0.0, 1)
    assert not caplog.records  # seen beforehand, not put back


def test_a_wrong_fold_is_noticed_and_put_back(caplog):
    torch.manual_seed(0)
    model = trained(Reused()).double()
    bn = model.bn
    with caplog.at_level(logging.WARNING, logger="std_fast"):
        folded, wrong = difference(model, 8)
    assert (folded, wrong) == (0, 0.0)
    assert model.bn is bn
    assert "batch norms stay as they are" in caplog.text


def test_linear_layers_and_training_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3, bias=False))
    model = trained(model).double().train()
    assert fold_batch_norms(model, 4) == 1
    assert not model.training
    assert isinstance(model[2], nn.Identity)


@settings(max_examples=30, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 4]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    mode=st.sampled_from(["zeros", "reflect"]),
    bias=st.booleans(),
    affine=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_convolution(groups, kernel, stride, mode, bias, affine, seed):
    torch.manual_seed(seed)
    conv = nn.Conv2d(4, 8, kernel, stride, kernel // 2, groups=groups, bias=bias, padding_mode=mode)
    model = trained(Pooled(nn.Conv2d(3, 4, 1), conv, nn.BatchNorm2d(8, affine=affine), nn.GELU()), seed).double()
    folded, wrong = difference(model.to(memory_format=torch.channels_last), 8)
    assert folded == 1
    assert wrong < 1e-12
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
