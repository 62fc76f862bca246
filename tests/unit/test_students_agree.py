"""Every student, with all its parts (backbone, STD modules, MINE), against its plain form: values and all gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from std_fast.library import create_student
from tests.plain_students import plain_student

FAMILIES = ("mixer", "resmlp", "cyclemlp")
family = pytest.mark.parametrize("kind", FAMILIES)


def options_of(kind, grid, dim, depth, hidden):
    """A tiny student and the side of its images."""
    if kind == "cyclemlp":
        return {"layers": (1, depth), "embed_dims": (hidden, dim), "mlp_ratios": (2, 1), "stem_stride": 2}, 4 * grid
    own = {"token_dim": hidden} if kind == "mixer" else {}
    return {"patch_size": 3, "dim": dim, "depth": depth, "channel_dim": 2 * dim, **own}, 3 * grid


def build(kind, options, side, teachers, dtype, std=0.3):
    """With all weights away from the special values of the initialisation; no stochastic depth."""
    torch.manual_seed(7)
    options = {name: list(v) if isinstance(v, tuple) else v for name, v in options.items()}
    student = create_student(kind, 5, side, teachers, mine_weight=0.3, mine_width=8, **options).to(dtype).train()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.normal_(std=std)
            if "norm" in name and name.endswith(("weight", "alpha")):
                parameter.add_(1.0)
    return student


def both(student, ours, plain, seed=0):
    """Outputs of two forms, and their gradients for the same random weights of the targets."""
    flat = [[out.class_logits, out.dist_logits, *out.information] for out in (ours, plain)]
    torch.manual_seed(seed)
    seeds = [torch.randn_like(x, dtype=student.backbone.head.weight.dtype) for x in flat[1]]
    parameters = list(student.parameters())
    grads = []
    for targets in flat:
        total = sum((x * s).sum() for x, s in zip(targets, seeds, strict=True))
        grads.append(torch.autograd.grad(total, parameters, retain_graph=True))
    return flat, grads


@settings(max_examples=8, deadline=None)
@given(
    kind=st.sampled_from(FAMILIES), grid=st.integers(2, 4), dim=st.integers(4, 9), depth=st.integers(1, 3),
    hidden=st.integers(4, 8), batch=st.sampled_from([2, 4, 5, 8]), teachers=st.integers(1, 2), traced=st.booleans(),
)  # fmt: skip
def test_values_and_gradients_to_1e_10(kind, grid, dim, depth, hidden, batch, teachers, traced):
    """Also in the form that torch.compile sees."""
    options, side = options_of(kind, grid, dim, depth, hidden)
    if teachers == 2 and depth == 1:
        depth, teachers = 1, 1  # two modules want two blocks
    student = build(kind, options, side, teachers, torch.float64)
    images = torch.randn(batch, 3, side, side, dtype=torch.float64)
    forward = student
    if traced:
        torch._dynamo.reset()
        forward = torch.compile(student, backend="eager", fullgraph=True, dynamic=False)
    flat, grads = both(student, forward(images), plain_student(student, images, kind, options))
    names = [f"answer {i}" for i in range(len(flat[0]))] + [name for name, _ in student.named_parameters()]
    for name, a, b in zip(names, (*flat[0], *grads[0]), (*flat[1], *grads[1]), strict=True):
        limit = 1e-10 * max(1.0, b.abs().max().item())
        torch.testing.assert_close(a, b, rtol=1e-10, atol=limit, msg=lambda m, name=name: f"{name}: {m}")


def off(found, exact):
    """Norm of the difference of many tensors together, by the norm of the exact ones."""
    found, exact = (torch.cat([x.float().flatten() for x in tensors]) for tensors in (found, exact))
    return ((found - exact).norm() / exact.norm()).item()


@family
@pytest.mark.parametrize("traced", [False, True])
def test_in_bfloat16_within_its_rounding(kind, traced):
    """bfloat16 keeps 8 bits (0.4 %). Tolerance under autocast against float32: 2 % of the targets' norm and 2 % of the
    gradients', and neither more than 1.5 times what the plain form loses. (CycleMLP's has a deformable convolution,
    which knows no bfloat16.)"""
    options, side = options_of(kind, 4, 32, 3, 16)
    student = build(kind, options, side, 2, torch.float32, std=0.1)
    images = torch.randn(8, 3, side, side)
    exact = plain_student(student, images, kind, options)
    torch._dynamo.reset()
    forward = torch.compile(student, backend="eager", fullgraph=True, dynamic=False) if traced else student
    with torch.autocast("cpu", torch.bfloat16):
        low = {"ours": forward(images)}
        if kind != "cyclemlp":
            low["plain"] = plain_student(student, images, kind, options)
    lost = {}
    for name, out in low.items():
        flat, grads = both(student, out, exact)
        lost[name] = tuple(off(*pair) for pair in (flat, grads))
    assert max(lost["ours"]) < 0.02, lost
    assert all(a < 1.5 * b for a, b in zip(lost["ours"], lost.get("plain", (1, 1)), strict=True)), lost
