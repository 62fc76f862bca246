"""Mixer against timm's `MlpMixer`: same weights both ways, same values, same gradients."""

from __future__ import annotations

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.mlp_mixer import MlpMixer

from std_fast.models import build_backbone


@pytest.mark.parametrize("name, millions", [("mixer_s16", 18.528), ("mixer_b16", 59.880)])
def test_weights_travel_to_timm_and_back(name: str, millions: float) -> None:
    torch.manual_seed(0)
    with torch.device("meta"):  # shells without weights: those of the first go to timm's, and on to a second of ours
        ours, back = (build_backbone(name, 1000, 224).eval() for _ in range(2))
        theirs = timm.create_model(f"{name}_224").eval()
    assert sum(p.numel() for p in ours.parameters()) / 1e6 == pytest.approx(millions, abs=5e-4)
    ours.to_empty(device="cpu")
    with torch.no_grad():
        for key, parameter in ours.named_parameters():  # biases, norms and the head too must matter
            parameter.uniform_(-0.06, 0.06).add_(1.0 if "norm" in key and key.endswith("weight") else 0.0)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    back.load_state_dict(theirs.state_dict(), assign=True)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        logits = theirs(image)
        assert 0.1 < logits.std() < 10
        torch.testing.assert_close(ours(image), logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(back(image), logits, rtol=1e-5, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(
    patch=st.integers(1, 5), grid=st.integers(1, 4), dim=st.integers(2, 9), depth=st.integers(1, 3),
    batch=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_values_and_gradients_are_timms(patch: int, grid: int, dim: int, depth: int, batch: int, seed: int) -> None:
    torch.manual_seed(seed)
    ours = build_backbone("mixer", 3, patch * grid, patch_size=patch, dim=dim, depth=depth).double().eval()
    theirs = MlpMixer(3, patch * grid, patch_size=patch, embed_dim=dim, num_blocks=depth).double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(batch, 3, patch * grid, patch * grid, dtype=torch.float64)
    images = images.contiguous(memory_format=torch.channels_last if seed % 2 else torch.contiguous_format)
    for model in (ours, theirs):
        (model(images) * torch.arange(3.0)).sum().backward()
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-10, atol=1e-10)
    for name, parameter in ours.named_parameters():
        grad = theirs.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_start_values_are_timms() -> None:
    torch.manual_seed(0)
    ours = build_backbone("mixer", 5, 32, patch_size=4, dim=96, depth=2, token_dim=48).state_dict()
    theirs = MlpMixer(5, 32, patch_size=4, embed_dim=96, num_blocks=2).state_dict()
    for name, start in theirs.items():
        assert ours[name].std().item() == pytest.approx(start.std().item(), rel=0.4, abs=1e-9), name
        assert ours[name].abs().max().item() == pytest.approx(start.abs().max().item(), rel=0.5, abs=1e-9), name


def test_widths_are_free() -> None:
    model = build_backbone("mixer", 4, 12, patch_size=4, dim=6, depth=1, token_dim=5, channel_dim=7)
    assert model.blocks[0].mlp_tokens.fc1.weight.shape == (5, 9)
    assert model.blocks[0].mlp_channels.fc1.weight.shape == (7, 6)
