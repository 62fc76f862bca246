"""Arithmetic of a model, counted without running it."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_macs(model: nn.Module, image_size: int) -> int:
    """Multiply-accumulates of one evaluation forward for one image [1, 3, image_size, image_size].

    Counts matrix products and convolutions by their shapes (torch.utils.flop_counter, two operations each) on the meta
    device, so no arithmetic is done and the weights are not touched. Elementwise work and norms are not counted, as in
    the published GMACs of vision models.
    """
    meta = {name: torch.empty_like(t, device="meta") for name, t in model.state_dict(keep_vars=True).items()}
    meta |= {name: torch.empty_like(t, device="meta") for name, t in model.named_buffers()}
    image = torch.empty(1, 3, image_size, image_size, device="meta", dtype=next(model.parameters()).dtype)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            torch.func.functional_call(model, meta, (image,))
    finally:
        model.train(training)
    return counter.get_total_flops() // 2
