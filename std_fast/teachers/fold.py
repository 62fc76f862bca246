"""Batch norms of a frozen network, folded into the convolutions and linear layers before them.

One forward pass observes which layer each batch norm follows, so that any model can be folded, however it is written;
a second pass checks that the logits are the same. Shapes: B batch, C channels, K classes.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

log = logging.getLogger("std_fast")
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}  # of the largest logit; rounding stays hundreds of times below


def fold_batch_norms(model: nn.Module, image_size: int = 224) -> int:
    """Folds, in place, each batch norm whose input is the untouched output of a convolution or linear layer.

    With running mean m, variance v, weight g and bias b the norm is `y -> (y - m) g / sqrt(v + eps) + b`: a factor and
    a shift per channel, which the layer's own weight and bias take over (computed in float64, then rounded once). An
    activation that the norm carries (timm's BatchNormAct2d) stays in its place. The model is left in evaluation mode.

    Not folded, because it would not be the same function: norms that use the statistics of the batch, layers that
    compute their weight (weight standardisation, parametrisations) or run more than once, and norms after anything
    else (a sum, a concatenation, another norm).

    Args:
        model: images `[B, 3, S, S]` -> logits `[B, K]`, in float32 or float64.
        image_size: side S of the random image of the check.

    Returns:
        How many were folded. If the logits of the random image differ afterwards, everything is restored, with a
        warning, and the number is 0.
    """
    model.eval()
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return 0
    like = next(model.parameters())
    image = random_image(image_size).to(like)
    with torch.no_grad():
        pairs, before = _observe(model, image)
        names = {module: name for name, module in model.named_modules()}
        kept = [(layer, layer.weight, layer.bias, norm) for layer, norm in pairs]
        for layer, norm in pairs:
            _fold(layer, norm)
            model.set_submodule(names[norm], getattr(norm, "act", nn.Identity()))
        after = model(image)
    difference = (after - before).abs().max() / before.abs().max().clamp_min(1e-30)
    if not difference <= TOLERANCE[like.dtype]:  # NaN included
        for layer, weight, bias, norm in kept:
            layer.weight, layer.bias = weight, bias
            model.set_submodule(names[norm], norm)
        log.warning("batch norms stay as they are: folded, the logits differ by %.1e of the largest", float(difference))
        return 0
    return len(pairs)


def random_image(image_size: int) -> Tensor:
    """Normal noise `[1, 3, S, S]`, always the same, on which a model can be tried."""
    return torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))


def _observe(model: nn.Module, image: Tensor) -> tuple[list[tuple[Any, Any]], Tensor]:
    """One forward pass: the pairs (layer, norm) that can be folded, and the model's logits."""
    from timm.layers import BatchNormAct2d, Conv2dSame

    # Exact types: a subclass may compute its weight from what it stores, or do more to its input.
    layers = (nn.Conv2d, nn.Linear, Conv2dSame)
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d)
    calls: Counter[nn.Module] = Counter()
    found: dict[nn.Module, nn.Module] = {}

    def after_layer(layer: nn.Module, _inputs: tuple, output: Tensor) -> None:
        calls[layer] += 1
        # on the tensor itself, so that it lives as long; an in-place operation raises the version
        output.made_by = layer, output._version  # type: ignore[attr-defined]

    def before_norm(norm: nn.Module, inputs: tuple) -> None:
        calls[norm] += 1
        layer, version = getattr(inputs[0], "made_by", (None, None))
        if layer is None or inputs[0]._version != version or norm.running_mean is None:
            return
        if not isinstance(layer, nn.Linear) or inputs[0].ndim == 2:  # otherwise the norm's channels are not the layer's
            found[norm] = layer

    hooks = [m.register_forward_hook(after_layer) for m in model.modules() if type(m) in layers]
    hooks += [m.register_forward_pre_hook(before_norm) for m in model.modules() if type(m) in norms]
    try:
        logits = model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return [(layer, norm) for norm, layer in found.items() if calls[layer] == calls[norm] == 1], logits


def _fold(layer: Any, norm: Any) -> None:
    """Gives the layer new parameters that include the norm; the old tensors are left as they are."""
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double()
    if layer.bias is not None:
        shift = shift + layer.bias.double()
    factor = factor * norm.weight.double() if norm.affine else factor
    shift = shift * factor + (norm.bias.double() if norm.affine else 0.0)
    old = layer.weight
    weight = old.double() * factor.view(-1, *[1] * (old.ndim - 1))
    layer.weight = nn.Parameter(weight.to(old.dtype), requires_grad=old.requires_grad)
    layer.bias = nn.Parameter(shift.to(old.dtype), requires_grad=old.requires_grad)
