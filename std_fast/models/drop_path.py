"""Stochastic depth drawn by position (Huang et al. 2016): scales that zero a branch, or rows that skip its work.

Both draw from the counter-based generator, so that a sample's draw depends on seed, epoch and position alone. Shapes: B
batch, L blocks (2 L residual branches), D draws of U = 4 words, G images of a group, N groups, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipelines import rng

GROUP = 32  # images among which `kept_rows` draws


def residual_scales(rates_L1: Tensor, seed: int, epoch: Tensor, positions: Tensor) -> Tensor:
    """Stochastic depth: 0 with probability `rate`, else 1 / (1 - rate), per residual branch and sample: `[2 L, B]`."""
    keep_L1 = 1 - rates_L1
    return (branch_draws(len(rates_L1), seed, epoch, positions) < keep_L1) / keep_L1


def branch_draws(branches: int, seed: int, epoch: Tensor, positions: Tensor) -> Tensor:
    """A uniform number in [0, 1) for each residual branch and sample: `[2 L, B]`, in one pass over all draws."""
    draws_D = torch.arange((branches + 3) // 4, device=positions.device)
    u_DBU = rng.uniform(seed, epoch, positions, int(rng.Purpose.DROP_PATH), draws_D[:, None])
    return u_DBU.transpose(1, 2).flatten(0, 1)[:branches]


def kept_rows(drop_rates: Sequence[float]) -> Callable[..., list[Tensor | None]]:
    """Stochastic depth that skips work, to stand where `residual_scales` does: for each residual branch the rows of the
    batch that it is computed for, ascending, and None where that is all.

    Of each GROUP consecutive images the same number is left out, the rate to the nearest of 1 / GROUP: every step has
    the same shapes, and any number of processes whose shares are complete groups draws alike.
    """
    left_out = [min(GROUP - 1, round(GROUP * rate)) for rate in drop_rates]

    def rows(rates_L1: Tensor, seed: int, epoch: Tensor, positions: Tensor) -> list[Tensor | None]:
        u_LB = branch_draws(len(rates_L1), seed, epoch, positions)
        order_LNG = u_LB.unflatten(1, (-1, GROUP)).argsort(dim=-1, stable=True)
        first_N1 = torch.arange(0, len(positions), GROUP, device=positions.device)[:, None]
        kept = [
            order_NG[:, out:].sort(dim=-1).values + first_N1 for order_NG, out in zip(order_LNG, left_out, strict=True)
        ]
        return [rows_NR.flatten() if out else None for rows_NR, out in zip(kept, left_out, strict=True)]

    return rows
