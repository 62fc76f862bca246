"""The STD module: one spatial and one channel token per teacher, beside a backbone (METHOD.md section 2).

Source: Li et al., "Spatial-Channel Token Distillation for Vision MLPs", ICML 2022, section 3.
Shapes: B batch, P patches, C channels, K classes, M teachers that the module serves, S and H the hidden widths
of the spatial and the channel MLP.

The code below is the same function as the paper's concatenations (tests/unit/test_tokens.py holds that form), in an
order that never builds them: the spatial token row does not depend on the image, so its share of the first layer is a
bias [S, C]; the channel token is a rank-M term of the first layer, scaled by the shared layer norm of its patch (in
compiled code of rank M - 1: what is normalised adds up to 0, so one column follows from the others).
The channel MLP, by far the larger one, has two forms: operators that inductor fuses, and for uncompiled code
`channel_mlp`, which works through the batch in pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from std_fast.method.channel_mlp import channel_mlp
from std_fast.models.common import linear, mix_tokens, spread

TokenKind = Literal["both", "spatial", "channel", "none"]


class TokenOutput(NamedTuple):
    """Outputs of one STD module for a batch."""

    logits: Tensor  # [B, M, K], one row per teacher
    spatial: Tensor | None  # T_S' [B, M, C]
    channel: Tensor | None  # T_C' [B, M, P]


def at_least_float32(x: Tensor) -> Tensor:
    """bfloat16 and float16 as float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def few_outputs(hidden: Tensor, w_MH: Tensor, dim: int) -> Tensor:
    """`hidden`, multiplied along its dimension `dim` (H) by `w`, as M sums: `[B, M, ...]`, the other dimension last.

    For compiled code alone, where the sums fuse with the activation before them: neither it nor, on the way back, its
    gradient is written. M stands before the long dimension, also for the gradients of what is added to the sums:
    inductor of torch 2.11 writes past the end of such a sum in the other order (C++, tail of a vector).
    """
    shape = [1] * hidden.dim()
    shape[dim] = -1
    rows_MH = [w_H.view(shape) for w_H in w_MH.unbind()]
    if dim == hidden.dim() - 1:
        rows_MH = [spread(w_H, hidden.shape[0]) for w_H in rows_MH]
    return torch.stack([(hidden * w_H).sum(dim) for w_H in rows_MH], 1)


class STDModule(nn.Module):
    """Features `[B, P, C]` -> distillation logits `[B, M, K]`; gradients flow from it into the backbone.

    Args:
        dim: channels C of the features.
        patches: number of patches P of the features.
        num_classes: K.
        teachers: M, the number of teachers that learn from this module's tokens (the paper's best setting is 1).
        tokens: "both" (the paper), "spatial" or "channel" alone (its ablations), or "none": heads on the pooled,
            layer-normed features, which is distillation without tokens.
        spatial_hidden: S, by default C / 2.
        channel_hidden: H, by default 4 C.

    Raises:
        ValueError: a size that is not positive, or an unknown kind of token.
    """

    def __init__(
        self,
        dim: int,
        patches: int,
        num_classes: int,
        teachers: int = 1,
        tokens: TokenKind = "both",
        spatial_hidden: int | None = None,
        channel_hidden: int | None = None,
    ) -> None:
        super().__init__()
        if min(dim, patches, num_classes, teachers) < 1:
            raise ValueError(f"sizes must be positive: {dim=} {patches=} {num_classes=} {teachers=}")
        if tokens not in ("both", "spatial", "channel", "none"):
            raise ValueError(f"tokens must be both, spatial, channel or none, not {tokens!r}")
        self.dim, self.patches, self.num_classes = dim, patches, num_classes
        self.teachers, self.tokens = teachers, tokens
        width = 0
        if tokens in ("both", "spatial"):
            hidden = spatial_hidden or dim // 2
            self.token_s = nn.Parameter(torch.empty(teachers, dim))
            self.norm_s = nn.LayerNorm(dim)
            self.fc1_s = nn.Linear(patches + teachers, hidden)
            self.fc2_s = nn.Linear(hidden, teachers)
            width += dim
        if tokens in ("both", "channel"):
            hidden = channel_hidden or 4 * dim
            self.token_c = nn.Parameter(torch.empty(patches, teachers))
            self.norm_c = nn.LayerNorm(dim + teachers)
            self.fc1_c = nn.Linear(dim + teachers, hidden)
            self.fc2_c = nn.Linear(hidden, teachers)
            width += patches
        if tokens == "none":
            self.norm = nn.LayerNorm(dim)
            width = dim
        self.heads = nn.ModuleList(nn.Linear(width, num_classes) for _ in range(teachers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Tokens and heads from a truncated normal of deviation 0.02 (METHOD.md section 2), the MLPs by Xavier's rule.

        Xavier as in timm's Mixer: the paper is silent, and on the demo's task (C 64, one seed) a fixed deviation of
        0.02 reached 39 % where this reached 85 %, all else equal.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name.startswith("heads"):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name in ("token_s", "token_c"):
                nn.init.trunc_normal_(parameter, std=0.02)

    def spatial_token(self, z_BPC: Tensor) -> Tensor:
        """`T_S' = MLP_S(LN([Z ; T_S])) + T_S`, the MLP along the patches: `[B, P, C] -> [B, M, C]`."""
        P = self.patches
        w_SP, w_SM = self.fc1_s.weight[:, :P], self.fc1_s.weight[:, P:]
        bias_SC = w_SM @ self.norm_s(self.token_s) + self.fc1_s.bias[:, None]
        hidden_BSC = mix_tokens(w_SP, self._recomputed(self.norm_s, z_BPC))
        if torch.compiler.is_compiling():
            token_BMC = few_outputs(F.gelu(hidden_BSC + bias_SC), self.fc2_s.weight, 1)
        else:
            token_BMC = mix_tokens(self.fc2_s.weight, F.gelu(hidden_BSC + bias_SC.to(hidden_BSC.dtype)))
        return token_BMC + (self.fc2_s.bias[:, None] + self.token_s)

    def channel_token(self, z_BPC: Tensor) -> Tensor:
        """`T_C' = MLP_C(LN([Z , T_C])) + T_C`, the MLP along the channels: `[B, P, C] -> [B, M, P]`."""
        # a trace would keep the pieces of one batch size, and torch.func takes operators alone
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
            token_BMP = self._channel_mlp_to_compile(z_BPC)
        else:
            token_BPM = channel_mlp(z_BPC, self.token_c, self.norm_c, self.fc1_c, self.fc2_c.weight)
            token_BMP = token_BPM.transpose(1, 2)
        return token_BMP + (self.fc2_c.bias[:, None] + self.token_c.T)

    def _channel_mlp_to_compile(self, z_BPC: Tensor) -> Tensor:
        """What `channel_mlp` computes, `[B, P, C] -> [B, M, P]`, in operators that inductor fuses."""
        C = self.dim
        x_BPC, x_BPM = self._recomputed(self._normalised, z_BPC)
        w_HD = self.fc1_c.weight * self.norm_c.weight  # the norm's affine part belongs to the first layer
        bias_H = self.fc1_c.weight @ self.norm_c.bias + self.fc1_c.bias
        # a patch's C + M normalised values add up to 0: the first token is minus the sum of all others
        w_HD = w_HD - w_HD[:, C : C + 1]
        hidden_BPH = linear(x_BPC, w_HD[:, :C], bias_H)
        for m in range(1, self.teachers):  # an outer product, which fuses with what follows
            hidden_BPH = hidden_BPH + x_BPM[..., m : m + 1] * w_HD[:, C + m]
        return few_outputs(F.gelu(hidden_BPH), self.fc2_c.weight, 2)

    def _normalised(self, z_BPC: Tensor) -> tuple[Tensor, Tensor]:
        """Features and channel tokens after their common layer norm without affine part: `[B, P, C]`, `[B, P, M]`.

        At least in float32, as layer norm computes under autocast.
        """
        z_BPC, t_PM, width = at_least_float32(z_BPC), at_least_float32(self.token_c), self.dim + self.teachers
        mean_BP1 = (z_BPC.sum(-1, keepdim=True) + t_PM.sum(-1, keepdim=True)) / width
        z_BPC, t_BPM = z_BPC - mean_BP1, t_PM - mean_BP1
        square_BP1 = z_BPC.square().sum(-1, keepdim=True) + t_BPM.square().sum(-1, keepdim=True)
        scale_BP1 = torch.rsqrt(square_BP1 / width + self.norm_c.eps)
        return z_BPC * scale_BP1, t_BPM * scale_BP1

    def _recomputed(self, norm: Callable[[Tensor], Any], z_BPC: Tensor) -> Any:
        """`norm(z)`. Compiled, its backward pass computes it again from z, where inductor would keep it in float32."""
        if self.training and torch.compiler.is_compiling():
            return checkpoint(norm, z_BPC, use_reentrant=False)
        return norm(z_BPC)

    def forward(self, z_BPC: Tensor) -> TokenOutput:
        """Features `[B, P, C]` -> `TokenOutput`. Raises ValueError where P or C is not that of the module."""
        if not torch.jit.is_tracing() and z_BPC.shape[1:] != (self.patches, self.dim):
            raise ValueError(f"features {tuple(z_BPC.shape)} are not [B, patches={self.patches}, dim={self.dim}]")
        spatial = self.spatial_token(z_BPC) if self.tokens in ("both", "spatial") else None
        channel = self.channel_token(z_BPC) if self.tokens in ("both", "channel") else None
        parts = [part for part in (spatial, channel) if part is not None]
        if parts:
            read_BMD = torch.cat([part.to(parts[0].dtype) for part in parts], dim=-1)
        else:
            read_BMD = self.norm(z_BPC).mean(1, keepdim=True).expand(-1, self.teachers, -1)
        logits = torch.stack([head(read_BMD[:, m]) for m, head in enumerate(self.heads)], dim=1)
        return TokenOutput(logits, spatial, channel)
