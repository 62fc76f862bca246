"""The objective's parts against their plain definitions."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pipelines.augment.device import TrainBatch
from std_fast.config.recipe import Distill, TeacherSpec
from std_fast.method.losses import (
    TeacherTargets,
    all_log_probs,
    class_loss,
    confidence_weights,
    distillation_loss,
    targets_from_logits,
)
from std_fast.method.student import StudentOutput
from std_fast.training.step import Objective


def test_class_loss_is_cross_entropy_with_the_mixed_smoothed_target():
    torch.manual_seed(0)
    logits = torch.randn(6, 5, dtype=torch.float64)
    a, b = torch.randint(5, (2, 6))
    lam = torch.rand(6)
    one_hot = F.one_hot(a, 5) * lam[:, None] + F.one_hot(b, 5) * (1 - lam[:, None])
    target = 0.9 * one_hot + 0.1 / 5
    expected = -(target * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(class_loss(logits, a, b, lam, 0.1).double(), expected, rtol=1e-6, atol=1e-6)


def test_the_more_certain_teacher_weighs_more_and_each_image_alone():
    certain, unsure = [9.0, 0, 0], [0.3, 0, 0]
    logits = torch.tensor([[certain, unsure], [unsure, certain]])
    targets = targets_from_logits(logits)
    assert targets.confidence.dtype == torch.float16
    p = logits.softmax(-1)
    torch.testing.assert_close(targets.confidence.float(), (p * p.log()).sum(-1), rtol=2e-3, atol=2e-3)
    w = confidence_weights(targets.confidence)
    assert w[0, 0] > 0.7 and w[1, 1] > 0.7
    torch.testing.assert_close(w.sum(1), torch.ones(2))
    alone = confidence_weights(targets_from_logits(logits[:1]).confidence)
    torch.testing.assert_close(alone[0], w[0])  # not summed over the batch


def test_hard_labels_reweighted_and_not():
    torch.manual_seed(0)
    logits, teachers = torch.randn(4, 2, 5), torch.randn(4, 2, 5)
    targets = targets_from_logits(teachers)
    ce = torch.stack([F.cross_entropy(logits[:, i], teachers[:, i].argmax(-1), reduction="none") for i in (0, 1)], 1)
    w = confidence_weights(targets.confidence)
    torch.testing.assert_close(distillation_loss(logits, targets), (w * ce).sum(1).mean())
    torch.testing.assert_close(distillation_loss(logits, targets, reweight=False), ce.mean())


def test_soft_labels_are_hintons():
    torch.manual_seed(0)
    logits, teachers = torch.randn(4, 1, 5), torch.randn(4, 1, 5)
    targets = targets_from_logits(teachers, temperature=3.0)
    expected = 9 * F.kl_div(
        (logits / 3).log_softmax(-1), (teachers / 3).log_softmax(-1), reduction="none", log_target=True
    )
    got = distillation_loss(logits, targets, temperature=3.0, reweight=False)
    torch.testing.assert_close(got, expected.sum(-1).mean())
    with pytest.raises(ValueError, match="log_probs"):
        distillation_loss(logits, targets_from_logits(teachers), temperature=3.0)


def test_heads_of_one_teacher_share_its_weight():
    torch.manual_seed(0)
    logits = torch.randn(4, 3, 5)
    targets = targets_from_logits(torch.randn(4, 2, 5))
    got = distillation_loss(logits, targets, head_teacher=(0, 0, 1))
    one, two = (distillation_loss(logits[:, [h, 2]], targets) for h in (0, 1))
    torch.testing.assert_close(got, (one + two) / 2)
    with pytest.raises(ValueError, match="do not fit"):
        distillation_loss(logits, targets)
    with pytest.raises(ValueError, match="targets: are of 4 images, the logits of 3"):
        distillation_loss(logits[:3, :2], targets)


def test_a_perfect_student_of_a_certain_teacher_has_no_loss():
    labels = torch.tensor([[1], [2]])
    targets = TeacherTargets(labels, torch.zeros(2, 1, dtype=torch.float16))
    logits = 50.0 * F.one_hot(labels, 4)
    assert distillation_loss(logits, targets).item() < 1e-6


def test_all_but_one_probability_stored_lose_nothing_but_rounding():
    torch.manual_seed(0)
    teachers = 2 * torch.randn(6, 1, 5)
    full, stored = (all_log_probs(targets_from_logits(teachers, 2.0, top_k), 0, 5).exp() for top_k in (0, 4))
    torch.testing.assert_close(stored, full, rtol=0, atol=2e-3)


def test_heads_have_weights_and_the_class_head_a_share():
    torch.manual_seed(0)
    targets = targets_from_logits(torch.randn(4, 2, 5))
    logits, class_logits = torch.randn(4, 2, 5), torch.randn(4, 5)
    heads = [distillation_loss(logits, targets, head_weights=w) for w in ((1.0, 0.0), (0.0, 1.0), (0.5, 2.0))]
    torch.testing.assert_close(heads[2], 0.5 * heads[0] + 2 * heads[1])
    distill = Distill(teachers=(TeacherSpec("a", "b"),) * 2, module_weights=(0.5, 2.0), class_share=0.25, alpha=0.4)
    label, lam = torch.tensor([0, 1, 2, 3]), torch.ones(4)
    mixed = TrainBatch(torch.zeros(4, 3, 2, 2), label, label, lam, label, 0, 0)
    losses = Objective(distill, 0.0, (0, 1))(StudentOutput(class_logits, logits, []), replace(mixed, targets=targets))
    on_class = distillation_loss(torch.stack([class_logits, class_logits], 1), targets)
    torch.testing.assert_close(losses.distilled, 0.75 * heads[2] + 0.25 * on_class)
    expected = 0.6 * F.cross_entropy(class_logits, label) + 0.4 * losses.distilled
    torch.testing.assert_close(losses.total, expected)
