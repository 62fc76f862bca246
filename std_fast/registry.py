"""The students as timm models: `timm.create_model("std_mixer_s16_224", num_classes=10)`.

Importing this module registers them. Every backbone of this project has a name: `std_NAME_224` where NAME is a
published size (also with another `img_size`), `std_mixer`, `std_resmlp` and `std_cyclemlp` for any other shape, which
takes the builder's options (`patch_size`, `dim`, ...).
Further arguments: `teachers` (how many distillation heads, 0 for the plain model), `tokens`, `taps`, `assign`,
`token_mlp_ratio` and `predict` of `std_fast.create_student`.

Shapes: B batch, P patches, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor

from pipelines.errors import UserError
from std_fast.method.student import Student, backbone_and_modules, predict
from std_fast.models import BACKBONES, Backbone

GENERIC = ("mixer", "resmlp", "cyclemlp")


def architecture(backbone: str) -> str:
    """timm's name for the student with this backbone: `mixer_s16` -> `std_mixer_s16_224`."""
    return f"std_{backbone}" if backbone in GENERIC else f"std_{backbone}_224"


class TimmStudent(Student):
    """A `Student` with timm's interface: `forward` gives logits in training too.

    As with timm's distilled models, `set_distilled_training(True)` makes a training forward give the pair (class
    logits, mean distillation logits), which timm's token distillation task takes.
    """

    backbone: Backbone
    pretrained_cfg: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_features = self.head_hidden_size = self.embed_dim = self.backbone.dim  # timm's names for C
        self.feature_info = self.backbone.feature_info
        self.distilled_training = False

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        """Images `[B, 3, H, W]` -> logits `[B, K]`."""
        out = self.outputs(x)
        if self.training and self.distilled_training and out.dist_logits is not None:
            return out.class_logits, out.dist_logits.mean(1)
        return predict(out, self.predict)

    def set_distilled_training(self, enable: bool = True) -> None:
        self.distilled_training = enable

    def forward_features(self, x: Tensor) -> Tensor:
        """Images -> the backbone's tokens after its final norm `[B, P, C]`."""
        return self.backbone.forward_features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens of `forward_features` -> their mean `[B, C]` with `pre_logits`, else the class head's logits.

        Raises:
            RuntimeError: the prediction needs the distillation heads, which read blocks inside the backbone.
        """
        if not pre_logits and self.num_classes and self.head_teacher and self.predict != "class":
            raise RuntimeError(
                "the distillation heads read blocks inside the backbone: call the model itself, or create it with "
                "predict='class' for the class head alone"
            )
        return self.backbone.forward_head(x, pre_logits)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of the backbone: see `Backbone.forward_intermediates`."""
        return self.backbone.forward_intermediates(x, *args, **kwargs)


def classifier_names(student: Student) -> tuple[str, ...]:
    """Names of the class head and the distillation heads (timm's `classifier`)."""
    heads = student.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    return tuple(name for name, module in student.named_modules() if any(module is head for head in heads))


def build(
    name: str,
    num_classes: int = 1000,
    img_size: int | Sequence[int] = 224,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
    teachers: int = 2,
    tokens: Any = "both",
    taps: Sequence[int] | None = None,
    assign: Sequence[Sequence[int]] | None = None,
    predict: Any = "mean",
    token_mlp_ratio: Sequence[float] = (0.5, 4.0),
    **options: Any,
) -> TimmStudent:
    """A student by timm's argument names; its `forward` takes images `[B, 3, S, S]` and gives logits `[B, K]`.

    Raises:
        UserError: an argument that these models do not have, or images that are not square.
    """
    for argument, value, only in (
        ("in_chans", in_chans, 3),
        ("drop_rate", drop_rate, 0.0),
        ("global_pool", global_pool, "avg"),
    ):
        if value != only:
            raise UserError(f"{argument}: {value!r}, but {architecture(name)} has {only!r} only")
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if height != width:
        raise UserError(f"img_size: {height} x {width}, but the students take square images")
    K = max(num_classes, 1)  # heads that timm's num_classes=0 then empties
    backbone, modules = backbone_and_modules(name, K, height, teachers, drop_path_rate, tokens, taps, assign, options)
    spatial, channel = token_mlp_ratio
    student = TimmStudent(backbone, K, modules, tokens, predict=predict, token_mlp_ratio=(spatial, channel))
    if num_classes == 0:
        student.reset_classifier(0)
    return student


default_cfgs = generate_default_cfgs({
    f"{architecture(name)}.untrained": dict(
        url="", num_classes=1000, input_size=(3, 224, 224), fixed_input_size=True, pool_size=None, crop_pct=0.875,
        interpolation="bicubic", mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, license="apache-2.0",
        first_conv="backbone.patch_embed.proj" if name.startswith("cyclemlp") else "backbone.stem.proj",
        classifier=("backbone.head", "std.0.heads.0", "std.1.heads.0"),
    )
    for name in BACKBONES
})  # fmt: skip


def _register(name: str) -> None:
    def create(pretrained: bool = False, **kwargs: Any) -> TimmStudent:
        stages = (0, 1, 2, 3) if name.startswith("cyclemlp") else 3  # a pyramid's stages, or the last three blocks
        features = dict(out_indices=stages, feature_cls="getter")
        if kwargs.get("features_only") and kwargs.get("tokens") != "deit":
            kwargs["teachers"] = 0  # STD modules feed no feature map
        model = build_model_with_cfg(
            lambda **options: build(name, **options), architecture(name), pretrained, feature_cfg=features, **kwargs
        )
        if isinstance(model, TimmStudent):
            model.pretrained_cfg["classifier"] = classifier_names(model)
        return model

    create.__name__ = create.__qualname__ = architecture(name)
    create.__doc__ = f"{name} with STD modules; arguments in `std_fast.registry`."
    register_model(create)


for _name in BACKBONES:
    _register(_name)
