"""The STD module against the paper's concatenations (METHOD.md section 2, written out in benchmarks/naive.py)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.naive import std_by_concatenation
from std_fast.method import channel_mlp
from std_fast.method.tokens import STDModule


def some(B, P, C, K, m, std=0.5, tokens="both", dtype=torch.float64):
    """A module away from the special values of its initialisation, and features."""
    torch.manual_seed(B + 7 * P + 31 * C)
    module = STDModule(C, P, K, teachers=m, tokens=tokens).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return module, (3 * torch.randn(B, P, C, dtype=dtype) + 1).requires_grad_()


def compare(module, z, found, expected, tolerance):
    """Values and all gradients of two forms' targets."""
    seeds = [torch.randn_like(a) for a in expected]
    grads = [torch.autograd.grad(targets, [z, *module.parameters()], seeds) for targets in (found, expected)]
    for a, b in zip((*found, *grads[0]), (*expected, *grads[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@settings(max_examples=12, deadline=None)
@given(B=st.integers(1, 3), P=st.integers(1, 9), C=st.integers(2, 12), K=st.integers(1, 5), m=st.integers(1, 3))
def test_eager_form_is_the_papers_function(B, P, C, K, m):
    module, z = some(B, P, C, K, m)
    compare(module, z, module(z), std_by_concatenation(module, z), 1e-10)


@pytest.mark.parametrize("rows", [1, 12, 35, 1000])
def test_size_of_the_pieces_changes_nothing_but_rounding(monkeypatch, rows):
    """One image each, two, seven, and the full batch of eleven at once."""
    module, z = some(11, 5, 6, 3, 2)
    monkeypatch.setattr(channel_mlp, "ROWS", rows)
    compare(module, z, module(z), std_by_concatenation(module, z), 1e-10)
    with torch.no_grad():
        torch.testing.assert_close(module(z).channel, std_by_concatenation(module, z).channel, rtol=1e-10, atol=1e-10)


class LargeArrays(TorchDispatchMode):
    """Counts the arrays of at least `size` bytes that are made under it."""

    def __init__(self, size):
        super().__init__()
        self.size, self.made = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                if x.untyped_storage().nbytes() >= self.size:
                    self.made.append(x)  # kept alive, so that no place is used twice
        return out


def test_eager_channel_mlp_makes_one_array_of_the_hidden_size():
    """Run operator by operator it makes four or more, whose traffic takes more time than the products."""
    B, P, C, H = 64, 64, 8, 32
    module, z = some(B, P, C, 5, 1, dtype=torch.float32)

    def made(form):
        with LargeArrays(4 * B * P * H) as arrays:
            form().sum().backward()
        return len(arrays.made)

    assert made(lambda: module.channel_token(z)) == 1
    assert made(lambda: std_by_concatenation(module, z).channel) >= 4
    with torch.no_grad(), LargeArrays(4 * B * P * H) as arrays:
        module(z)
    assert not arrays.made


def traced(module, z):
    """The form that torch.compile sees, run by torch's own kernels."""
    torch._dynamo.reset()
    return torch.compile(module, backend="eager", fullgraph=True, dynamic=False)(z)


@settings(max_examples=8, deadline=None)
@given(B=st.integers(1, 3), P=st.integers(1, 9), C=st.integers(2, 12), K=st.integers(1, 5), m=st.integers(1, 3))
def test_compiled_form_is_the_papers_function(B, P, C, K, m):
    """It is written in other words: one channel token less in the product, and second layers that are sums."""
    module, z = some(B, P, C, K, m)
    compare(module, z, traced(module, z), std_by_concatenation(module, z), 1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_both_norms_are_computed_again_where_training_is_compiled(training):
    """torch.compile finds them marked for it; an export, which is of a model that evaluates, does not."""
    module, z = some(4, 5, 6, 3, 1)
    graphs = []
    torch._dynamo.reset()
    torch.compile(module.train(training), backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)(z)
    marked = [node for node in graphs[0].graph.nodes if str(node.target) == "tag_activation_checkpoint"]
    assert len(marked) == (2 if training else 0)


def test_a_jit_trace_holds_for_other_batch_sizes():
    module, z = some(4, 5, 6, 3, 2)
    module.requires_grad_(False)  # or a trace cannot hold the weights
    with torch.no_grad():
        trace = torch.jit.trace(lambda z: module(z).logits, z[:2], check_trace=False)
        torch.testing.assert_close(trace(z), module(z).logits, rtol=1e-10, atol=1e-10)


def test_fused_kernels_are_the_plain_function():
    """Inductor's, with two teachers, where P is no multiple of a vector: a sum over the batch in the other order made
    torch 2.11 write past its end there, and the process often abort."""
    module, z = some(8, 196, 8, 5, 2, tokens="channel", dtype=torch.float32)
    wanted = [p for name, p in module.named_parameters() if not name.startswith("heads")]
    torch._dynamo.reset()
    fused = torch.compile(module.channel_token, fullgraph=True, dynamic=False)
    for _ in range(10):
        found, expected = fused(z.detach()), module.channel_token(z.detach())
        grads = [torch.autograd.grad(token.sin().sum(), wanted) for token in (found, expected)]
        for a, b in zip((found, *grads[0]), (expected, *grads[1]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("tokens", "width"), [("both", 12 + 5), ("spatial", 12), ("channel", 5), ("none", 12)])
def test_kinds_of_tokens_and_their_heads(tokens, width):
    module = STDModule(12, 5, 3, teachers=2, tokens=tokens)
    out = module(torch.randn(4, 5, 12))
    assert out.logits.shape == (4, 2, 3)
    assert [head.in_features for head in module.heads] == [width, width]
    assert (out.spatial is not None) == (tokens in ("both", "spatial"))
    assert (out.channel is not None) == (tokens in ("both", "channel"))
    out.logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_parameters_follow_the_rule_of_method_2():
    C, P, K = 512, 196, 1000
    h_s, h_c = C // 2, 4 * C
    rule = (P + 1) * h_s + 2 * h_s + 1 + (C + 1) * h_c + 2 * h_c + 1 + (P + C + 1) * K + 2 * C + 2 * (C + 1) + C + P
    assert sum(p.numel() for p in STDModule(C, P, K).parameters()) == rule


def test_torch_func_gives_autograds_gradients_also_image_by_image():
    module, z_BPC = STDModule(16, 9, 5, 2).double(), torch.randn(4, 9, 16, dtype=torch.float64)
    parameters = dict(module.named_parameters())

    def loss(values, z):
        return torch.func.functional_call(module, values, (z,)).logits.square().mean()

    expected = dict(zip(parameters, torch.autograd.grad(loss(parameters, z_BPC), parameters.values()), strict=True))
    torch.testing.assert_close(torch.func.grad(loss)(parameters, z_BPC), expected)
    by_image = torch.func.vmap(torch.func.grad(lambda v, z: loss(v, z[None])), (None, 0))(parameters, z_BPC)
    torch.testing.assert_close({name: g.mean(0) for name, g in by_image.items()}, expected)


@pytest.mark.parametrize("shape", [(4, 8, 16), (4, 9, 15), (9, 16)])
def test_features_of_another_shape_are_named(shape):
    with pytest.raises(ValueError, match=r"features .* are not \[B, patches=9, dim=16\]"):
        STDModule(16, 9, 5)(torch.zeros(shape))


def test_refuses_impossible_sizes():
    with pytest.raises(ValueError, match="positive"):
        STDModule(0, 4, 10)
    with pytest.raises(ValueError, match="tokens must be"):
        STDModule(8, 4, 10, tokens="all")
