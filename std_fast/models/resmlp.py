"""ResMLP (Touvron et al. 2021), weight for weight timm's `MlpMixer` with `ResBlock`.

Shape suffixes: B batch, S tokens (patches and, when there is one, the distillation token), C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from std_fast.models.common import Isotropic, Mlp, add_branch, linear, mix_tokens


class Affine(nn.Module):
    """ResMLP's norm: alpha * x + beta, one pair for each channel, kept as [1, 1, C] as in timm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, dim))

    def forward(self, x_BSC: Tensor) -> Tensor:
        return torch.addcmul(self.beta, self.alpha, x_BSC).to(x_BSC.dtype)


class ResMlpBlock(nn.Module):
    """x + ls1 * tokens(norm1(x)), then x + ls2 * channels(norm2(x)).

    The affine norms and the layer scales are linear maps of the channels next to other linear maps, so they are folded
    into those. Both products read the residual stream as it is, and the gradients of norm2 and ls2 come from
    weight-sized arrays instead of sums over the activations.
    """

    def __init__(self, tokens: int, dim: int, channel_dim: int, layer_scale: float) -> None:
        super().__init__()
        self.ls1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.ls2 = nn.Parameter(torch.full((dim,), layer_scale))
        self.norm1 = Affine(dim)
        self.linear_tokens = nn.Linear(tokens, tokens)
        self.norm2 = Affine(dim)
        self.mlp_channels = Mlp(dim, channel_dim)

    def forward(self, x_BSC: Tensor, keep_tokens: Tensor | None, keep_channels: Tensor | None) -> Tensor:
        # W (alpha x + beta) + b = alpha (W x) + (row sums of W) beta + b, as alpha and beta act along C and W along S
        weight_SS = self.linear_tokens.weight
        shift_SC = torch.outer(weight_SS.sum(1), self.ls1 * self.norm1.beta.flatten())
        shift_SC = shift_SC + torch.outer(self.linear_tokens.bias, self.ls1)
        scale_C = self.ls1 * self.norm1.alpha
        x_BSC = add_branch(
            x_BSC, lambda x_BSC: torch.addcmul(shift_SC, scale_C, mix_tokens(weight_SS, x_BSC)), keep_tokens
        )

        fc1, fc2 = self.mlp_channels.fc1, self.mlp_channels.fc2
        bias1 = fc1.bias + torch.mv(fc1.weight, self.norm2.beta.flatten())

        def channels(x_BSC: Tensor) -> Tensor:
            hidden = F.gelu(linear(x_BSC, fc1.weight * self.norm2.alpha[0], bias1))
            return F.linear(hidden, self.ls2[:, None] * fc2.weight, self.ls2 * fc2.bias)

        return add_branch(x_BSC, channels, keep_channels)


class ResMlp(Isotropic):
    """ResMLP of any size. Weights go to and from timm's `resmlp_*` of the same shape through `load_state_dict`.

    Args:
        num_classes, image_size: classes K; side of the square input in pixels, a multiple of `patch_size`.
        patch_size, dim, depth: patch side in pixels, channels C, blocks L.
        channel_dim: hidden width of the channel MLP; 0 takes 4 * dim.
        layer_scale: start value of ls1 and ls2.
        drop_path: stochastic depth rate, the same for every residual branch, as in timm and in the first release.
        distill_token: one learned token after the patches, mixed with them in every block (DeiT's token for an MLP).
    Raises:
        UserError: sizes that do not fit together.
    """

    inductor_settings = {"triton.mix_order_reduction": False}
    """with it, torch 2.11 returned a gradient [C] for the last norm's [1, 1, C] (ResMLP-B24, STD, batch 64 and more)"""

    def __init__(
        self,
        num_classes: int = 1000,
        image_size: int = 224,
        *,
        patch_size: int = 16,
        dim: int = 384,
        depth: int = 12,
        channel_dim: int = 0,
        layer_scale: float = 1e-4,
        drop_path: float = 0.0,
        distill_token: bool = False,
    ) -> None:
        super().__init__(
            num_classes, image_size, patch_size, dim, depth,
            lambda tokens: ResMlpBlock(tokens, dim, channel_dim or 4 * dim, layer_scale),
            Affine(dim), drop_path, distill_token,
        )  # fmt: skip

    def no_weight_decay(self) -> set[str]:
        # alpha and beta are [1, 1, C]: a rule that spares one-dimensional parameters would miss them
        affine = {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in ("alpha", "beta")}
        return super().no_weight_decay() | affine
