"""MLP-Mixer (Tolstikhin et al. 2021), weight for weight timm's `MlpMixer`.

Shape suffixes: B batch, S tokens (patches and, when there is one, the distillation token), C channels, H hidden.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from std_fast.models.common import Isotropic, Mlp, add_branch, mix_tokens, spread


class TokenMlp(Mlp):
    """The MLP along the tokens: [B, S, C] -> [B, S, C]; fc1 is [H, S], fc2 is [S, H] as in timm."""

    def forward(self, x_BSC: Tensor) -> Tensor:
        hidden_BHC = mix_tokens(self.fc1.weight, x_BSC)
        # biases take the product's dtype: under autocast a float32 bias would widen the activations
        hidden_BHC = F.gelu(hidden_BHC + spread(self.fc1.bias[None, :, None].to(hidden_BHC.dtype), x_BSC.shape[0]))
        out_BSC = mix_tokens(self.fc2.weight, hidden_BHC)
        return out_BSC + spread(self.fc2.bias[None, :, None].to(out_BSC.dtype), x_BSC.shape[0])


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, dim: int, token_dim: int, channel_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp_tokens = TokenMlp(tokens, token_dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp_channels = Mlp(dim, channel_dim)

    def forward(self, x_BSC: Tensor, keep_tokens: Tensor | None, keep_channels: Tensor | None) -> Tensor:
        x_BSC = add_branch(x_BSC, lambda x_BSC: self.mlp_tokens(self.norm1(x_BSC)), keep_tokens)
        return add_branch(x_BSC, lambda x_BSC: self.mlp_channels(self.norm2(x_BSC)), keep_channels)


class Mixer(Isotropic):
    """Mixer of any size. Weights go to and from timm's `MlpMixer` of the same shape through `load_state_dict`.

    Args:
        num_classes, image_size: classes K; side of the square input in pixels, a multiple of `patch_size`.
        patch_size, dim, depth: patch side in pixels, channels C, blocks L.
        token_dim, channel_dim: hidden widths of the two MLPs; 0 takes timm's ratios, dim / 2 and 4 * dim.
        drop_path: stochastic depth rate, the same for every residual branch, as in timm.
        distill_token: one learned token after the patches, mixed with them in every block (DeiT's token for an MLP).
    Raises:
        UserError: sizes that do not fit together.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        image_size: int = 224,
        *,
        patch_size: int = 16,
        dim: int = 512,
        depth: int = 8,
        token_dim: int = 0,
        channel_dim: int = 0,
        drop_path: float = 0.0,
        distill_token: bool = False,
    ) -> None:
        super().__init__(
            num_classes, image_size, patch_size, dim, depth,
            lambda tokens: MixerBlock(tokens, dim, token_dim or dim // 2, channel_dim or 4 * dim),
            nn.LayerNorm(dim, eps=1e-6), drop_path, distill_token,
        )  # fmt: skip
