"""Mutual information between the spatial and the channel token, estimated by a statistics network (MINE).

Sources: Belghazi et al., "Mutual Information Neural Estimation", ICML 2018 (the Donsker-Varadhan bound and, in
section 3.2, the correction of its gradient); METHOD.md section 5.
Shapes: B batch, M teachers of a module, C channels, P patches, D width of the statistics network, N = B x M pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from std_fast.method.tokens import at_least_float32


def partner_rows(x_BD: Tensor) -> Tensor:
    """Row i of the result is row i XOR 2: another image for every row, and its own inverse.

    XOR 2 and not XOR 1, because rows i and i XOR 1 are mixed with each other by mixup and cutmix and so share their
    content: as a marginal pair they would not be independent. The rows stay within an aligned group of four, so that
    the estimate does not depend on how a batch is cut into shards. A batch that is no multiple of four (a caller's
    own loop) is rolled by one row instead.

    Raises:
        ValueError: fewer than two rows.
    """
    B = len(x_BD)
    if B < 2:
        raise ValueError("a marginal pair needs another image: the batch has fewer than two rows")
    if B % 4:
        return x_BD.roll(1, 0)
    return x_BD.unflatten(0, (B // 4, 2, 2)).flip(1).flatten(0, 2)


def apply_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer(x)` in the dtype of x: psi computes in float32 also where its weights are bfloat16."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.weight.to(x.dtype), bias)


class StatisticsNetwork(nn.Module):
    """psi: a 3-layer perceptron `C+P -> D -> D -> 1` with GELU that scores a pair (T_S', T_C').

    The first layer is linear in the pair, so that the marginal pass permutes its channel half instead of
    multiplying again.
    """

    def __init__(self, dim_s: int, dim_c: int, width: int = 512) -> None:
        super().__init__()
        self.fc1_s = nn.Linear(dim_s, width)
        self.fc1_c = nn.Linear(dim_c, width, bias=False)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, 1)

    def score(self, hidden_ND: Tensor) -> Tensor:
        """First-layer sums `[..., D]` -> scores `[...]`."""
        hidden_ND = F.gelu(apply_linear(self.fc2, F.gelu(hidden_ND)))
        return apply_linear(self.fc3, hidden_ND).squeeze(-1)

    def forward(self, ts_BMC: Tensor, tc_BMP: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of one batch -> scores of joint pairs `[B, M]` and of marginal pairs `[B, M]`.

        Raises:
            ValueError: tokens of other lengths than `dim_s` and `dim_c`; fewer than two images.
        """
        lengths, found = (self.fc1_s.in_features, self.fc1_c.in_features), (ts_BMC.shape[-1], tc_BMP.shape[-1])
        if found != lengths:
            raise ValueError(f"tokens of lengths {found}: psi was made for (dim_s, dim_c) = {lengths}")
        s_BMD, c_BMD = apply_linear(self.fc1_s, ts_BMC), apply_linear(self.fc1_c, tc_BMP)
        return self.score(s_BMD + c_BMD), self.score(s_BMD + partner_rows(c_BMD))


class _ReverseGradient(torch.autograd.Function):
    """Identity forward; the gradient is multiplied by -weight on its way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * grad, None


def reverse_gradient(x: Tensor, weight: float) -> Tensor:
    """`x`, whose gradient arrives multiplied by `-weight` (gradient reversal: Ganin and Lempitsky 2015): what psi
    maximises, `x` minimises."""
    return _ReverseGradient.apply(x, weight)


def log_mean_exp(scores: Tensor) -> Tensor:
    """`log mean exp` of all scores (a scalar)."""
    return torch.logsumexp(scores.flatten(), 0) - math.log(scores.numel())


def over_parts(joint_mean: Tensor, log_mean: Tensor, terms_N2: Tensor) -> tuple[Tensor, Tensor]:
    """Both terms of the bound over a batch that is cut into N equally large parts: the micro-batches of all ranks.

    The gradients are such that their mean over the parts is that of the complete batch: that of the mean is the local
    one; that of log-mean-exp is the local one, scaled by the share that this part has in the mean of exp (N times its
    part of the sum). Nothing is sent on the way back.

    Args:
        joint_mean, log_mean: this part's two terms, scalars.
        terms_N2: both, of every part, without gradients.
    """
    joint_N, log_N = terms_N2.unbind(1)
    all_log, local_log = log_mean_exp(log_N), log_mean.detach()
    share = torch.exp(local_log - all_log)
    return joint_mean - joint_mean.detach() + joint_N.mean(), share * (log_mean - local_log) + all_log


class MutualInformation(nn.Module):
    """The bound V of METHOD.md section 5 for the tokens of one STD module.

    The gradients of `forward`'s V are such that one optimizer that minimises `-V` trains both: psi maximises V, while
    the tokens receive the gradient of `+weight * V` and so minimise it.

    Args:
        dim_s, dim_c: lengths of the two tokens (C and P).
        width: hidden width D of psi.
        weight: strength of the regulariser on the tokens.
        ema: rate of the moving average in the corrected gradient of the second term (Belghazi et al., section 3.2,
            equation 12); 0 uses the plain, biased gradient. The value of V is the same either way.

    Raises:
        ValueError: a size, weight or rate out of its range.
    """

    log_average: Tensor

    def __init__(self, dim_s: int, dim_c: int, width: int = 512, weight: float = 1.0, ema: float = 0.0) -> None:
        super().__init__()
        if min(dim_s, dim_c, width) < 1 or weight < 0 or not 0 <= ema < 1:
            sizes = f"dim_s={dim_s} dim_c={dim_c} width={width}"
            raise ValueError(f"sizes must be positive, weight 0 or more, ema in [0, 1): {sizes} {weight=} {ema=}")
        self.psi = StatisticsNetwork(dim_s, dim_c, width)
        self.weight, self.ema = weight, ema
        self.gather: Callable[[Tensor], Tensor] | None = None  # of many processes: [1, 2] of each rank -> [W, 2]
        self.terms_N2: Tensor | None = None  # while the batch is one part of N: see begin_parts
        # log of the moving average of mean exp(marginal); NaN until the first batch
        self.register_buffer("log_average", torch.full((), math.nan))

    def forward(self, ts_BMC: Tensor, tc_BMP: Tensor) -> Tensor:
        """Tokens `[B, M, C]` and `[B, M, P]` -> V, a scalar, computed at least in float32: under autocast too, and with
        psi in bfloat16. Raises ValueError as `StatisticsNetwork`."""
        with torch.autocast(ts_BMC.device.type, enabled=False):
            joint_mean, log_mean = self.terms(
                reverse_gradient(at_least_float32(ts_BMC), self.weight),
                reverse_gradient(at_least_float32(tc_BMP), self.weight),
            )
            terms_N2 = self.terms_N2
            if terms_N2 is None and self.gather is not None:
                terms_N2 = self.gather(torch.stack([joint_mean, log_mean]).detach()[None])
            if terms_N2 is not None:
                joint_mean, log_mean = over_parts(joint_mean, log_mean, terms_N2)
            if not (self.ema and self.training):
                return joint_mean - log_mean
            now = log_mean.detach()
            if self.terms_N2 is None:
                self._update_average(now)
            # value of log mean exp, gradient of (mean exp) / (moving average)
            surrogate = torch.exp(log_mean - self.log_average)
            return joint_mean - (surrogate - surrogate.detach() + now)

    def terms(self, ts_BMC: Tensor, tc_BMP: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens in float32 or float64 -> both terms of the bound for them alone, scalars."""
        joint, marginal = self.psi(ts_BMC, tc_BMP)
        return joint.mean(), log_mean_exp(marginal)

    def begin_parts(self, terms_N2: Tensor) -> None:
        """From here to `end_parts` V is that of a batch in N equally large parts, each of which `forward` gets once.

        Args:
            terms_N2: of `terms`, for every part.
        """
        self.terms_N2 = terms_N2
        if self.ema and self.training:
            self._update_average(log_mean_exp(terms_N2[:, 1]))

    def end_parts(self) -> None:
        self.terms_N2 = None

    @torch.no_grad()
    def _update_average(self, now: Tensor) -> None:
        mixed = torch.logaddexp(self.log_average + math.log1p(-self.ema), now + math.log(self.ema))
        self.log_average.copy_(torch.where(self.log_average.isnan(), now, mixed))


def mutual_information(psi: StatisticsNetwork, ts_BMC: Tensor, tc_BMP: Tensor) -> Tensor:
    """V of one batch in nats, `mean(joint) - log mean exp(marginal)` (Donsker-Varadhan), for a loop of your own: psi
    should maximise it and the tokens minimise it. `MutualInformation` does both in one backward pass.
    """
    joint, marginal = psi(at_least_float32(ts_BMC), at_least_float32(tc_BMP))
    return joint.mean() - log_mean_exp(marginal)
