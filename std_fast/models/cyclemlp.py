"""CycleMLP (Chen et al. 2022), name for name the public release (github.com/ShoufaChen/CycleMLP, `cycle_mlp.py`).

Shape suffixes: B batch, H rows, W columns, C channels (activations are [B, H, W, C] throughout), P = H * W patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.errors import UserError
from std_fast.models.common import Backbone, DropPathMask, Mlp, add_branch, check_drop_path, make_head


def cycle_shift(x_BHWC: Tensor, dim: int) -> Tensor:
    """Channel c reads its neighbour at ((c + 1) mod 3) - 1 along dimension `dim` (1 rows, 2 columns), zero outside.

    Written with shifts of entire arrays and a choice by channel: `torch.compile` makes one kernel of it, each way.
    """
    step_C = (torch.arange(x_BHWC.shape[-1], device=x_BHWC.device) + 1) % 3
    length, ahead = x_BHWC.shape[dim], (0, 0) * (3 - dim)
    following = F.pad(x_BHWC.narrow(dim, 1, length - 1), (*ahead, 0, 1))
    previous = F.pad(x_BHWC.narrow(dim, 0, length - 1), (*ahead, 1, 0))
    return torch.where(step_C == 2, following, torch.where(step_C == 0, previous, x_BHWC))


class CycleFC(nn.Module):
    """Linear layer over channels of which each reads a fixed neighbour (the release's `CycleFC`, there a deformable
    convolution): kernel (1, 3) shifts along columns, kernel (3, 1) along rows. [B, H, W, C] -> [B, H, W, C]."""

    def __init__(self, dim: int, kernel: tuple[int, int]) -> None:
        super().__init__()
        self.axis = {(1, 3): 2, (3, 1): 1}[kernel]
        self.weight = nn.Parameter(torch.empty(dim, dim, 1, 1))  # a 1x1 convolution's shape, as released
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return F.linear(cycle_shift(x_BHWC, self.axis), self.weight.flatten(1), self.bias)

    def released_offset(self) -> Tensor:
        """The release's constant buffer `offset`: (row, column) of each channel, [1, 2 * C, 1, 1]."""
        step_C = (torch.arange(self.weight.shape[1]) + 1) % 3 - 1.0
        zero_C = torch.zeros_like(step_C)
        pairs = (step_C, zero_C) if self.axis == 1 else (zero_C, step_C)
        return torch.stack(pairs, 1).view(1, -1, 1, 1)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Accept the release's buffer when it says what this layer does anyway, and refuse it when it does not."""
        offset = state_dict.pop(prefix + "offset", None)
        if offset is not None and not torch.equal(offset.cpu().float(), self.released_offset()):
            error_messages = args[-1]
            error_messages.append(f"{prefix}offset differs from CycleMLP's fixed offsets: weights of another model")
        super()._load_from_state_dict(state_dict, prefix, *args)


class CycleMixing(nn.Module):
    """Three projections (along columns, along rows, in place), blended for each image and channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp_c = nn.Linear(dim, dim, bias=False)
        self.sfc_h = CycleFC(dim, (1, 3))
        self.sfc_w = CycleFC(dim, (3, 1))
        self.reweight = Mlp(dim, dim // 4, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        h, w, c = self.sfc_h(x_BHWC), self.sfc_w(x_BHWC), self.mlp_c(x_BHWC)
        blend = self.reweight((h + w + c).mean((1, 2))).unflatten(1, (1, 1, -1, 3)).softmax(-1).to(h.dtype)
        return self.proj(h * blend[..., 0] + w * blend[..., 1] + c * blend[..., 2])


class CycleBlock(nn.Module):
    def __init__(self, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = CycleMixing(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x_BHWC: Tensor, keep_space: Tensor | None, keep_channels: Tensor | None) -> Tensor:
        x_BHWC = add_branch(x_BHWC, lambda x_BHWC: self.attn(self.norm1(x_BHWC)), keep_space)
        return add_branch(x_BHWC, lambda x_BHWC: self.mlp(self.norm2(x_BHWC)), keep_channels)


class ConvEmbed(nn.Module):
    """Overlapping convolution between channels-last arrays: [B, H, W, C_in] -> [B, H / stride, W / stride, C_out]."""

    def __init__(self, dim_in: int, dim_out: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim_in, dim_out, kernel, stride=stride, padding=(kernel - stride + 1) // 2)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        # permuted views of a channels-last array: nothing is copied on the way in or out
        return self.proj(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class CycleMlp(Backbone):
    """CycleMLP of any size, for images of any size; taps count the blocks of the last stage.

    From images of another size than `image_size` the tapped features are brought to the same P patches, bilinearly.

    Args:
        num_classes: classes K.
        image_size: side in pixels of the images whose features are tapped; it fixes `patches`, not the weights.
        layers, embed_dims, mlp_ratios: blocks, channels and channel-MLP widening of each stage.
        stem_stride: 4 as published; 1 or 2 keeps small images (32 px) from shrinking to nothing.
        drop_path: stochastic depth rate of the last block; it rises linearly from 0, as in the release.
    Raises:
        UserError: stages that do not fit together, an image too small for them.
    """

    any_size = True

    def __init__(
        self,
        num_classes: int = 1000,
        image_size: int = 224,
        *,
        layers: Sequence[int] = (2, 2, 4, 2),
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        stem_stride: int = 4,
        drop_path: float = 0.0,
    ) -> None:
        if not len(layers) == len(embed_dims) == len(mlp_ratios) > 0 or min(layers) < 1:
            raise UserError(
                f"layers {list(layers)}, embed_dims {list(embed_dims)}, mlp_ratios {list(mlp_ratios)}: "
                "give one value of each per stage, and at least one block"
            )
        if stem_stride not in (1, 2, 4):
            raise UserError(f"stem_stride is {stem_stride}: choose 4 as published, or 2 or 1 for small images")
        side = (image_size + 2 * ((8 - stem_stride) // 2) - 7) // stem_stride + 1
        if side < 1:
            raise UserError(f"image_size {image_size} leaves nothing after the stem: use larger images")
        for _ in layers[1:]:
            side = (side + 1) // 2
        blocks = sum(layers)
        last = check_drop_path(drop_path)
        drop_rates = [last * i / max(blocks - 1, 1) for i in range(blocks) for _ in range(2)]
        super().__init__(num_classes, image_size, embed_dims[-1], side * side, layers[-1], drop_rates)
        self.side = side  # of the last stage's map

        self.patch_embed = ConvEmbed(3, embed_dims[0], 7, stem_stride)
        self.network = nn.ModuleList()
        self.feature_info = []
        for stage, (count, dim, ratio) in enumerate(zip(layers, embed_dims, mlp_ratios, strict=True)):
            if stage:
                self.network.append(ConvEmbed(embed_dims[stage - 1], dim, 3, 2))
            self.feature_info.append(dict(module=f"network.{2 * stage}", num_chs=dim, reduction=stem_stride * 2**stage))
            self.network.append(nn.ModuleList(CycleBlock(dim, ratio) for _ in range(count)))
        self.norm = nn.LayerNorm(self.dim)
        self.head = make_head(self.dim, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Linear, CycleFC)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _stages(self, x: Tensor, taps: Sequence[int], keep: DropPathMask) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Images -> the output of each stage [B, H, W, C], and of the tapped blocks of the last stage."""
        x = self.patch_embed(x.permute(0, 2, 3, 1).contiguous())
        outputs: list[Tensor] = []
        tapped: dict[int, Tensor] = {}
        branch = 0
        for index, stage in enumerate(self.network):
            if index % 2:  # stages at even places, what joins them at odd ones
                x = stage(x)
                continue
            for number, block in enumerate(cast(nn.ModuleList, stage), 1):
                x = block(x, None, None) if keep is None else block(x, keep[branch], keep[branch + 1])
                branch += 2
                if index == len(self.network) - 1 and number in taps:
                    tapped[number] = x
            outputs.append(x)
        return outputs, tapped

    def _trunk(self, x: Tensor, taps: Sequence[int], keep: DropPathMask) -> tuple[Tensor, list[Tensor]]:
        outputs, tapped = self._stages(x, taps, keep)
        return outputs[-1].flatten(1, 2), [self._fitted(tapped[tap]).flatten(1, 2) for tap in taps]

    def _fitted(self, z_BHWC: Tensor) -> Tensor:
        """A map of the last stage with the sides that the STD modules are made for."""
        if z_BHWC.shape[1:3] == (self.side, self.side):
            return z_BHWC
        z_BCHW = F.interpolate(z_BHWC.permute(0, 3, 1, 2), (self.side, self.side), mode="bilinear")
        return z_BCHW.permute(0, 2, 3, 1)

    def _maps(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        outputs, _ = self._stages(x, (), self._keep(None, x.shape[0]))
        return outputs[-1].flatten(1, 2), outputs
