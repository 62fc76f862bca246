"""Mixer and ResMLP against timm's `MlpMixer`: same weights both ways, same values, same gradients.

ResMLP folds its affine norms and layer scales into the products; timm's is the plain form.
"""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock

from std_fast.models import build_backbone
from std_fast.runtime.flops import count_macs


def timms(family: str, side: int, patch: int, dim: int, depth: int, layer_scale: float = 1e-4) -> MlpMixer:
    """Of 3 classes."""
    own = {}
    if family == "resmlp":
        own = {"mlp_ratio": 4, "norm_layer": Affine, "block_layer": partial(ResBlock, init_values=layer_scale)}
    return MlpMixer(3, side, patch_size=patch, embed_dim=dim, num_blocks=depth, **own)


@pytest.mark.parametrize("name, twin", [("mixer_s16", "mixer_s16_224"), ("resmlp_s24", "resmlp_24_224")])
def test_weights_travel_to_timm_and_back(name: str, twin: str) -> None:
    torch.manual_seed(0)
    with torch.device("meta"):  # shells without weights: those of the first go to timm's, and on to a second of ours
        ours, back = (build_backbone(name, 1000, 224).eval() for _ in range(2))
        theirs = timm.create_model(twin).eval()
    ours.to_empty(device="cpu")
    with torch.no_grad():
        for key, parameter in ours.named_parameters():  # biases, norms, layer scales and the head too must matter
            parameter.uniform_(-0.06, 0.06)
            norm = key.endswith("alpha") or ("norm" in key and key.endswith("weight"))
            parameter.add_(1.0 if norm else 0.1 if key.endswith(("ls1", "ls2")) else 0.0)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    back.load_state_dict(theirs.state_dict(), assign=True)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        logits = theirs(image)
        assert 0.1 < logits.std() < 10
        torch.testing.assert_close(ours(image), logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(back(image), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name, millions", [("mixer_s16", 18.528), ("mixer_b16", 59.880), ("resmlp_s24", 30.021), ("resmlp_b24", 115.737)]
)
def test_published_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = build_backbone(name, 1000, 224)
        if name == "mixer_b16":
            timm.create_model("mixer_b16_224").load_state_dict(model.state_dict(), assign=True)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=5e-4)
    assert model.patches == 196  # resmlp_b24 too: timm's `resmlp_big_24_224` has patches of 8
    if name == "resmlp_b24":
        assert count_macs(model, 224) / 1e9 == pytest.approx(23.02, abs=0.01)


@pytest.mark.parametrize("family, options", [("mixer", {"token_dim": 48}), ("resmlp", {"layer_scale": 0.01})])
def test_start_values_are_timms(family: str, options: dict[str, float]) -> None:
    torch.manual_seed(0)
    ours = build_backbone(family, 3, 32, patch_size=4, dim=96, depth=2, **options).state_dict()
    for name, start in timms(family, 32, 4, 96, 2, 0.01).state_dict().items():
        assert ours[name].mean().item() == pytest.approx(
            start.mean().item(), rel=0.1, abs=max(5e-3, start.std().item() / 4)
        ), name
        assert ours[name].std().item() == pytest.approx(start.std().item(), rel=0.4, abs=1e-9), name
        assert ours[name].abs().max().item() == pytest.approx(start.abs().max().item(), rel=0.7, abs=1e-9), name


def test_affine_scales_never_decay() -> None:
    model = build_backbone("resmlp", 3, 8, patch_size=4, dim=6, depth=1, distill_token=True)
    assert model.no_weight_decay() == {
        "distill_token", "norm.alpha", "norm.beta",
        *(f"blocks.0.norm{n}.{part}" for n in (1, 2) for part in ("alpha", "beta")),
    }  # fmt: skip
    decayed = {n for n, p in model.named_parameters() if p.dim() > 1} - model.no_weight_decay()
    assert all(name.endswith(".weight") for name in decayed)


def test_widths_are_free() -> None:
    model = build_backbone("mixer", 4, 12, patch_size=4, dim=6, depth=1, token_dim=5, channel_dim=7)
    assert model.blocks[0].mlp_tokens.fc1.weight.shape == (5, 9)
    assert model.blocks[0].mlp_channels.fc1.weight.shape == (7, 6)
