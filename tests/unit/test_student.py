"""Students: where the modules sit, what each setting changes, and that everything trainable is trained."""

from dataclasses import replace

import pytest
import torch

from pipelines.augment.device import TrainBatch
from pipelines.errors import UserError
from std_fast.commands.info import describe_model
from std_fast.config.recipe import Recipe
from std_fast.config.schema import from_dict
from std_fast.method.losses import targets_from_logits
from std_fast.method.student import ModulePlan, StudentOutput, plan_modules, predict
from std_fast.training.build import build_student
from std_fast.training.optim import build_optimizer, parameter_groups
from std_fast.training.step import Objective
from tests.small_runs import MIXER

K, SIZE = 5, 16
RESMLP = {"name": "resmlp", "options": {"patch_size": 4, "dim": 16, "depth": 3}}
CYCLE = {
    "name": "cyclemlp_b1",
    "options": {"layers": [1, 1, 1, 3], "embed_dims": [8, 8, 16, 16], "mlp_ratios": [2] * 4},
}
STUDENTS = {"mixer": MIXER, "resmlp": RESMLP, "cyclemlp": CYCLE}
SETTINGS = {
    "two teachers": {},
    "one teacher, last module": {"teachers": 1},
    "one teacher on both": {"teachers": 1, "assign": [[0], [0]]},
    "both teachers on both": {"assign": [[0, 1], [0, 1]]},
    "both at the last": {"assign": [[0, 1]], "taps": [3]},
    "soft labels": {"labels": "soft", "temperature": 2.0},
    "narrow": {"token_mlp_ratio": [1.0, 1.0]},
    "modules weighed": {"module_weights": [0.5, 2.0]},
    "class head learns from the teacher": {"class_share": 0.5},
    "not reweighted": {"reweight": False},
    "spatial": {"tokens": "spatial"},
    "channel": {"tokens": "channel"},
    "no tokens": {"tokens": "none"},
    "deit token": {"tokens": "deit"},
    "no mine": {"mine": {"weight": 0}},
    "mine corrected": {"mine": {"ema": 0.01}},
}


def recipe_of(student, setting):
    setting = dict(setting)
    teachers = [{"name": f"t{i}"} for i in range(setting.pop("teachers", 2))]
    distill = {"mode": "std", "teachers": teachers, **setting}
    return from_dict(Recipe, {"student": student, "distill": distill, "data": {"image_size": SIZE}})


def batch(B=4):
    torch.manual_seed(1)
    labels = torch.randint(K, (2, B))
    images = torch.randn(B, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
    return TrainBatch(images, labels[0], labels[1], torch.rand(B), torch.arange(B), 0, 0)


def one_loss(recipe, student):
    mixed = batch()
    logits = torch.randn(4, len(recipe.distill.teachers), K)
    temperature = recipe.distill.temperature if recipe.distill.labels == "soft" else None
    objective = Objective(recipe.distill, 0.1, student.head_teacher)
    mixed = replace(mixed, targets=targets_from_logits(logits, temperature))
    return objective(student(mixed.images), mixed)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", STUDENTS)
def test_one_optimisation_step_reaches_every_parameter(name, setting):
    if (name, setting) == ("cyclemlp", "deit token"):
        with pytest.raises(UserError, match="distill_token"):
            build_student(recipe_of(STUDENTS[name], SETTINGS[setting]), K)
        return
    recipe = recipe_of(STUDENTS[name], SETTINGS[setting])
    student = build_student(recipe, K).train()
    optimizer = build_optimizer(student, recipe.optim, torch.device("cpu"))
    for group in optimizer.param_groups:
        group["lr"].fill_(0.1)
    with torch.no_grad():
        student.backbone.head.weight.normal_()  # a head of zeros, timm's start, hides the trunk from the class loss
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    losses = one_loss(recipe, student)
    losses.total.backward()
    assert (losses.information is not None) == recipe.distill.uses_mine == (len(student.mine) > 0)
    for n, p in student.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), n
    optimizer.step()
    moved = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    # an output bias of psi cancels in V, and so may never move
    assert set(before) - moved <= {n for n in before if n.endswith("psi.fc3.bias")}


def test_each_setting_changes_the_objective():
    totals = {}
    for setting in SETTINGS:
        recipe = recipe_of(MIXER, SETTINGS[setting])
        student = build_student(recipe, K).train()
        totals[setting] = one_loss(recipe, student).total.item()
    totals.pop("mine corrected")  # changes the gradient and not the value: test_mine.py
    assert len({round(value, 7) for value in totals.values()}) == len(totals), totals


def test_the_distillation_token_has_one_head_for_each_of_many_teachers():
    student = build_student(recipe_of(MIXER, {"tokens": "deit", "teachers": 3}), K)
    assert student.head_teacher == (0, 1, 2) and len(student.deit_heads) == 3


def test_hidden_widths_of_the_modules():
    student = build_student(recipe_of(MIXER, {"token_mlp_ratio": [0.25, 1.5]}), K)
    assert [(m.fc1_s.out_features, m.fc1_c.out_features) for m in student.std] == [(4, 24)] * 2
    papers = build_student(recipe_of(MIXER, {}), K)
    assert [(m.fc1_s.out_features, m.fc1_c.out_features) for m in papers.std] == [(8, 64)] * 2
    with pytest.raises(UserError, match="distill.module_weights: has 3 entries for 2 modules"):
        build_student(recipe_of(MIXER, {"module_weights": [1, 1, 1]}), K)


def test_default_placement_is_two_thirds_and_the_last():
    student = build_student(recipe_of({**MIXER, "options": {**MIXER["options"], "depth": 8}}, {}), K)
    assert student.taps == (5, 8)
    assert student.head_teacher == (0, 1)
    one = build_student(recipe_of(MIXER, {"teachers": 1}), K)
    assert one.taps == (3,)


@pytest.mark.parametrize(
    ("teachers", "taps", "assign", "complaint"),
    [
        (2, (1, 9), None, "distill.taps"),
        (2, (2, 2), None, "distill.taps"),
        (2, None, ((0,), (0,)), "distill.assign"),
        (2, (1, 2, 3), ((0,), (1,)), "distill.assign"),
        (1, None, ((0,), ()), "distill.assign"),
        (3, None, ((0,), (1,), (2,)), "distill.taps"),
    ],
)
def test_impossible_placements_are_named(teachers, taps, assign, complaint):
    backbone = build_student(recipe_of(MIXER, {}), K).backbone
    with pytest.raises(UserError, match=complaint):
        plan_modules(backbone, teachers, taps, assign)
    assert plan_modules(backbone, 3) == (ModulePlan(2, (0, 1, 2)), ModulePlan(3, (0, 1, 2)))


def test_one_block_has_one_module_for_all_teachers():
    flat = {**CYCLE, "options": {**CYCLE["options"], "layers": [1, 1, 2, 1]}}
    backbone = build_student(recipe_of(flat, {}), K).backbone
    assert plan_modules(backbone, 2) == (ModulePlan(1, (0, 1)),) and plan_modules(backbone, 1) == (ModulePlan(1, (0,)),)


def test_predictions():
    out = StudentOutput(torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.0, 4.0], [0.0, 0.0]]]), [])
    assert predict(out, "class").tolist() == [[1.0, 0.0]]
    assert predict(out, "distill").tolist() == [[0.0, 2.0]]
    assert predict(out, "mean").tolist() == [[0.5, 1.0]]
    student = build_student(recipe_of(MIXER, {"predict": "class"}), K).eval()
    images = batch().images
    with torch.no_grad():
        assert torch.equal(student(images), student.outputs(images).class_logits)


def test_tokens_biases_norms_and_scales_never_decay():
    for name in ("mixer", "resmlp"):
        recipe = recipe_of(STUDENTS[name], {})
        student = build_student(recipe, K)
        groups = {g["name"]: {id(p) for p in g["params"]} for g in parameter_groups(student, 0.05)}
        assert [g["weight_decay"] for g in parameter_groups(student, 0.05)] == [0.05, 0.0, 0.0]
        for n, p in student.named_parameters():
            spared = p.ndim <= 1 or "token_s" in n or "token_c" in n or ".alpha" in n or ".beta" in n or ".ls" in n
            wanted = "psi" if n.startswith("mine.") else "no_decay" if spared else "decay"
            assert id(p) in groups[wanted], n


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [
        ("mixer_s16", 22.16, 4.25),
        ("resmlp_b24", 122.56, 24.1),
        ("cyclemlp_b1", 18.42, None),
        ("cyclemlp_b2", 30.07, 4.0),
    ],
)
def test_published_sizes_with_two_teachers(name, parameters, gmacs):
    data = describe_model(name, teachers=2)
    assert data["parameters_millions"] == pytest.approx(parameters, abs=0.05)
    if gmacs is not None:
        assert data["gmacs"] == pytest.approx(gmacs, rel=0.02)
