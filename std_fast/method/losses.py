"""The objective: class loss, distillation loss and the confidence weights of the teachers (METHOD.md section 4).

Shapes: B batch, K classes, M teachers, H distillation heads (head h learns from teacher `head_teacher[h]`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TeacherTargets(NamedTuple):
    """What the loss needs to know of the teachers for one batch; small enough to be stored (target_cache.py)."""

    labels: Tensor  # int64 [B, M], argmax of each teacher's logits
    confidence: Tensor  # float16 [B, M], sum_k p log p: the negative entropy in nats, 0 for a certain teacher
    log_probs: Tensor | None = None  # [B, M, K] at the recipe's temperature; only for soft labels
    top_probs: Tensor | None = None  # float16 [B, M, k]: instead of log_probs, the k largest (see top_k_kl)
    top_classes: Tensor | None = None  # int64 [B, M, k], their classes


def targets_from_logits(logits_BMK: Tensor, temperature: float | None = None, top_k: int = 0) -> TeacherTargets:
    """Teachers' logits `[B, M, K]` -> `TeacherTargets`; `temperature` keeps the softened distribution too.

    With `top_k` of it only the largest probabilities are kept, K - 1 of them at most. Confidence and probabilities are
    rounded to float16 here, in the live path, so that stored targets are exact.
    """
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
    `smoothing` is spread evenly over the classes; it is never built as a `[B, K]` tensor.
    """
    log_p = F.log_softmax(logits_BK.float(), -1)
    of_a = log_p.gather(1, labels_a[:, None]).squeeze(1)
    of_b = log_p.gather(1, labels_b[:, None]).squeeze(1)
    mixed = torch.lerp(of_b, of_a, lam_B.float())
    return -((1 - smoothing) * mixed + smoothing * log_p.mean(-1)).mean()


def confidence_weights(confidence_BM: Tensor) -> Tensor:
    """`w = softmax_i(S_i)` per image, `S_i` teacher i's negative entropy: the more certain weighs more. `[B, M]`"""
    return confidence_BM.float().softmax(-1)


def top_k_kl(log_q_BK: Tensor, probs_Bk: Tensor, classes_Bk: Tensor) -> Tensor:
    """KL(p || q) per image `[B]` of a distribution p of which only the k largest probabilities are known.

    What they leave of 1 is spread evenly over the other K - k classes. As the k are rounded to float16, each
    probability is at least 2^-24, the smallest that float16 holds, and all are then scaled to sum to 1.
    """
    k, K = probs_Bk.shape[1], log_q_BK.shape[1]
    p_Bk = probs_Bk.float().clamp(min=2.0**-24)
    rest_B1 = ((1 - p_Bk.sum(1, keepdim=True)) / (K - k)).clamp(min=2.0**-24)
    total_B1 = p_Bk.sum(1, keepdim=True) + (K - k) * rest_B1
    p_Bk, rest_B1 = p_Bk / total_B1, rest_B1 / total_B1
    negative_entropy = (p_Bk * p_Bk.log()).sum(1, keepdim=True) + (K - k) * rest_B1 * rest_B1.log()
    # sum p log q, with the rest counted for all classes and taken back from the k: no target of K values is built
    known = ((p_Bk - rest_B1) * log_q_BK.gather(1, classes_Bk)).sum(1, keepdim=True)
    return (negative_entropy - known - rest_B1 * log_q_BK.sum(1, keepdim=True)).squeeze(1)


def distillation_loss(
    logits_BHK: Tensor,
    targets: TeacherTargets,
    head_teacher: tuple[int, ...] | None = None,
    reweight: bool = True,
    temperature: float | None = None,
) -> Tensor:
    """`sum_i w_i CE(f_i(x), argmax g_i(x))`, mean over the batch (a float32 scalar).

    Args:
        logits_BHK: distillation logits of the student's heads.
        targets: of the M teachers.
        head_teacher: which teacher each head learns from; by default head i from teacher i. Heads of one teacher
            share its weight equally.
        reweight: weigh the teachers by their confidence, per image; otherwise equally.
        temperature: None for hard labels; otherwise `T^2 KL(teacher || student)` at this temperature
            (Hinton et al. 2015), which needs `targets.log_probs` or the `top_` fields.

    Raises:
        ValueError: as many heads as teachers are expected, or soft labels are wanted and not there.
    """
    M = targets.labels.shape[1]
    head_teacher = tuple(range(M)) if head_teacher is None else head_teacher
    if len(head_teacher) != logits_BHK.shape[1] or max(head_teacher) >= M:
        raise ValueError(f"{logits_BHK.shape[1]} heads and {M} teachers do not fit head_teacher={head_teacher}")
    total = logits_BHK.new_zeros(len(logits_BHK), dtype=torch.float32)
    weights_BM = confidence_weights(targets.confidence) if reweight else None
    for h, teacher in enumerate(head_teacher):
        if temperature is None:
            per_image = F.cross_entropy(logits_BHK[:, h].float(), targets.labels[:, teacher], reduction="none")
        else:
            log_q = F.log_softmax(logits_BHK[:, h].float() / temperature, -1)
            if targets.top_probs is not None and targets.top_classes is not None:
                divergence = top_k_kl(log_q, targets.top_probs[:, teacher], targets.top_classes[:, teacher])
            elif targets.log_probs is not None:
                log_p = targets.log_probs[:, teacher].float()
                divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
            else:
                raise ValueError("soft labels need targets with log_probs: pass a temperature to the teachers too")
            per_image = temperature**2 * divergence
        share = 1.0 / len([other for other in head_teacher if other == teacher])  # torch 2.8 cannot trace `count`
        weight = share / len(set(head_teacher)) if weights_BM is None else share * weights_BM[:, teacher]
        total = total + weight * per_image
    return total.mean()
