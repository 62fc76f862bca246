"""The linear layers of a teacher in int8 or float8, by torchao (optional: nothing else needs it).

Weights are rounded once, activations at each call (one scale a row). Convolutions, norms and the last layer stay as
they are: on a GPU PyTorch has no low-precision convolutions, so a ResNet gains nothing and is refused; a Swin or ViT is
nearly all linear layers. How many hard labels still agree with float32 is measured by `std-fast bench teachers`.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from pipelines.errors import UserError
from std_fast.teachers.classifiers import last_layers

log = logging.getLogger("std_fast")

LOW = ("int8", "float8")
MULTIPLE = 16  # of a layer's two widths, for the products of both kinds


@torch.no_grad()
def quantize(model: nn.Module, precision: str, image: Tensor, where: str) -> int:
    """Quantizes a model in place; returns how many of its layers. Call it where the model will stay.

    Args:
        precision: one of `LOW`.
        image: `[1, 3, S, S]`, as the model takes it, on its device.
        where: the recipe's name of the teacher, for messages.

    Raises:
        UserError: no torchao, no GPU that knows float8, or a model without linear layers but its last.
    """
    place = f"{where}.precision"
    try:
        import torchao.quantization as ao
    except ImportError as error:
        raise UserError(f"{place}: {precision} needs torchao ({error}); pip install torchao") from None
    if precision == "float8" and not (image.is_cuda and torch.cuda.get_device_capability(image.device) >= (8, 9)):
        raise UserError(f"{place}: float8 needs a GPU of compute capability 8.9 or more; set it to int8 or auto")
    last = last_layers(model)
    called: set[nn.Module] = set()  # some models use a layer's weight themselves
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and not any(module is head for head in last)
        and module.in_features % MULTIPLE == module.out_features % MULTIPLE == 0
    }
    hooks = [m.register_forward_pre_hook(lambda module, _: called.add(module)) for m in layers.values()]
    try:
        before = model(image)
    finally:
        for hook in hooks:
            hook.remove()
    chosen = {name for name, module in layers.items() if module in called}
    if not chosen:
        raise UserError(
            f"{place}: {precision} is for linear layers, and this model has none but its last; set it to auto"
        )
    if precision == "int8":
        config = ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    else:
        config = ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow(), set_inductor_config=False)
    ao.quantize_(model, config, filter_fn=lambda _, name: name in chosen)
    off = ((model(image) - before).norm() / before.norm()).item()
    log.info("%s: %d linear layers in %s, logits of noise off by %.1e", where, len(chosen), precision, off)
    return len(chosen)
