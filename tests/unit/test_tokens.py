"""The STD module against the paper's concatenations, written out from METHOD.md section 2."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from std_fast.tokens import STDModule


def reference(module: STDModule, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """T_S', T_C' and logits by concatenation: slow, and plainly METHOD.md section 2."""
    B = len(z)
    x = torch.cat([z, module.token_s.expand(B, -1, -1)], dim=1)  # [B, P+m, C]
    x = F.layer_norm(x, x.shape[-1:], module.norm_s.weight, module.norm_s.bias)
    ts = module.fc2_s(F.gelu(module.fc1_s(x.transpose(1, 2)))).transpose(1, 2) + module.token_s
    y = torch.cat([z, module.token_c.expand(B, -1, -1)], dim=2)  # [B, P, C+m]
    y = F.layer_norm(y, y.shape[-1:], module.norm_c.weight, module.norm_c.bias)
    tc = module.fc2_c(F.gelu(module.fc1_c(y))) + module.token_c
    read = torch.cat([ts, tc.transpose(1, 2)], dim=2)  # [B, m, C+P]
    return ts, tc.transpose(1, 2), torch.stack([head(read[:, i]) for i, head in enumerate(module.heads)], 1)


def module_answers(module, z):
    out = module(z)
    return out.spatial, out.channel, out.logits


@settings(max_examples=12, deadline=None)
@given(B=st.integers(1, 3), P=st.integers(1, 9), C=st.integers(2, 12), K=st.integers(1, 5), m=st.integers(1, 3))
def test_fused_form_is_the_papers_function(B, P, C, K, m):
    torch.manual_seed(B + 7 * P + 31 * C)
    module = STDModule(C, P, K, teachers=m).double()
    for parameter in module.parameters():  # away from the special values of the initialisation
        torch.nn.init.normal_(parameter, std=0.5)
    z = (3 * torch.randn(B, P, C, dtype=torch.float64) + 1).requires_grad_()
    weights = [torch.randn(n, dtype=torch.float64) for n in (m * C, m * P, m * K)]

    def run(answers):
        out = sum((a.flatten(1) * w).sum() for a, w in zip(answers, weights, strict=True))
        return answers, torch.autograd.grad(out, [z, *module.parameters()])

    fused, grads = run(module_answers(module, z))
    plain, expected = run(reference(module, z))
    for a, b in zip((*fused, *grads), (*plain, *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_compiled_form_is_the_same_function():
    torch.manual_seed(0)
    module = STDModule(6, 5, 3, teachers=2).double()
    z = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(module, backend="eager", fullgraph=True)(z)
    grads = [torch.autograd.grad(out.logits.sum(), z)[0] for out in (compiled, module(z))]
    torch.testing.assert_close(compiled.logits, module(z).logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


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


def test_refuses_impossible_sizes():
    with pytest.raises(ValueError, match="positive"):
        STDModule(0, 4, 10)
    with pytest.raises(ValueError, match="tokens must be"):
        STDModule(8, 4, 10, tokens="all")
