"""CycleMLP against the plain form of its release (tests/plain_students.py), and what it promises beside."""

from __future__ import annotations

import pytest
import torch

from std_fast.models import build_backbone
from std_fast.models.cyclemlp import CycleFC, CycleMlp
from tests.plain_students import released_cycle_fc, released_forward, released_offset


def tiny(**options: object) -> CycleMlp:
    options = dict(layers=(1, 2), embed_dims=(7, 10), mlp_ratios=(2, 3)) | options
    return build_backbone("cyclemlp", 5, 32, **options)


@pytest.mark.parametrize("kernel", [(1, 3), (3, 1)])
@pytest.mark.parametrize("height, width, channels", [(5, 7, 8), (6, 4, 9), (1, 2, 4), (3, 1, 2), (1, 1, 5)])
def test_cycle_fc_is_the_deformable_convolution(kernel: tuple, height: int, width: int, channels: int) -> None:
    torch.manual_seed(0)
    layer = CycleFC(channels, kernel).double()
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, height, width, channels, dtype=torch.float64, requires_grad=True)
    expected = released_cycle_fc(x.permute(0, 3, 1, 2), layer.weight, layer.bias, kernel).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    seed = torch.randn_like(expected)
    inputs = (x, layer.weight, layer.bias)
    grads = torch.autograd.grad(layer(x), inputs, seed)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, inputs, seed), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride, side", [(4, 32), (4, 27), (2, 21), (1, 9)])
def test_values_and_gradients_are_the_releases(stride: int, side: int) -> None:
    torch.manual_seed(0)
    model = tiny(stem_stride=stride).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    images = torch.randn(2, 3, side, side, dtype=torch.float64)
    expected, _ = released_forward(dict(model.named_parameters()), images, (1, 2), stride)
    torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)
    parameters, seed = tuple(model.parameters()), torch.randn_like(expected)
    grads = torch.autograd.grad(model(images), parameters, seed)
    released = torch.autograd.grad(expected, parameters, seed)
    for (name, _), ours, theirs in zip(model.named_parameters(), grads, released, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


# parameters: METHOD.md section 1 for B1 and B2, counted in the release's own modules for the rest
@pytest.mark.parametrize("name, millions, layers, dims, ratios", [
    ("cyclemlp_b1", 15.155, (2, 2, 4, 2), (64, 128, 320, 512), (4, 4, 4, 4)),
    ("cyclemlp_b2", 26.803, (2, 3, 10, 3), (64, 128, 320, 512), (4, 4, 4, 4)),
    ("cyclemlp_b3", 38.386, (3, 4, 18, 3), (64, 128, 320, 512), (8, 8, 4, 4)),
    ("cyclemlp_b4", 51.797, (3, 8, 27, 3), (64, 128, 320, 512), (8, 8, 4, 4)),
    ("cyclemlp_b5", 75.747, (3, 4, 24, 3), (96, 192, 384, 768), (4, 4, 4, 4)),
])  # fmt: skip
def test_a_released_state_dict_loads(name: str, millions: float, layers: tuple, dims: tuple, ratios: tuple) -> None:
    shapes = {"patch_embed.proj.weight": (dims[0], 3, 7, 7), "patch_embed.proj.bias": (dims[0],)}
    for stage, (count, c, ratio) in enumerate(zip(layers, dims, ratios, strict=True)):
        if stage:
            shapes[f"network.{2 * stage - 1}.proj.weight"] = (c, dims[stage - 1], 3, 3)
            shapes[f"network.{2 * stage - 1}.proj.bias"] = (c,)
        for j in range(count):
            layer_shapes = {"attn.mlp_c": (c, c), "attn.sfc_h": (c, c, 1, 1), "attn.sfc_w": (c, c, 1, 1)}
            layer_shapes |= {"attn.reweight.fc1": (c // 4, c), "attn.reweight.fc2": (3 * c, c // 4)}
            layer_shapes |= {"attn.proj": (c, c), "mlp.fc1": (ratio * c, c), "mlp.fc2": (c, ratio * c)}
            layer_shapes |= {"norm1": (c,), "norm2": (c,)}
            for layer, shape in layer_shapes.items():
                shapes[f"network.{2 * stage}.{j}.{layer}.weight"] = shape
                if layer != "attn.mlp_c":
                    shapes[f"network.{2 * stage}.{j}.{layer}.bias"] = shape[:1]
    shapes |= {"norm.weight": dims[-1:], "norm.bias": dims[-1:], "head.weight": (1000, dims[-1]), "head.bias": (1000,)}
    with torch.device("meta"):
        model = build_backbone(name, 1000, 224)
        state = {key: torch.empty(shape) for key, shape in shapes.items()}
    for key, shape in shapes.items():
        for part, kernel in (("sfc_h", (1, 3)), ("sfc_w", (3, 1))):
            if key.endswith(f"{part}.weight"):
                state[key.replace("weight", "offset")] = released_offset(shape[1], kernel)
    model.load_state_dict(state, assign=True)  # strict: no name missing, none left over
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=5e-4)
    assert not any(key.endswith("offset") for key in model.state_dict())


def test_other_offsets_are_refused() -> None:
    model = tiny()
    state = model.state_dict() | {"network.0.0.attn.sfc_h.offset": released_offset(7, (3, 1))}
    with pytest.raises(RuntimeError, match="network.0.0.attn.sfc_h.offset differs"):
        model.load_state_dict(state)


def test_taps_are_in_the_last_stage_and_rates_rise() -> None:
    model = tiny(layers=(1, 3), drop_path=0.3).eval()
    assert (model.depth, model.default_taps()) == (3, (2, 3))
    torch.testing.assert_close(model.drop_rates, (0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3))
    taps = model.forward_taps(torch.randn(2, 3, 32, 32), (2, 3))
    assert [z.shape for z in taps.features] == [(2, model.patches, model.dim)] * 2
    assert taps.token is None
    torch.testing.assert_close(model.forward_head(model.norm(taps.features[1])), taps.logits)


@pytest.mark.parametrize(
    "stride, side, patches", [(4, 224, 49), (1, 32, 16), (2, 32, 4), (4, 16, 1), (4, 225, 49), (4, 250, 64)]
)
def test_the_patch_count_is_what_comes_out(stride: int, side: int, patches: int) -> None:
    options = dict(layers=(1,) * 4, embed_dims=(4,) * 4, mlp_ratios=(1,) * 4, stem_stride=stride)
    model = build_backbone("cyclemlp", 2, side, **options)
    assert model.patches == patches
    assert model.forward_taps(torch.randn(1, 3, side, side), (1,)).features[0].shape == (1, patches, 4)
