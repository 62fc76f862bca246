"""The channel MLP of an STD module for uncompiled code: layer norm, both layers and their gradients, in pieces.

Run operator by operator, this MLP costs far more time than its arithmetic: its hidden activations [B, P, 4C] are four
times as large as the features, and GELU, the second layer (M outputs only) and their gradients each write or read them.
Here the batch is worked through in pieces, so that what one operator wrote is still in the cache for the next one. Only
the hidden activations before GELU are stored for the backward pass; GELU is computed a second time there, which is
cheaper than storing its result. Compiled code does not come here: inductor fuses these operators itself.

Shapes: B batch, P patches, C channels, M teachers, H hidden width, D = C + M; N = rows of a piece (images x P).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 1024
"""patches in a piece on a CPU: enough for the matrix products, and few enough for the cache where C is small"""


def channel_mlp(
    z_BPC: Tensor, t_PM: Tensor, norm: torch.nn.LayerNorm, fc1: torch.nn.Linear, weight2_MH: Tensor
) -> Tensor:
    """`fc2(gelu(fc1(norm([z , t]))))` without the bias of fc2: `[B, P, C]` and `[P, M]` -> `[B, P, M]`.

    The layer norm is computed in float32 at least; the products in autocast's dtype where autocast is on.
    """
    device = z_BPC.device.type
    low = device != "meta" and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if low else fc1.weight.dtype
    weights = (norm.weight, norm.bias, fc1.weight, fc1.bias, weight2_MH)
    return _ChannelMlp.apply(z_BPC, t_PM, *weights, norm.eps, dtype, torch.is_grad_enabled())


class _ChannelMlp(torch.autograd.Function):
    """The norm's weight and bias belong to the first layer: `W (gamma x + beta) + b = (W gamma) x + (W beta + b)`."""

    @staticmethod
    def forward(
        ctx: Any, z_BPC: Tensor, t_PM: Tensor, gamma_D: Tensor, beta_D: Tensor, w1_HD: Tensor, b1_H: Tensor,
        w2_MH: Tensor, eps: float, dtype: torch.dtype, differentiable: bool,
    ) -> Tensor:  # fmt: skip
        B, P, C = z_BPC.shape
        H, D = w1_HD.shape
        folded_HD, bias_H = (w1_HD * gamma_D).to(dtype), torch.addmv(b1_H, w1_HD, beta_D).to(dtype)
        second_MH = w2_MH.to(dtype)
        images = images_of_a_piece(z_BPC)
        stored = B if differentiable else images
        x_BPD = z_BPC.new_empty(stored, P, D, dtype=torch.promote_types(z_BPC.dtype, torch.float32))
        scale_BP1 = x_BPD.new_empty(stored, P, 1)
        hidden_BPH = z_BPC.new_empty(stored, P, H, dtype=dtype)
        active_NH = hidden_BPH.new_empty(images * P, H)
        out_BPM = hidden_BPH.new_empty(B, P, D - C)
        sum_P1 = t_PM.sum(-1, keepdim=True)
        for start in range(0, B, images):
            z, out_NM = z_BPC[start : start + images], out_BPM[start : start + images].flatten(0, 1)
            place = slice(start, start + len(z)) if differentiable else slice(0, len(z))
            x, scale, hidden_NH = x_BPD[place], scale_BP1[place], hidden_BPH[place].flatten(0, 1)
            active = active_NH[: len(hidden_NH)]
            mean = (z.sum(-1, keepdim=True, dtype=x.dtype) + sum_P1) / D
            torch.sub(z, mean, out=x[..., :C])
            torch.sub(t_PM, mean, out=x[..., C:])
            torch.linalg.vector_norm(x, dim=-1, keepdim=True, out=scale)
            x *= scale.square_().div_(D).add_(eps).rsqrt_()
            torch.addmm(bias_H, x.flatten(0, 1).to(dtype), folded_HD.T, out=hidden_NH)
            torch.ops.aten.gelu.out(hidden_NH, out=active)
            torch.mm(active, second_MH.T, out=out_NM)
        if differentiable:
            ctx.save_for_backward(x_BPD, scale_BP1, hidden_BPH, gamma_D, beta_D, w1_HD, folded_HD, second_MH)
            ctx.dtypes = z_BPC.dtype, t_PM.dtype
        return out_BPM

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BPM: Tensor) -> tuple[Tensor | None, ...]:
        x_BPD, scale_BP1, hidden_BPH, gamma_D, beta_D, w1_HD, folded_HD, second_MH = ctx.saved_tensors
        B, P, D = x_BPD.shape
        M, H = second_MH.shape
        C, dtype, images = D - M, hidden_BPH.dtype, images_of_a_piece(x_BPD)
        grad_BPM = grad_BPM.to(dtype).contiguous()
        zeros = x_BPD.new_zeros
        dz_BPC, dt_BPM = x_BPD.new_empty(B, P, C, dtype=ctx.dtypes[0]), x_BPD.new_empty(B, P, M)
        d1_DH, db_H, d2_MH = zeros(D, H), zeros(H), zeros(M, H)
        last_HM = folded_HD[:, C:].contiguous()  # torch 2.8's products with one strided column of bfloat16 are wrong
        work_NH, dx_ND = hidden_BPH.new_empty(images * P, H), hidden_BPH.new_empty(images * P, D)
        for start in range(0, B, images):
            part = slice(start, start + images)
            x, hidden, grad = (full[part].flatten(0, 1) for full in (x_BPD, hidden_BPH, grad_BPM))
            work, dx = work_NH[: len(x)], dx_ND[: len(x)]
            torch.ops.aten.gelu.out(hidden, out=work)
            d2_MH += grad.T @ work
            torch.mm(grad, second_MH, out=work)
            torch.ops.aten.gelu_backward.grad_input(work, hidden, grad_input=work)
            db_H += work.sum(0)
            d1_DH += x.to(dtype).T @ work
            # one product of C + M columns would be slower: C is a multiple of a vector's length, C + M is not
            torch.mm(work, folded_HD[:, :C], out=dx[:, :C])
            dx[:, C:] = work @ last_HM
            # through the normalisation: scale * (dx - mean(dx) - x * mean(dx * x))
            d = dx.to(x.dtype)
            mean, along = d.sum(-1, keepdim=True) / D, (d * x).sum(-1, keepdim=True) / D
            d = d.sub_(mean).addcmul_(x, along, value=-1).unflatten(0, (-1, P))
            torch.mul(d[..., :C], scale_BP1[part], out=dz_BPC[part])
            torch.mul(d[..., C:], scale_BP1[part], out=dt_BPM[part])
        dw_HD = d1_DH.T
        d_gamma, d_beta = (dw_HD * w1_HD).sum(0), w1_HD.T.to(db_H.dtype) @ db_H
        dw_HD = (dw_HD * gamma_D).addr_(db_H, beta_D)
        return dz_BPC, dt_BPM.sum(0), d_gamma, d_beta, dw_HD, db_H, d2_MH, None, None, None


def images_of_a_piece(x_BPC: Tensor) -> int:
    """Images that are worked through together: about ROWS patches on a CPU, else the batch (fewer kernel launches)."""
    B, P = x_BPC.shape[:2]
    return max(1, min(B, ROWS // P) if x_BPC.device.type == "cpu" else B)
