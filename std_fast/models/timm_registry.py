"""CycleMLP as timm models: `timm.create_model("cyclemlp_b1", ...)` works once this module is imported.

timm registers at import time, so this module does too; it is the only one here that imports timm. Mixer and ResMLP are
not repeated: timm has them, with the same weights.
"""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from pipelines.errors import UserError
from std_fast.models import BACKBONES

# evaluation crops of the release's `default_cfgs`
_CROPS = {"cyclemlp_b1": 0.9, "cyclemlp_b2": 0.9, "cyclemlp_b3": 0.9, "cyclemlp_b4": 0.875, "cyclemlp_b5": 0.875}

default_cfgs = generate_default_cfgs({
    f"{name}.untrained": dict(
        url="", num_classes=1000, input_size=(3, 224, 224), pool_size=(7, 7), crop_pct=crop, interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, first_conv="patch_embed.proj", classifier="head",
    )
    for name, crop in _CROPS.items()
})  # fmt: skip


def _register(name: str) -> None:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        def build(img_size: int = 224, in_chans: int = 3, drop_path_rate: float = 0.0, **options: Any) -> nn.Module:
            if in_chans != 3:
                raise UserError(f"in_chans is {in_chans}: {name} takes colour images, 3 channels")
            return BACKBONES[name](image_size=img_size, drop_path=drop_path_rate, **options)  # timm's names to ours

        features = dict(out_indices=(0, 1, 2, 3), feature_cls="getter")
        return build_model_with_cfg(build, name, pretrained, feature_cfg=features, **kwargs)

    create.__name__ = create.__qualname__ = name
    register_model(create)


for _name in _CROPS:
    _register(_name)
