"""What the backbones share: stochastic depth, token mixing, the isotropic trunk, timm's habits.

Shape suffixes: B batch, P patches (S: patches and the distillation token), C channels, H hidden, K classes, L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.errors import UserError

DropPathMask = Tensor | list[Tensor | None] | None
"""Stochastic depth of a pass: scales of all residual branches, or the kept images of each; see `add_branch`"""


class BackboneOutput(NamedTuple):
    """What `forward_taps` gives: all that a distillation module or a head can want from one pass."""

    features: list[Tensor]  # [B, P, C] each: the residual stream after the tapped blocks, before the final norm
    logits: Tensor  # [B, K]
    token: Tensor | None  # [B, C]: the extra distillation token after the final norm, when the backbone has one


class Mlp(nn.Module):
    """fc1, GELU, fc2 along the last dimension (timm's names)."""

    def __init__(self, dim: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out or dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(linear(x, self.fc1.weight, self.fc1.bias)))


def check_images(images: Tensor, channels: int = 0) -> None:
    """ValueError unless images are a float tensor `[B, channels, H, W]`; channels 0: any number."""
    fits = isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] == (channels or images.shape[1])
    if not fits or not images.is_floating_point():
        found = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images: must be normalised float [B, {channels or 'channels'}, H, W], not {found}")


def check_type(images: Tensor, dtype: torch.dtype) -> None:
    """ValueError unless images have the type of the weights, or autocast converts them."""
    if images.dtype != dtype and not torch.is_autocast_enabled(images.device.type):
        raise ValueError(f"images: are {images.dtype}, the weights {dtype}; convert them, or use torch.autocast")


def spread(parameter: Tensor, batch: int) -> Tensor:
    """`parameter` [1, ...], which is about to be broadcast over a batch: compiled, as a view [B, ...].

    Its gradient is then the sum over each image and, of these, over the batch. Inductor fuses the first one with what
    computed the gradient (that of GELU, or a layer norm); the sum over all at once reads it from memory again.
    """
    return parameter.expand(batch, *parameter.shape[1:]) if torch.compiler.is_compiling() else parameter


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear` before an activation: [B, ..., C] -> [B, ..., H]. Compiled, the bias is added with the activation."""
    if not torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    hidden = F.linear(x, weight)
    return hidden + spread(bias.to(hidden.dtype).view(*[1] * (x.dim() - 1), -1), x.shape[0])


def mix_tokens(weight_TS: Tensor, x_BSC: Tensor) -> Tensor:
    """Linear map along the tokens: weight [T, S] times x [B, S, C] -> [B, T, C].

    A batched product with the weight broadcast: activations are neither transposed nor copied. `torch.matmul` would
    fold the batch into the columns, which copies them, and `F.linear` on a transposed view copies them as well.
    """
    device = x_BSC.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # PyTorch knows no autocast for meta tensors
        # cast before the broadcast: autocast itself would write B copies of the weight
        weight_TS = weight_TS.to(torch.get_autocast_dtype(device))
    return torch.bmm(weight_TS.expand(x_BSC.shape[0], -1, -1), x_BSC)


def add_branch(x: Tensor, branch: Callable[[Tensor], Tensor], keep: Tensor | None) -> Tensor:
    """x + branch(x) in x's dtype, with stochastic depth.

    Args:
        keep: None adds the branch as it is; [B] with 0 or 1 / (1 - rate) scales it, image by image; integers [R] are
            the images for which it is computed at all, without repeats, and there it is scaled by B / R.
    """
    if keep is None:
        return (x + branch(x)).to(x.dtype)
    if keep.is_floating_point():
        scale = keep.view(-1, *(1,) * (x.dim() - 1))
        if torch.compiler.is_compiling():  # one kernel either way; this one's gradient of x has x's dtype throughout
            return x + (branch(x) * scale).to(x.dtype)
        return torch.addcmul(x, branch(x), scale).to(x.dtype)
    return x.index_add(0, keep, branch(x.index_select(0, keep)).to(x.dtype), alpha=x.shape[0] / keep.shape[0])


def check_drop_path(rate: float) -> float:
    if not 0.0 <= rate < 1.0:
        raise UserError(f"drop_path is {rate}: choose a rate from 0 up to, but not including, 1")
    return rate


class Backbone(nn.Module):
    """Base of all backbones: stochastic depth, classifier and feature calls under timm's names.

    A subclass adds `norm`, `head` and `feature_info`, and writes `_trunk` and `_maps`.
    """

    num_extra_tokens = 0  # learned tokens after the patches
    any_size = False  # whether images smaller than `image_size` can be seen too, their features brought to P patches
    norm: nn.Module
    head: nn.Module
    _drop_rates: Tensor
    feature_info: list[dict[str, Any]]  # timm's: module, num_chs, reduction of each feature map

    def __init__(
        self, num_classes: int, image_size: int, dim: int, patches: int, depth: int, drop_rates: Sequence[float]
    ) -> None:
        """
        Args:
            num_classes: K; 0 leaves the pooled features as logits.
            image_size: side of the square input in pixels.
            dim, patches: C and P of the tapped features.
            depth: number of blocks that can be tapped.
            drop_rates: stochastic depth, one rate for each residual branch, in order: two per block.
        """
        super().__init__()
        self.num_classes, self.image_size = num_classes, image_size
        self.dim, self.patches, self.depth = dim, patches, depth
        self.num_features = self.head_hidden_size = self.embed_dim = dim  # timm's names for it
        self.drop_rates = tuple(drop_rates)
        # on the device from the start, so that drawing makes no host copy; not part of the weights
        self.register_buffer("_drop_rates", torch.tensor(self.drop_rates)[:, None], persistent=False)

    def default_taps(self) -> tuple[int, ...]:
        """Blocks that feed the STD modules, counted from 1: at two thirds of the depth, and the last (METHOD.md 2); of
        a single block, that one."""
        return (2 * self.depth // 3, self.depth) if self.depth > 1 else (1,)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that must not decay, besides biases and everything one-dimensional."""
        return set()

    def _trunk(self, x: Tensor, taps: Sequence[int], keep: DropPathMask) -> tuple[Tensor, list[Tensor]]:
        """Images -> tokens after the last block, before the norm [B, S, C]; features [B, P, C] of the taps."""
        raise NotImplementedError

    def _keep(self, keep: DropPathMask, batch: int) -> DropPathMask:
        """Stochastic depth of this pass: the caller's, or scales of torch's own draw when training."""
        if keep is not None:
            if isinstance(keep, list):
                if len(keep) != len(self.drop_rates):
                    raise ValueError(
                        f"keep holds {len(keep)} entries, not one for each of {len(self.drop_rates)} branches"
                    )
            elif keep.shape != (len(self.drop_rates), batch):
                wanted = (len(self.drop_rates), batch)
                raise ValueError(f"keep is {tuple(keep.shape)}, not [residual branches, B] = {wanted}")
            return keep
        if not self.training or not any(self.drop_rates):
            return None
        rates = self._drop_rates
        uniform = torch.rand(len(self.drop_rates), batch, device=rates.device, dtype=rates.dtype)
        return (uniform >= rates) / (1 - rates)

    def _check_taps(self, taps: Sequence[int]) -> None:
        for tap in taps:
            if not 1 <= tap <= self.depth:
                raise UserError(f"taps: there is no block {tap}; choose from 1 to {self.depth}")

    def forward_taps(self, x: Tensor, taps: Sequence[int], keep: DropPathMask = None) -> BackboneOutput:
        """One pass that also hands out the features of some blocks.

        Args:
            x: images [B, 3, image_size, image_size], normalised.
            taps: block numbers from 1, in any order, repeats allowed.
            keep: stochastic depth, [residual branches, B] with 0 or 1 / (1 - rate), or for each branch the images that
                it is computed for (see `add_branch`); None draws from torch's generator when training and keeps every
                branch when evaluating.
        Raises:
            UserError: a tap that does not exist. ValueError: keep of another shape.
        """
        self._check_taps(taps)
        tokens, features = self._trunk(x, taps, self._keep(keep, x.shape[0]))
        tokens = self.norm(tokens)
        return BackboneOutput(features, self.forward_head(tokens), tokens[:, -1] if self.num_extra_tokens else None)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images -> tokens after the final norm [B, S, C]."""
        return self.norm(self._trunk(x, (), self._keep(None, x.shape[0]))[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens after the final norm [B, S, C] -> logits [B, K]; with `pre_logits` the patches' mean [B, C]."""
        if self.num_extra_tokens:
            x = x[:, : -self.num_extra_tokens]
        x = x.mean(1)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> class logits [B, K]."""
        return self.forward_head(self.forward_features(x))

    def _maps(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images -> tokens after the last block [B, S, C]; a feature map [B, h, w, C] for each of `feature_info`."""
        raise NotImplementedError

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps as timm gives them, counted from 0 (an isotropic model's blocks, a pyramid's stages).

        Args:
            indices: None for all, n for the last n, or a list in which negative numbers count from the end.
            norm: pass them through the final norm.
            output_fmt: "NCHW" gives [B, C, h, w], "NLC" gives [B, h * w, C].
            intermediates_only: leave out the tokens after the final norm [B, S, C], else they come first.
        Raises:
            UserError: an index or a format that does not exist, a norm that does not fit.
        """
        count = len(self.feature_info)
        if indices is None or isinstance(indices, int):
            indices = range(-(count if indices is None else indices), 0)
        if bad := [i for i in indices if not -count <= i < count]:
            raise UserError(f"indices: there is no feature map {bad[0]}; choose from {-count} to {count - 1}")
        if output_fmt not in ("NCHW", "NLC"):
            raise UserError(f"output_fmt {output_fmt!r}: choose 'NCHW' or 'NLC'")
        tokens, maps = self._maps(x)
        maps = [maps[i] for i in indices]
        if norm:
            if any(feature.shape[-1] != self.dim for feature in maps):
                raise UserError("norm: the final norm fits only the last stage's features; use norm=False or indices=1")
            maps = [self.norm(feature) for feature in maps]
        maps = [m.permute(0, 3, 1, 2) if output_fmt == "NCHW" else m.flatten(1, 2) for m in maps]
        return maps if intermediates_only else (self.norm(tokens), maps)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for `num_classes` classes, on the old one's device and in its dtype; 0 removes the head."""
        if global_pool not in (None, "avg"):
            raise UserError(f"global_pool {global_pool!r}: the patches are always averaged; use 'avg'")
        like = next(self.parameters())
        self.num_classes = num_classes
        self.head = make_head(self.dim, num_classes).to(device=like.device, dtype=like.dtype).train(self.training)


def make_head(dim: int, num_classes: int) -> nn.Module:
    if num_classes < 0:
        raise UserError(f"num_classes is {num_classes}: give the number of classes, or 0 for pooled features")
    return nn.Linear(dim, num_classes) if num_classes else nn.Identity()


class PatchStem(nn.Module):
    """Patch embedding without overlap: [B, 3, H, W] -> [B, P, C]. The weights are timm's convolution `stem.proj`."""

    def __init__(self, image_size: int, patch_size: int, dim: int) -> None:
        super().__init__()
        if patch_size < 1 or image_size < patch_size or image_size % patch_size:
            fit = max(image_size // max(patch_size, 1), 1) * patch_size
            raise UserError(f"image_size {image_size} is not a multiple of patch_size {patch_size}: use e.g. {fit}")
        self.image_size, self.patch_size = image_size, patch_size
        self.grid = image_size // patch_size
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (self.image_size, self.image_size):
            found = "x".join(map(str, x.shape[2:]))
            raise UserError(f"image_size: the model was built for {self.image_size} px, the images are {found}")
        # One product over full patches instead of a convolution: with channels-last images the gather below moves runs
        # of 3 * patch_size values, and the weight gradient is a plain product too (3 channels suit no convolution).
        size, weight = self.patch_size, self.proj.weight.permute(0, 2, 3, 1).flatten(1)
        x = x.permute(0, 2, 3, 1).reshape(-1, self.grid, size, self.grid, size * 3).transpose(2, 3)
        return F.linear(x.reshape(-1, self.grid * self.grid, size * size * 3), weight, self.proj.bias)


class Isotropic(Backbone):
    """Patch stem, L equal blocks, norm, mean over the patches, head (Mixer and ResMLP; timm's `MlpMixer` names)."""

    def __init__(
        self,
        num_classes: int,
        image_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        make_block: Callable[[int], nn.Module],
        norm: nn.Module,
        drop_path: float,
        distill_token: bool,
    ) -> None:
        """make_block: number of tokens S -> block with forward(x_BSC, keep_token_B, keep_channel_B)."""
        if depth < 1:
            raise UserError(f"depth is {depth}: choose 1 block or more")
        # the same rate in every block, as timm's MlpMixer and DeiT's ResMLP have it
        drop_rates = (check_drop_path(drop_path),) * (2 * depth)
        stem = PatchStem(image_size, patch_size, dim)
        super().__init__(num_classes, image_size, dim, stem.grid**2, depth, drop_rates)
        self.num_extra_tokens = int(distill_token)
        self.stem = stem
        if distill_token:
            self.distill_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.blocks = nn.ModuleList(make_block(self.patches + self.num_extra_tokens) for _ in range(depth))
        self.norm = norm
        self.head = make_head(dim, num_classes)
        self.feature_info = [dict(module=f"blocks.{i}", num_chs=dim, reduction=patch_size) for i in range(depth)]
        self._init_weights()

    def _init_weights(self) -> None:
        """timm's `mlp_mixer._init_weights`: Xavier for linear layers, LeCun normal for the stem, a zero head."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name == "head":
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.xavier_uniform_(module.weight)
                nn.init.normal_(module.bias, std=1e-6) if "mlp" in name else nn.init.zeros_(module.bias)
        # truncated at two deviations, and 0.8796 is the deviation of the truncated unit normal
        weight, bias = self.stem.proj.parameters()
        std = math.sqrt(1 / weight[0].numel()) / 0.87962566103423978
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(bias)

    def no_weight_decay(self) -> set[str]:
        return {"distill_token"} if self.num_extra_tokens else set()

    def _trunk(self, x: Tensor, taps: Sequence[int], keep: DropPathMask) -> tuple[Tensor, list[Tensor]]:
        x = self.stem(x)
        if self.num_extra_tokens:
            x = torch.cat([x, self.distill_token.expand(x.shape[0], -1, -1).to(x.dtype)], 1)
        tapped: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks):
            x = block(x, None, None) if keep is None else block(x, keep[2 * i], keep[2 * i + 1])
            if i + 1 in taps:
                tapped[i + 1] = x[:, : self.patches]
        return x, [tapped[tap] for tap in taps]

    def _maps(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        tokens, features = self._trunk(x, range(1, self.depth + 1), self._keep(None, x.shape[0]))
        return tokens, [z_BPC.unflatten(1, (self.stem.grid, self.stem.grid)) for z_BPC in features]
