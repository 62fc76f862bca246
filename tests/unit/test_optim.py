"""Which parameters each optimizer gets, Muon against its plain form and torch's, and what a bad step leaves behind."""

import math

import pytest
import torch

from pipelines.errors import UserError
from std_fast.config.recipe import Recipe
from std_fast.config.schema import from_dict
from std_fast.runtime import checkpoint
from std_fast.training.build import build_student
from std_fast.training.optim import build_optimizer, parameter_groups, set_learning_rates
from std_fast.training.optimizers import Muon, _on_device, orthogonal
from std_fast.training.train import train
from tests.small_runs import assert_same_bits, final_tensors, small_recipe, train_until

CPU = torch.device("cpu")
STUDENTS = {
    "mixer": {"patch_size": 4, "dim": 16, "depth": 3, "token_dim": 8, "channel_dim": 32},
    "resmlp": {"patch_size": 4, "dim": 16, "depth": 3},
    "cyclemlp": {"layers": [1, 3], "embed_dims": [8, 12], "mlp_ratios": [2, 2], "stem_stride": 2},
}


def recipe(student="mixer", **optim):
    return from_dict(Recipe, {
        "data": {"image_size": 16}, "student": {"name": student, "options": STUDENTS[student]},
        "distill": {"mode": "std", "teachers": [{"weights": "a"}, {"weights": "b"}]}, "optim": optim,
    })  # fmt: skip


def one_step(student, optimizer, seed):
    torch.manual_seed(seed)
    for parameter in student.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", STUDENTS)
def test_muon_gets_the_matrices_of_blocks_and_std_modules_and_nothing_else(name):
    student = build_student(recipe(name), 3)
    groups = {g["name"]: g["params"] for g in parameter_groups(student, 0.05, matrices_apart=True)}
    names = {id(p): n for n, p in student.named_parameters()}
    matrices = {names[id(p)] for p in groups["matrices"]}
    assert matrices and all(n.startswith(("backbone.blocks.", "backbone.network.", "std.")) for n in matrices)
    mixing = {f"std.{i}.fc{j}_{kind}.weight" for i in (0, 1) for j in (1, 2) for kind in "sc"}
    assert {n for n in matrices if n.startswith("std.")} == mixing
    rest = {n: p for n, p in student.named_parameters() if n not in matrices}
    inside = [n for n, p in rest.items() if p.ndim == 2 and ".blocks." in n]
    assert not inside  # all of them
    for needed in ("backbone.head.weight", "std.0.token_s", "std.0.heads.0.weight", "mine.0.psi.fc1_s.weight"):
        assert needed in rest
    assert sum(len(g) for g in groups.values()) == len(names)
    if name == "cyclemlp":
        assert any(n.endswith("sfc_h.weight") for n in matrices)  # [C, C, 1, 1] is a matrix
        assert all("proj.weight" not in n or ".attn." in n for n in matrices)  # embeddings between stages are not


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (5, 12), (12, 5)])
def test_orthogonal_keeps_singular_vectors_and_levels_singular_values(rows, columns):
    torch.manual_seed(0)
    x = torch.randn(3, rows, columns, dtype=torch.float64)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ orthogonal(x) @ v.mT  # diagonal exactly if the singular vectors are kept
    values = inner.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(inner, torch.diag_embed(values), rtol=0, atol=1e-10)
    assert values.min() > 0.4 and values.max() < 1.3


def test_muon_is_the_plain_form_and_torchs():
    """Matrices of two shapes with a learning rate that changes, against one matrix after the other in plain words."""
    torch.manual_seed(0)
    start = [torch.randn(6, 10), torch.randn(6, 10), torch.randn(10, 6)]
    ours, theirs = ([w.clone().requires_grad_() for w in start] for _ in range(2))
    plain, momenta = [w.clone() for w in start], [torch.zeros_like(w) for w in start]
    group = {"params": ours, "name": "matrices", "muon": True, "momentum": 0.95, "weight_decay": 0.1}
    group["lr"] = torch.zeros(())
    one = Muon([group], lr=torch.zeros(()), fused=True)
    torchs = getattr(torch.optim, "Muon", None)  # since torch 2.9
    two = torchs and torchs(theirs, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        lr = 0.02 / (1 + step)
        set_learning_rates(one, lr, 0.0)
        if two:
            two.param_groups[0]["lr"] = lr
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            grad = torch.randn(a.shape)
            a.grad, b.grad = grad.clone(), grad.clone()
            momenta[i] = 0.95 * momenta[i] + 0.05 * grad
            update = orthogonal((0.05 * grad + 0.95 * momenta[i])[None])[0]
            plain[i] = plain[i] * (1 - lr * 0.1) - lr * 0.2 * math.sqrt(10) * update
        one.step()
        if two:
            two.step()
    for a, b, c, w in zip(ours, plain, theirs, start, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=1e-5, atol=1e-6)
        assert not two or (a - c).norm() < 0.02 * (a - w).norm()  # torch's works in bfloat16


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("when", ["first", "later"])
def test_a_bad_step_changes_nothing(name, when):
    r = recipe(name=name)
    student = build_student(r, 3)
    optimizer = build_optimizer(student, r.optim, CPU)
    set_learning_rates(optimizer, 0.01, 0.02)
    optimizer.found_inf = torch.zeros(())
    if when == "later":
        one_step(student, optimizer, 0)
        one_step(student, optimizer, 1)
    before = {n: t.clone() for n, t in checkpoint.training_tensors(student, optimizer, {}).items()}
    optimizer.found_inf = torch.ones(())
    for i, parameter in enumerate(student.parameters()):
        parameter.grad = torch.full_like(parameter, [math.nan, math.inf, 1.0][i % 3])
    optimizer.step()
    after = checkpoint.training_tensors(student, optimizer, {})
    for key, tensor in after.items():
        if "log_average" not in key:
            assert torch.equal(tensor, before.get(key, torch.zeros_like(tensor))), key
    optimizer.found_inf = torch.zeros(())
    one_step(student, optimizer, 2)
    changed = [n for n, p in student.named_parameters() if not torch.equal(p, before[f"model.{n}"])]
    assert len(changed) == len(list(student.parameters()))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_torchs_plain_one_whatever_the_first_step_was(momentum, nesterov):
    """Over steps with a changing rate, the first of them skipped, against torch's loop over the tensors."""
    if nesterov and not momentum:
        with pytest.raises(UserError, match="optim.nesterov: is SGD's, with a momentum"):
            recipe(name="sgd", momentum=momentum, nesterov=nesterov)
        return
    r = recipe(name="sgd", momentum=momentum, nesterov=nesterov, weight_decay=0.1)
    ours, theirs = (build_student(r, 3) for _ in range(2))
    one = build_optimizer(ours, r.optim, CPU)
    groups = parameter_groups(theirs, 0.1)
    two = torch.optim.SGD(groups, lr=0.1, momentum=momentum, nesterov=nesterov, foreach=False)
    one.found_inf = torch.ones(())
    one_step(ours, one, 9)
    one.found_inf = torch.zeros(())
    for step in range(4):
        set_learning_rates(one, 0.1 / (1 + step), 0.02)
        for group in two.param_groups:
            group["lr"] = 0.02 if group["name"] == "psi" else 0.1 / (1 + step)
        one_step(ours, one, step)
        one_step(theirs, two, step)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_state_survives_a_checkpoint_to_the_bit(tmp_path, name):
    r = recipe("cyclemlp", name=name)
    students = [build_student(r, 3) for _ in range(2)]
    optimizers = [build_optimizer(student, r.optim, CPU) for student in students]
    for optimizer in optimizers:
        set_learning_rates(optimizer, 0.01, 0.02)
    for seed in range(3):
        one_step(students[0], optimizers[0], seed)
    meta = {"step": 3, "num_classes": 3, "recipe": ""}
    checkpoint.save(tmp_path / "c", checkpoint.training_tensors(students[0], optimizers[0], {}), meta)
    checkpoint.restore(checkpoint.load(tmp_path / "c")[0], students[1], optimizers[1])
    for seed in range(3, 5):
        for student, optimizer in zip(students, optimizers, strict=True):
            one_step(student, optimizer, seed)
    one, two = (checkpoint.training_tensors(s, o, {}) for s, o in zip(students, optimizers, strict=True))
    assert any(key.endswith("momentum_buffer") for key in one)
    assert any(key.endswith("exp_avg_sq") for key in one) == (name == "muon")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key].nan_to_num(), two[key].nan_to_num()) for key in one)


def test_a_run_with_muon_is_resumed_to_the_bit(image_folder, tmp_path):
    def at(name):
        return small_recipe(image_folder, tmp_path / name, optim={"name": "muon"}, run={"length": "5 steps"})

    train(at("one"), quiet=True)
    train_until(at("parts"), 2)
    train(at("parts"), resume=True, quiet=True)
    assert_same_bits(*(final_tensors(tmp_path / name) for name in ("one", "parts")))


class CountsAsApex(torch.optim.Optimizer):
    """Its step count is a tensor of the group, which apex's Adam makes in the first step and its LAMB before it."""

    def step(self, closure=None, grad_scaler=None):
        for group in self.param_groups:
            group["step"] = group["step"].add_(1) if "step" in group else torch.ones(1)
            for p in group["params"]:
                self.state[p].setdefault("exp_avg", torch.zeros_like(p))


@pytest.mark.parametrize("name", ["lamb", "apex_adam"])
def test_apex_counts_anew_after_a_rollback_to_before_its_first_step(name):
    module = torch.nn.Linear(2, 2)
    known_before = {"step": torch.zeros(1)} if name == "lamb" else {}
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = _on_device(CountsAsApex)([{"params": list(module.parameters()), **known_before}], {})
    before = {name: t.clone() for name, t in checkpoint.training_tensors(module, optimizer, {}).items()}
    for count in (1, 2):
        optimizer.step()
        assert optimizer.state[module.weight]["step"] == count
    checkpoint.restore(before, module, optimizer)
    optimizer.step()
    assert optimizer.state[module.weight]["step"] == 1
    after_one = {name: t.clone() for name, t in checkpoint.training_tensors(module, optimizer, {}).items()}
    optimizer.step()
    checkpoint.restore(after_one, module, optimizer)
    optimizer.step()
    assert optimizer.state[module.weight]["step"] == 2


@pytest.mark.parametrize("name", ["lamb", "apex_adam"])
def test_apex_says_what_it_needs(name):
    r = recipe(name=name)
    with pytest.raises(UserError, match=rf"optim.name: {name} .*needs a GPU; set it to adamw or muon"):
        build_optimizer(build_student(r, 3), r.optim, CPU)


def test_adamw_is_torchs_fused_one_with_its_learning_rate_in_a_tensor():
    """So that a schedule neither waits nor recompiles; the average and the clipping are one call for all tensors."""
    optimizer = build_optimizer(build_student(recipe(), 3), recipe().optim, CPU)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"] is True
    rates = [group["lr"] for group in optimizer.param_groups]
    set_learning_rates(optimizer, 0.01, 0.02)
    assert [g["lr"] for g in optimizer.param_groups] == rates and len({id(lr) for lr in rates}) == len(rates) == 3
    values = {g["name"]: g["lr"].item() for g in optimizer.param_groups}
    assert values == pytest.approx({"decay": 0.01, "no_decay": 0.01, "psi": 0.02})
