"""The objective: class loss, distillation loss and the confidence weights of the teachers (METHOD.md section 4).

Shapes: B batch, K classes, M teachers, H distillation heads (head h learns from teacher `head_teacher[h]`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TeacherTargets(NamedTuple):
    """The teachers' outputs for one batch, as the loss takes them; small enough to be stored (target_cache.py)."""

    labels: Tensor  # int64 [B, M], argmax of each teacher's logits
    confidence: Tensor | None  # float16 [B, M], sum_k p log p: the negative entropy in nats; None without teachers
    log_probs: Tensor | None = None  # [B, M, K] at the recipe's temperature; only for soft labels
    top_probs: Tensor | None = None  # float16 [B, M, k]: instead of log_probs, the k largest (see all_log_probs)
    top_classes: Tensor | None = None  # int64 [B, M, k], their classes


def targets_from_logits(logits_BMK: Tensor, temperature: float | None = None, top_k: int = 0) -> TeacherTargets:
    """Teachers' logits `[B, M, K]` -> `TeacherTargets` (METHOD.md section 4).

    Confidence and the `top_k` probabilities are rounded to float16 here, with running teachers too, so that stored
    targets are bit for bit the same.

    Args:
        temperature: keeps the distribution at this temperature, for soft labels; None: hard labels only.
        top_k: keeps only the largest probabilities, at most K - 1; 0: all log-probabilities, in float32.

    Raises:
        ValueError: logits of another shape, a temperature of 0 or less.
    """
    if logits_BMK.ndim != 3:
        raise ValueError(f"logits_BMK: must be [B, M, K], not {list(logits_BMK.shape)}; stack the teachers' in dim=1")
    if temperature is not None and temperature <= 0:
        raise ValueError(f"temperature: {temperature} must be above 0")
    log_p = F.log_softmax(logits_BMK.float(), -1)
    confidence = (log_p.exp() * log_p).sum(-1).to(torch.float16)
    labels = logits_BMK.argmax(-1)
    if temperature is None:
        return TeacherTargets(labels, confidence)
    soft = F.log_softmax(logits_BMK.float() / temperature, -1)
    if not top_k:
        return TeacherTargets(labels, confidence, soft)
    top = soft.exp().topk(min(top_k, soft.shape[-1] - 1), -1)
    return TeacherTargets(labels, confidence, None, top.values.to(torch.float16), top.indices)


def class_loss(logits_BK: Tensor, labels_a: Tensor, labels_b: Tensor, lam_B: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with mixed and smoothed labels, mean over the batch (a float32 scalar).

    The target of row i is `lam_i` of labels_a[i] and `1 - lam_i` of labels_b[i] (mixup, cutmix), of which a share
    `smoothing` is spread evenly over the classes; no `[B, K]` target is built.

    Args:
        logits_BK: of the class head.
        labels_a, labels_b: int64 [B].
        lam_B: share of labels_a, 0 to 1.
        smoothing: label smoothing (Szegedy et al. 2016).
    """
    log_p = F.log_softmax(logits_BK.float(), -1)
    of_a = log_p.gather(1, labels_a[:, None]).squeeze(1)
    of_b = log_p.gather(1, labels_b[:, None]).squeeze(1)
    mixed = torch.lerp(of_b, of_a, lam_B.float())
    return -((1 - smoothing) * mixed + smoothing * log_p.mean(-1)).mean()


def confidence_weights(confidence_BM: Tensor) -> Tensor:
    """`w = softmax_i(S_i)` per image, `[B, M]`: a certain teacher weighs more (Li et al. 2022; METHOD.md section 4).

    Args:
        confidence_BM: `S_i`, teacher i's negative entropy in nats."""
    return confidence_BM.float().softmax(-1)


def all_log_probs(targets: TeacherTargets, teacher: int, classes: int) -> Tensor:
    """Log-probabilities `[B, K]` of one teacher at the temperature of `targets`.

    Where only the k largest are known, the rest of 1 is spread evenly over the other K - k classes. The k are rounded
    to float16, so each probability is raised to at least 2^-24, float16's smallest, and all are scaled to sum to 1.

    Raises:
        ValueError: `targets` has no distribution.
    """
    if targets.log_probs is not None:
        return targets.log_probs[:, teacher].float()
    if targets.top_probs is None or targets.top_classes is None:
        raise ValueError("soft labels need targets with log_probs: pass a temperature to the teachers too")
    p_Bk = targets.top_probs[:, teacher].float().clamp(min=2.0**-24)
    rest_B1 = ((1 - p_Bk.sum(1, keepdim=True)) / (classes - p_Bk.shape[1])).clamp(min=2.0**-24)
    p_BK = rest_B1.repeat(1, classes).scatter(1, targets.top_classes[:, teacher], p_Bk)
    return (p_BK / p_BK.sum(1, keepdim=True)).log()


def kl(logits_BK: Tensor, log_p_BK: Tensor, T: float) -> Tensor:
    """`T^2 KL(teacher || student)` per image, `[B]`, at temperature T (Hinton et al. 2015).

    Args:
        logits_BK: the student's.
        log_p_BK: the teacher's log-probabilities at this temperature.
    """
    return T**2 * (log_p_BK.exp() * (log_p_BK - F.log_softmax(logits_BK / T, -1))).sum(-1)


def distillation_loss(
    logits_BHK: Tensor,
    targets: TeacherTargets,
    head_teacher: tuple[int, ...] | None = None,
    *,
    reweight: bool = True,
    temperature: float | None = None,
    head_weights: tuple[float, ...] | None = None,
) -> Tensor:
    """`sum_i w_i loss(f_i(x), g_i(x))`, mean over the batch (a float32 scalar; Li et al. 2022, METHOD.md section 4).

    Args:
        logits_BHK: distillation logits of the student's heads.
        targets: those of the M teachers.
        head_teacher: which teacher each head learns from; by default head i from teacher i. Heads of one teacher
            share its weight equally.
        reweight: weigh the teachers by their confidence, per image; otherwise equally.
        temperature: None for hard labels, `CE(f_i(x), argmax g_i(x))`; otherwise `kl` at this temperature, which needs
            `targets.log_probs` or the `top_` fields.
        head_weights: factors of the heads' losses; by default 1.

    Raises:
        ValueError: targets of another batch; heads that do not fit `head_teacher` or the teachers; soft labels without
            a distribution.
    """
    if len(targets.labels) != len(logits_BHK):
        raise ValueError(f"targets: are of {len(targets.labels)} images, the logits of {len(logits_BHK)}")
    M = targets.labels.shape[1]
    head_teacher = tuple(range(M)) if head_teacher is None else head_teacher
    if len(head_teacher) != logits_BHK.shape[1] or max(head_teacher) >= M:
        raise ValueError(f"{logits_BHK.shape[1]} heads and {M} teachers do not fit head_teacher={head_teacher}")
    total = logits_BHK.new_zeros(len(logits_BHK), dtype=torch.float32)
    weights_BM = confidence_weights(targets.confidence) if reweight and targets.confidence is not None else None
    for h, teacher in enumerate(head_teacher):
        logits_BK = logits_BHK[:, h].float()
        if temperature is None:
            per_image = F.cross_entropy(logits_BK, targets.labels[:, teacher], reduction="none")
        else:
            per_image = kl(logits_BK, all_log_probs(targets, teacher, logits_BK.shape[-1]), temperature)
        share = 1.0 / len([other for other in head_teacher if other == teacher])  # torch 2.8 cannot trace `count`
        share *= 1.0 if head_weights is None else head_weights[h]
        weight = share / len(set(head_teacher)) if weights_BM is None else share * weights_BM[:, teacher]
        total = total + weight * per_image
    return total.mean()
