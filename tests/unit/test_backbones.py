"""What every backbone promises, whatever its family: taps, stochastic depth, timm's habits, messages."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.errors import UserError
from std_fast.models import BACKBONES, Backbone, build_backbone, list_backbones
from std_fast.runtime.flops import count_macs

TINY = {
    "mixer": dict(patch_size=8, dim=12, depth=3),
    "mixer with token": dict(patch_size=8, dim=12, depth=3, distill_token=True),
    "resmlp": dict(patch_size=8, dim=12, depth=3, layer_scale=0.1),
    "resmlp with token": dict(patch_size=8, dim=12, depth=3, layer_scale=0.1, distill_token=True),
    "cyclemlp": dict(layers=(1, 3), embed_dims=(8, 12), mlp_ratios=(2, 2)),
}
every_family = pytest.mark.parametrize("family", TINY)


def build(family: str, **options: object) -> Backbone:
    torch.manual_seed(0)
    model = build_backbone(family.split()[0], 5, 32, **(TINY[family] | options))
    torch.nn.init.normal_(model.head.weight, std=0.3)  # a zero head would hide everything behind it
    return model


def images(batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@every_family
def test_one_pass_gives_features_logits_and_token(family: str) -> None:
    model = build(family).eval()
    x = images()
    features, logits, token = model.forward_taps(x, (3, 1, 2))
    assert [z.shape for z in features] == [(4, model.patches, model.dim)] * 3
    assert (token is not None) == ("token" in family)
    last, first, _ = features
    again = model.forward_taps(x, (1,))
    torch.testing.assert_close(again.features[0], first)
    assert not torch.equal(first, last)
    tokens = model.forward_features(x)
    torch.testing.assert_close(tokens[:, : model.patches], model.norm(last))
    torch.testing.assert_close(model.forward_head(tokens), logits)
    torch.testing.assert_close(model(x), logits)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, : model.patches].mean(1))
    if token is not None:
        torch.testing.assert_close(tokens[:, -1], token)


@every_family
def test_every_parameter_gets_a_finite_gradient(family: str) -> None:
    model = build(family, drop_path=0.2).train()
    torch.manual_seed(3)
    features, logits, token = model.forward_taps(images(16), model.default_taps())
    loss = logits.square().sum() + sum(z.square().mean() for z in features)
    (loss if token is None else loss + token.square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


@every_family
def test_the_token_leaves_the_class_pooling_alone(family: str) -> None:
    model = build(family).eval()
    assert model.num_extra_tokens == ("token" in family)
    assert model.patches == 16 if family != "cyclemlp" else 49
    if "token" in family:
        taps = model.forward_taps(images(), (1,))
        assert taps.features[0].shape[1] == model.patches  # STD modules see patches only
        with torch.no_grad():
            model.distill_token.mul_(100)
        assert not torch.allclose(model(images()), taps.logits)  # yet every block mixes the token with the patches


@every_family
def test_keep_masks(family: str) -> None:
    model = build(family, drop_path=0.5)
    branches, x = len(model.drop_rates), images()
    plain = model.eval()(x)
    model.train()  # a given mask rules in training as in evaluation; ones keep everything
    torch.testing.assert_close(model.forward_taps(x, (), torch.ones(branches, 4)).logits, plain)
    for branch in range(branches):  # every branch listens to its row, and each image to its column
        keep = torch.ones(branches, 4)
        keep[branch, 2] = 0
        logits = model.forward_taps(x, (), keep).logits
        torch.testing.assert_close(logits[[0, 1, 3]], plain[[0, 1, 3]])
        assert not torch.allclose(logits[2], plain[2], rtol=1e-4, atol=1e-6), branch
    if family != "cyclemlp":  # nothing but the stem is left when every branch is dropped
        first, last = model.forward_taps(x, (1, model.depth), torch.zeros(branches, 4)).features
        torch.testing.assert_close(first, last)
        torch.testing.assert_close(first, model.stem(x))
    with pytest.raises(ValueError, match="keep is"):
        model.forward_taps(x, (), torch.ones(branches, 3))


@every_family
def test_own_stochastic_depth_draws_at_the_stated_rates(family: str) -> None:
    model = build(family, drop_path=0.4).train()
    torch.manual_seed(0)
    keep = model._keep(None, 4000)
    rates = torch.tensor(model.drop_rates)
    torch.testing.assert_close((keep == 0).float().mean(1), rates, rtol=0, atol=0.04)
    torch.testing.assert_close(keep.amax(1), 1 / (1 - rates))
    assert not torch.equal(model(images()), model(images()))
    model.eval()
    torch.testing.assert_close(model(images()), model(images()), rtol=0, atol=0)


@every_family
def test_autocast_keeps_the_residual_stream_narrow(family: str) -> None:
    model = build(family).eval()
    exact = model(images())
    keep = torch.ones(len(model.drop_rates), 4)
    with torch.autocast("cpu", torch.bfloat16):
        taps = model.forward_taps(images(), (1, 3), keep)
    assert {z.dtype for z in taps.features} == {torch.bfloat16}
    torch.testing.assert_close(taps.logits.float(), exact, rtol=0, atol=0.03 * exact.abs().max().item())


@pytest.mark.parametrize("family", ["mixer", "resmlp"])
def test_autocast_copies_no_weight_per_image(family: str) -> None:
    """Token mixing broadcasts its weight; cast after the broadcast it would be written out once per image."""

    class Widths(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten._to_copy.default and args[0].dim() == 3 and 0 in args[0].stride():
                copied.append(tuple(args[0].shape))
            return result

    copied: list[tuple[int, ...]] = []
    model = build(family).eval()
    with torch.autocast("cpu", torch.bfloat16), Widths():
        model(images())
    assert copied == []


@every_family
def test_memory_format_does_not_matter(family: str) -> None:
    model = build(family).eval()
    torch.testing.assert_close(model(images().contiguous(memory_format=torch.channels_last)), model(images()))


@every_family
def test_the_graph_has_no_breaks(family: str) -> None:
    model = build(family, drop_path=0.2).train()
    keep = torch.ones(len(model.drop_rates), 4)
    compiled = torch.compile(lambda x, k: model.forward_taps(x, (1, 3), k), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images(), keep), model.forward_taps(images(), (1, 3), keep))
    torch._dynamo.reset()


@every_family
def test_compiled_gradients_are_those_of_uncompiled_code(family: str) -> None:
    """And no sum takes the batch together with the rows of the activations between the layers of an MLP: it would be a
    kernel of its own (`spread`). Biases of last layers are left, whose sums read [B, S, C] alone."""
    graphs: list[torch.fx.GraphModule] = []

    def keep_graph(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def logits(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return model.forward_taps(x, (), keep).logits

    def gradients(call: Callable[..., torch.Tensor]) -> list[torch.Tensor | None]:
        model.zero_grad()
        call(images(), keep).square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    model = build(family, drop_path=0.2).train()
    keep = torch.rand(len(model.drop_rates), 4)
    expected = gradients(logits)
    torch._dynamo.reset()
    found = gradients(torch.compile(logits, fullgraph=True, backend=aot_autograd(fw_compiler=keep_graph)))
    torch._dynamo.reset()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    sums = [node for node in graphs[-1].graph.nodes if node.target is torch.ops.aten.sum.dim_IntList]
    widths = {linear.out_features for name, linear in model.named_modules() if name.endswith("mlp_channels.fc1")}
    summed = [tuple(node.args[0].meta["val"].shape) for node in sums]
    assert widths or family == "cyclemlp"
    assert not [shape for shape in summed if len(shape) == 2 and shape[0] >= 4 * 16 and shape[1] in widths]


@every_family
def test_classifier_reset(family: str) -> None:
    model = build(family).double().eval()
    features = model.forward_features(images().double())
    model.reset_classifier(9)
    assert model.get_classifier() is model.head and model.num_classes == 9
    assert model(images().double()).shape == (4, 9)
    model.reset_classifier(0)
    torch.testing.assert_close(model(images().double()), model.forward_head(features, pre_logits=True))


@every_family
def test_intermediate_features(family: str) -> None:
    model = build(family).eval()
    levels = len(model.feature_info)
    final, maps = model.forward_intermediates(images())
    torch.testing.assert_close(final, model.forward_features(images()))
    for level, feature in zip(model.feature_info, maps, strict=True):
        assert feature.shape[1] == level["num_chs"] and feature.shape[2] == feature.shape[3]
    assert model.patches == maps[-1].shape[2] ** 2
    flat = model.forward_intermediates(images(), indices=[-1], output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(flat[0], model.forward_taps(images(), (model.depth,)).features[0])
    torch.testing.assert_close(flat[0].mT.unflatten(2, maps[-1].shape[2:]), maps[-1])
    normed = model.forward_intermediates(images(), indices=1, norm=True, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(normed[0], model.norm(flat[0]))
    with pytest.raises(UserError, match=f"no feature map {levels}"):
        model.forward_intermediates(images(), indices=[levels])
    with pytest.raises(UserError, match="output_fmt"):
        model.forward_intermediates(images(), output_fmt="NHWC")
    if family == "cyclemlp":
        with pytest.raises(UserError, match="only the last stage"):
            model.forward_intermediates(images(), norm=True)


def test_default_taps_are_two_thirds_and_the_last() -> None:
    with torch.device("meta"):
        taps = {name: build_backbone(name, 10, 224).default_taps() for name in BACKBONES}
    assert {name: taps[name] for name in ("mixer_s16", "mixer_b16", "resmlp_s24", "resmlp_b24")} == {
        "mixer_s16": (5, 8), "mixer_b16": (8, 12), "resmlp_s24": (16, 24), "resmlp_b24": (16, 24),
    }  # fmt: skip
    assert (taps["cyclemlp_b1"], taps["cyclemlp_b2"]) == ((1, 2), (2, 3))
    assert list_backbones() == sorted(taps)


@pytest.mark.parametrize("name, gmacs", [("mixer_s16", 3.777), ("resmlp_s24", 5.961), ("cyclemlp_b1", 2.122)])
def test_macs_are_counted_without_running(name: str, gmacs: float) -> None:
    with torch.device("meta"):  # no weights, so nothing can be computed
        model = build_backbone(name, 1000, 224).train()
    assert count_macs(model, 224) / 1e9 == pytest.approx(gmacs, abs=1e-3)
    assert model.training


def test_macs_by_hand() -> None:
    model = build_backbone("mixer", 5, 32, **TINY["mixer"])
    tokens, channels = 2 * 16 * 6 * 12, 2 * 16 * 12 * 48  # P 16, C 12, hidden 6 and 48
    assert count_macs(model, 32) == 16 * 192 * 12 + 3 * (tokens + channels) + 12 * 5


@pytest.mark.parametrize("name, size, options, message", [
    ("mixr_s16", 224, {}, r"unknown backbone 'mixr_s16'; did you mean 'mixer_s16'\? \(known: "),
    ("mixer", 32, dict(patchsize=4), r"no option 'patchsize'; did you mean 'patch_size'\? \(it has: "),
    ("cyclemlp", 32, dict(distill_token=True), "cyclemlp has no option 'distill_token'"),
    ("mixer_s16", 225, {}, "image_size 225 is not a multiple of patch_size 16: use e.g. 224"),
    ("mixer_s16", 8, {}, "image_size 8 is not a multiple of patch_size 16: use e.g. 16"),
    ("mixer", 32, dict(depth=0), "mixer: option depth: 0 must be an integer above 0"),
    ("mixer", 32, dict(dim=-4), "option dim: -4 must be an integer above 0"),
    ("mixer_s16", 32, dict(dim=16.5), "option dim: 16.5 must be an integer above 0"),
    ("mixer", 32, dict(dim=True), "option dim: True must be"),
    ("mixer", 32, dict(token_dim="x"), "option token_dim: 'x' must be an integer, or 0 for the default"),
    ("mixer", 32, dict(distill_token=1), "option distill_token: 1 must be true or false"),
    ("mixer", 32, dict(patch_size=0), "option patch_size: 0 must be"),
    ("resmlp", 32, dict(layer_scale="small"), "option layer_scale: 'small' must be a number, 0 or more"),
    ("cyclemlp", 32, dict(embed_dims=64), "option embed_dims: 64 must be a list of integers above 0"),
    ("cyclemlp", 32, dict(mlp_ratios=(4, "x", 4, 4)), "must be a list of numbers above 0"),
    ("resmlp", 32, dict(drop_path=1.0), "drop_path is 1.0"),
    ("cyclemlp", 32, dict(drop_path=-0.1), "drop_path is -0.1"),
    ("cyclemlp", 2, {}, "image_size 2 leaves nothing after the stem"),
    ("cyclemlp", 32, dict(stem_stride=3), "stem_stride is 3"),
    ("cyclemlp", 32, dict(layers=(1, 2)), "one value of each per stage"),
])  # fmt: skip
def test_mistakes_are_named(name: str, size: int, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_backbone(name, 10, size, **options)


@every_family
def test_mistakes_in_a_call_are_named(family: str) -> None:
    model = build(family)
    with pytest.raises(UserError, match="there is no block 4; choose from 1 to 3"):
        model.forward_taps(images(), (1, 4))
    with pytest.raises(UserError, match="num_classes is -1"):
        model.reset_classifier(-1)
    with pytest.raises(UserError, match="global_pool 'max'"):
        model.reset_classifier(3, "max")
    if family != "cyclemlp":
        with pytest.raises(UserError, match="built for 32 px"):
            model(torch.randn(1, 3, 64, 64))
