"""Losses of soft labels, per image: KL, DKD, DIST and OFA's.

Each takes the student's logits `[B, K]`, the teacher's log-probabilities `[B, K]` at temperature T, the temperature,
and labels `[B]`; it returns `[B]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

DKD_BETA = 8.0  # Zhao et al.'s for most pairs of CIFAR-100
DIST_WEIGHT = 2.0  # beta and gamma of Huang et al.
OFA_GAMMA = 1.5  # of the runs that Hao et al. published


def kl(logits_BK: Tensor, log_p_BK: Tensor, T: float, _labels: Tensor | None = None) -> Tensor:
    """`T^2 KL(teacher || student)` (Hinton et al. 2015)."""
    return T**2 * (log_p_BK.exp() * (log_p_BK - F.log_softmax(logits_BK / T, -1))).sum(-1)


def dkd(logits_BK: Tensor, log_p_BK: Tensor, T: float, labels_B: Tensor | None) -> Tensor:
    """`T^2 (KL of target against rest + DKD_BETA KL among the rest)` (Zhao et al. 2022, equation 7, alpha 1)."""
    assert labels_B is not None
    target_BK = F.one_hot(labels_B, logits_BK.shape[-1]).bool()
    log_q_BK = F.log_softmax(logits_BK / T, -1)
    log_p_rest, log_q_rest = (
        x.masked_fill(target_BK, -math.inf).logsumexp(-1, keepdim=True) for x in (log_p_BK, log_q_BK)
    )
    difference_BK = log_p_BK - log_q_BK
    rest_B1 = log_p_rest - log_q_rest
    of_target = (log_p_BK.exp() * difference_BK * target_BK).sum(-1) + (log_p_rest.exp() * rest_B1).squeeze(-1)
    among_rest = ((log_p_BK - log_p_rest).exp() * (difference_BK - rest_B1) * ~target_BK).sum(-1)
    return T**2 * (of_target + DKD_BETA * among_rest)


def dist(logits_BK: Tensor, log_p_BK: Tensor, T: float, _labels: Tensor | None = None) -> Tensor:
    """`T^2 DIST_WEIGHT (1 - correlation over classes + 1 - correlation over images)` (Huang et al. 2022, equation 9).

    The second part, a mean over the classes, is the same for all images of the batch (of each process its own).
    """
    q_BK, p_BK = F.softmax(logits_BK / T, -1), log_p_BK.exp()
    return T**2 * DIST_WEIGHT * ((1 - correlation(q_BK, p_BK)) + (1 - correlation(q_BK.T, p_BK.T)).mean())


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, over the last dimension."""
    return F.cosine_similarity(a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True), dim=-1)


def ofa(logits_BK: Tensor, log_p_BK: Tensor, T: float, labels_B: Tensor | None) -> Tensor:
    """`-sum_c ((p_c + [c is the target])^OFA_GAMMA - [c is the target]) log q_c` (Hao et al. 2023, equation 5)."""
    assert labels_B is not None
    target_BK = F.one_hot(labels_B, logits_BK.shape[-1])
    weights_BK = (log_p_BK.exp() + target_BK) ** OFA_GAMMA - target_BK
    return -(weights_BK * F.log_softmax(logits_BK / T, -1)).sum(-1)


SOFT_LOSSES: dict[str, Callable[[Tensor, Tensor, float, Tensor | None], Tensor]] = {
    "kl": kl,
    "dkd": dkd,
    "dist": dist,
    "ofa": ofa,
}
