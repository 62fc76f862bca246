"""ResMLP, whose affine norms and layer scales are folded into the products, against timm's plain form."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock

from std_fast.models import build_backbone
from std_fast.runtime.flops import count_macs


def test_weights_travel_to_timm_and_back() -> None:
    torch.manual_seed(0)
    with torch.device("meta"):  # shells without weights: those of the first go to timm's, and on to a second of ours
        ours, back = (build_backbone("resmlp_s24", 1000, 224).eval() for _ in range(2))
        theirs = timm.create_model("resmlp_24_224").eval()
    assert sum(p.numel() for p in ours.parameters()) / 1e6 == pytest.approx(30.021, abs=5e-4)
    ours.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in ours.named_parameters():  # large layer scales: from 1e-5 the branches would not be seen
            parameter.uniform_(-0.06, 0.06)
            parameter.add_({"alpha": 1.0, "ls1": 0.1, "ls2": 0.1}.get(name.rsplit(".", 1)[-1], 0.0))
    theirs.load_state_dict(ours.state_dict(), assign=True)
    back.load_state_dict(theirs.state_dict(), assign=True)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        logits = theirs(image)
        assert 0.1 < logits.std() < 10
        torch.testing.assert_close(ours(image), logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(back(image), logits, rtol=1e-5, atol=1e-5)


def test_b24_is_the_patch_16_one() -> None:
    with torch.device("meta"):
        model = build_backbone("resmlp_b24", 1000, 224)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(115.737, abs=5e-4)
    assert model.patches == 196
    assert count_macs(model, 224) / 1e9 == pytest.approx(23.02, abs=0.01)


def timm_resmlp(image_size: int, patch: int, dim: int, depth: int, layer_scale: float = 1e-4) -> MlpMixer:
    return MlpMixer(
        3, image_size, patch_size=patch, embed_dim=dim, num_blocks=depth, mlp_ratio=4, norm_layer=Affine,
        block_layer=partial(ResBlock, init_values=layer_scale),
    )  # fmt: skip


@settings(max_examples=10, deadline=None)
@given(
    patch=st.integers(1, 5), grid=st.integers(1, 4), dim=st.integers(1, 9), depth=st.integers(1, 3),
    batch=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_values_and_gradients_are_timms(patch: int, grid: int, dim: int, depth: int, batch: int, seed: int) -> None:
    torch.manual_seed(seed)
    ours = build_backbone("resmlp", 3, patch * grid, patch_size=patch, dim=dim, depth=depth).double().eval()
    theirs = timm_resmlp(patch * grid, patch, dim, depth).double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(batch, 3, patch * grid, patch * grid, dtype=torch.float64)
    for model in (ours, theirs):
        (model(images) * torch.arange(3.0)).sum().backward()
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-10, atol=1e-10)
    for name, parameter in ours.named_parameters():
        grad = theirs.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_start_values_are_timms() -> None:
    torch.manual_seed(0)
    ours = build_backbone("resmlp", 3, 32, patch_size=4, dim=96, depth=2, layer_scale=0.01).state_dict()
    for name, start in timm_resmlp(32, 4, 96, 2, 0.01).state_dict().items():
        assert ours[name].mean().item() == pytest.approx(start.mean().item(), rel=0.1, abs=5e-3), name
        assert ours[name].std().item() == pytest.approx(start.std().item(), rel=0.2, abs=1e-9), name


def test_affine_scales_never_decay() -> None:
    model = build_backbone("resmlp", 3, 8, patch_size=4, dim=6, depth=1, distill_token=True)
    assert model.no_weight_decay() == {
        "distill_token", "norm.alpha", "norm.beta",
        *(f"blocks.0.norm{n}.{part}" for n in (1, 2) for part in ("alpha", "beta")),
    }  # fmt: skip
    decayed = {n for n, p in model.named_parameters() if p.dim() > 1} - model.no_weight_decay()
    assert all(name.endswith(".weight") for name in decayed)
