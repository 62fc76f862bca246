"""Backbones by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pipelines.errors import UserError, did_you_mean
from std_fast.models.common import Backbone, BackboneOutput
from std_fast.models.cyclemlp import CycleMlp
from std_fast.models.mixer import Mixer
from std_fast.models.resmlp import ResMlp

__all__ = ["BACKBONES", "Backbone", "BackboneOutput", "build_backbone", "list_backbones"]

BACKBONES: dict[str, Callable[..., Backbone]] = {
    "mixer": Mixer,
    "mixer_s16": partial(Mixer, patch_size=16, dim=512, depth=8, token_dim=256, channel_dim=2048),
    "mixer_b16": partial(Mixer, patch_size=16, dim=768, depth=12, token_dim=384, channel_dim=3072),
    "resmlp": ResMlp,
    "resmlp_s12": partial(ResMlp, patch_size=16, dim=384, depth=12, layer_scale=1e-4),
    "resmlp_s24": partial(ResMlp, patch_size=16, dim=384, depth=24, layer_scale=1e-5),
    "resmlp_b24": partial(ResMlp, patch_size=16, dim=768, depth=24, layer_scale=1e-6),
    "cyclemlp": CycleMlp,
    "cyclemlp_b1": partial(CycleMlp, layers=(2, 2, 4, 2), embed_dims=(64, 128, 320, 512), mlp_ratios=(4, 4, 4, 4)),
    "cyclemlp_b2": partial(CycleMlp, layers=(2, 3, 10, 3), embed_dims=(64, 128, 320, 512), mlp_ratios=(4, 4, 4, 4)),
    "cyclemlp_b3": partial(CycleMlp, layers=(3, 4, 18, 3), embed_dims=(64, 128, 320, 512), mlp_ratios=(8, 8, 4, 4)),
    "cyclemlp_b4": partial(CycleMlp, layers=(3, 8, 27, 3), embed_dims=(64, 128, 320, 512), mlp_ratios=(8, 8, 4, 4)),
    "cyclemlp_b5": partial(CycleMlp, layers=(3, 4, 24, 3), embed_dims=(96, 192, 384, 768), mlp_ratios=(4, 4, 4, 4)),
}


def list_backbones() -> list[str]:
    return sorted(BACKBONES)


def build_backbone(name: str, num_classes: int, image_size: int, drop_path: float = 0.0, **options: Any) -> Backbone:
    """A backbone with fresh weights.

    Args:
        name: a key of BACKBONES.
        num_classes, image_size: classes; side of the square input in pixels.
        drop_path: stochastic depth rate, shared out over depth as the family's first implementation does.
        options: the family's own (`patch_size`, `dim`, `depth`, `distill_token`, ...); they override a named size.
    Raises:
        UserError: unknown name or option, a value that is none of its kind, sizes that do not fit together.
    """
    if not isinstance(name, str) or name not in BACKBONES:
        raise UserError(
            f"unknown backbone {name!r}{did_you_mean(str(name), BACKBONES)} (known: {', '.join(list_backbones())})"
        )
    builder = BACKBONES[name]
    known = set(inspect.signature(builder).parameters) - {"num_classes", "image_size", "drop_path"}
    for option, value in options.items():
        if option not in known:
            hint = did_you_mean(option, known)
            raise UserError(f"{name} has no option {option!r}{hint} (it has: {', '.join(sorted(known))})")
        _check_option(name, option, value, inspect.signature(builder).parameters[option].default)
    return builder(num_classes, image_size, drop_path=drop_path, **options)


def _check_option(name: str, option: str, value: Any, default: Any) -> None:
    """UserError unless the value is of the default's kind; where the default is 0, 0 chooses a size."""
    if isinstance(default, bool):
        fits, wanted = isinstance(value, bool), "true or false"
    elif isinstance(default, Sequence):
        numbers = (int, float) if option == "mlp_ratios" else (int,)
        fits = isinstance(value, Sequence) and all(type(item) in numbers and item > 0 for item in value)
        wanted = f"a list of {'numbers' if float in numbers else 'integers'} above 0"
    elif isinstance(default, float):
        fits, wanted = type(value) in (int, float) and value >= 0, "a number, 0 or more"
    else:
        fits = type(value) is int and value >= min(default, 1)
        wanted = "an integer above 0" if default else "an integer, or 0 for the default"
    if not fits:
        raise UserError(f"{name}: option {option}: {value!r} must be {wanted}")
