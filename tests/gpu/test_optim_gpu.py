"""Optimizers on a GPU: Muon against itself on a CPU, apex's against formula and torch's AdamW, bad steps of all."""

import importlib.util
import math

import pytest
import torch
from torch import nn

from std_fast.runtime import checkpoint
from std_fast.training.build import build_student
from std_fast.training.optim import build_optimizer, set_learning_rates
from std_fast.training.optimizers import build_apex

pytestmark = [pytest.mark.gpu, pytest.mark.not_rehearsed("compares what kernels computed", ways=("lazy", "compiled"))]

CUDA = torch.device("cuda", 0)
needs_apex = pytest.mark.skipif(importlib.util.find_spec("apex") is None, reason="apex is not installed")
NAMES_OF_ADAM = ("adamw", "apex_adam")
NAMES = ["adamw", "sgd", "muon", *(pytest.param(name, marks=needs_apex) for name in ("lamb", "apex_adam"))]


def with_gradients(module, seed):
    torch.manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape))  # in the parameter's layout


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_step_changes_nothing(at, name):
    student = build_student(at(), 3).to(CUDA)
    optimizer = build_optimizer(student, at(optim={"name": name}).optim, CUDA)
    set_learning_rates(optimizer, 0.01, 0.02)
    optimizer.found_inf = torch.zeros((), device=CUDA)
    for seed in range(2):
        with_gradients(student, seed)
        optimizer.step()
    before = {key: t.clone() for key, t in checkpoint.training_tensors(student, optimizer, {}).items()}
    optimizer.found_inf.fill_(1)
    for i, parameter in enumerate(student.parameters()):
        parameter.grad = torch.full_like(parameter, [math.nan, math.inf, 1.0][i % 3])
    optimizer.step()
    after = checkpoint.training_tensors(student, optimizer, {})
    assert all(torch.equal(after[key].nan_to_num(), before[key].nan_to_num()) for key in before)
    optimizer.found_inf.fill_(0)
    with_gradients(student, 2)
    optimizer.step()
    assert all(not torch.equal(p, before[f"model.{n}"]) for n, p in student.named_parameters())


@pytest.mark.parametrize("name", NAMES)
def test_state_survives_a_checkpoint(at, tmp_path, name):
    students = [build_student(at(), 3).to(CUDA) for _ in range(2)]
    optimizers = [build_optimizer(student, at(optim={"name": name}).optim, CUDA) for student in students]
    for optimizer in optimizers:
        set_learning_rates(optimizer, 0.01, 0.02)
        optimizer.found_inf = torch.zeros((), device=CUDA)
    for seed in range(3):
        with_gradients(students[0], seed)
        optimizers[0].step()
    meta = {"step": 3, "num_classes": 3, "recipe": ""}
    checkpoint.save(tmp_path / "c", checkpoint.training_tensors(students[0], optimizers[0], {}), meta)
    checkpoint.restore(checkpoint.load(tmp_path / "c")[0], students[1], optimizers[1])
    for student, optimizer in zip(students, optimizers, strict=True):
        with_gradients(student, 3)
        optimizer.step()
    for one, two in zip(students[0].parameters(), students[1].parameters(), strict=True):
        assert torch.equal(one, two)


def test_muon_is_the_cpus(at):
    """bfloat16 against float32 in the Newton-Schulz iteration."""
    recipe, students = at(optim={"name": "muon"}), [build_student(at(), 3) for _ in range(2)]
    start = {n: p.detach().clone() for n, p in students[0].named_parameters()}
    for student, device in zip(students, (torch.device("cpu"), CUDA), strict=True):
        student.to(device)
        optimizer = build_optimizer(student, recipe.optim, device)
        set_learning_rates(optimizer, 0.01, 0.01)
        for seed in range(3):
            with_gradients(student, seed)
            optimizer.step()
    for (name, one), two in zip(students[0].named_parameters(), students[1].parameters(), strict=True):
        assert (one - two.cpu()).norm() < 0.03 * (one - start[name]).norm(), name


@needs_apex
def test_lamb_is_its_formula():
    """You et al. 2020, algorithm 2, with apex's clipping of the full gradient; psi's group may have no gradient."""
    torch.manual_seed(0)
    weight, bias, psi = (nn.Parameter(torch.randn(shape, device=CUDA)) for shape in ((7, 5), (5,), (3,)))
    groups = [
        {"name": "decay", "params": [weight], "weight_decay": 0.1},
        {"name": "no_decay", "params": [bias], "weight_decay": 0.0},
        {"name": "psi", "params": [psi], "weight_decay": 0.0},
    ]
    optimizer = build_apex("lamb", groups, (0.9, 0.99), 1e-6, clip=1.0)
    optimizer.found_inf = torch.zeros((), device=CUDA)
    set_learning_rates(optimizer, 0.02, 0.0)
    plain = {"w": weight.detach().double(), "b": bias.detach().double()}
    first = {key: torch.zeros_like(value) for key, value in plain.items()}
    second = {key: torch.zeros_like(value) for key, value in plain.items()}
    kept = psi.detach().clone()
    for step in range(1, 4):
        weight.grad, bias.grad, psi.grad = torch.randn_like(weight), torch.randn_like(bias), None
        grads = {"w": weight.grad.double(), "b": bias.grad.double()}
        norm = torch.sqrt(sum(g.square().sum() for g in grads.values())).clamp(min=1.0)
        for key, grad in grads.items():
            grad = grad / norm
            first[key] = 0.9 * first[key] + 0.1 * grad
            second[key] = 0.99 * second[key] + 0.01 * grad.square()
            update = first[key] / (1 - 0.9**step) / (torch.sqrt(second[key] / (1 - 0.99**step)) + 1e-6)
            if key == "w":
                update = update + 0.1 * plain[key]
                update = update * plain[key].norm() / update.norm()
            plain[key] = plain[key] - 0.02 * update
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), plain["w"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias.detach().double(), plain["b"], rtol=1e-4, atol=1e-5)
    assert torch.equal(psi, kept)


@needs_apex
def test_apex_adam_is_torchs(at):
    """Over five steps with a changing rate; psi has no gradient in two of them."""
    students = [build_student(at(), 3).to(CUDA) for _ in range(2)]
    optimizers = [
        build_optimizer(s, at(optim={"name": n}).optim, CUDA) for s, n in zip(students, NAMES_OF_ADAM, strict=True)
    ]
    for step in range(5):
        for student, optimizer in zip(students, optimizers, strict=True):
            set_learning_rates(optimizer, 0.01 / (1 + step), 0.02)
            optimizer.found_inf = torch.zeros((), device=CUDA)
            with_gradients(student, step)
            if step in (0, 2):
                student.mine.zero_grad(set_to_none=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    for one, two in zip(students[0].parameters(), students[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
