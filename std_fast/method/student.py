"""The student: a backbone, STD modules beside it, and the statistics networks, in one module (METHOD.md sections 2, 6).

Shapes: B batch, P patches, C channels, K classes, M teachers, H distillation heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.errors import UserError
from std_fast.method.mine import MutualInformation
from std_fast.method.tokens import STDModule, TokenKind, at_least_float32
from std_fast.models import Backbone, build_backbone
from std_fast.models.common import DropPathMask, check_images, check_type

Prediction = Literal["mean", "class", "distill"]
PREDICTIONS = get_args(Prediction)
TRAINING_ONLY = "mine."  # prefix of the names of what only training needs


class StudentOutput(NamedTuple):
    """Outputs of one training forward, for the objective."""

    class_logits: Tensor  # [B, K]
    dist_logits: Tensor | None  # [B, H, K]
    information: list[Tensor]  # V of each module with MINE, in nats; the loss subtracts it (see mine.py)


@dataclass(frozen=True)
class ModulePlan:
    """One STD module: after which block it reads (counting from 1), and which teachers it serves (from 0)."""

    tap: int
    teachers: tuple[int, ...]


class Student(nn.Module):
    """Backbone + STD modules + heads + statistics networks: everything trainable, so that DDP wraps one module.

    Args:
        backbone: anything with `forward_taps(images, taps, keep) -> BackboneOutput`, `dim`, `patches`; with no modules,
            any classifier.
        modules: the block that each STD module reads and the teachers that it serves; empty for a plain model.
        num_classes: K.
        tokens: see `STDModule`. "deit" reads the distillation token that the backbone itself carries through all
            blocks (Touvron et al. 2021) with one linear head per teacher, and has no STD module.
        mine_weight: strength of the MINE regulariser; 0 leaves the statistics networks out.
        mine_width, mine_ema: see `MutualInformation`.
        predict: what `forward` returns in evaluation: the mean of class logits and mean distillation logits,
            or either alone.
        token_mlp_ratio: hidden widths of the modules' spatial and channel MLP over the channels C.

    In training mode `forward` returns a `StudentOutput`, in evaluation logits `[B, K]` (as in DeiT).
    """

    backbone: Any  # an nn.Module with the attributes above

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        modules: tuple[ModulePlan, ...] = (),
        tokens: TokenKind | Literal["deit"] = "both",
        mine_weight: float = 0.0,
        mine_width: int = 512,
        mine_ema: float = 0.0,
        predict: Prediction = "mean",
        token_mlp_ratio: tuple[float, float] = (0.5, 4.0),
    ) -> None:
        super().__init__()
        self.backbone, self.num_classes, self.predict = backbone, num_classes, predict
        self.taps = tuple(plan.tap for plan in modules)
        self.head_teacher = tuple(teacher for plan in modules for teacher in plan.teachers)
        self.std = nn.ModuleList()
        self.mine = nn.ModuleList()
        self.deit_heads = nn.ModuleList()
        if tokens == "deit":
            self.taps, self.head_teacher = (), tuple(sorted(set(self.head_teacher)))
            for _ in self.head_teacher:
                head = nn.Linear(backbone.dim, num_classes)
                nn.init.trunc_normal_(head.weight, std=0.02)
                nn.init.zeros_(head.bias)
                self.deit_heads.append(head)
        else:
            for plan in modules:
                spatial, channel = (max(1, int(ratio * backbone.dim)) for ratio in token_mlp_ratio)
                size = (backbone.dim, backbone.patches, num_classes, len(plan.teachers))
                self.std.append(STDModule(*size, tokens, spatial, channel))
            if mine_weight and tokens == "both":
                for _ in modules:
                    self.mine.append(
                        MutualInformation(backbone.dim, backbone.patches, mine_width, mine_weight, mine_ema)
                    )

    def outputs(self, images: Tensor, keep: DropPathMask = None, with_mine: bool = False) -> StudentOutput:
        """Images `[B, 3, H, W]` -> `StudentOutput`. `keep` is the backbone's stochastic depth.

        Raises:
            ValueError: images of another kind, such as uint8, or of another type than the weights, without autocast.
        """
        check_images(images, 3)
        if not hasattr(self.backbone, "forward_taps"):  # a plain classifier from timm
            return StudentOutput(self.backbone(images), None, [])
        if not torch.compiler.is_compiling():
            check_type(images, next(self.parameters()).dtype)
        taps = self.backbone.forward_taps(images, self.taps, keep)
        if not self.head_teacher or not self.num_classes:
            return StudentOutput(taps.logits, None, [])
        if self.deit_heads:
            return StudentOutput(taps.logits, torch.stack([head(taps.token) for head in self.deit_heads], 1), [])
        outputs = [module(features) for module, features in zip(self.std, taps.features, strict=True)]
        information = []
        if with_mine and self.mine:
            information = [mine(a.spatial, a.channel) for mine, a in zip(self.mine, outputs, strict=True)]
        return StudentOutput(taps.logits, torch.cat([a.logits for a in outputs], 1), information)

    def forward(self, images: Tensor, keep: DropPathMask = None, with_mine: bool = True) -> StudentOutput | Tensor:
        if self.training:
            return self.outputs(images, keep, with_mine)
        return predict(self.outputs(images), self.predict)

    def statistics(self) -> list[MutualInformation]:
        """MINE of each module; none where there is none."""
        return [mine for mine in self.mine if isinstance(mine, MutualInformation)]

    def mine_terms(self, images: Tensor, keep: DropPathMask) -> Tensor:
        """Both terms of MINE's bound for these images alone (see `MutualInformation.terms`): `[modules, 2]`."""
        features = self.backbone.forward_taps(images, self.taps, keep).features
        tokens = [module(z_BPC) for module, z_BPC in zip(self.std, features, strict=True)]
        with torch.autocast(images.device.type, enabled=False):
            pairs = [(at_least_float32(a.spatial), at_least_float32(a.channel)) for a in tokens]
            terms = [torch.stack(mine.terms(*pair)) for mine, pair in zip(self.statistics(), pairs, strict=True)]
        return torch.stack(terms)

    def distillation_heads(self) -> list[nn.Linear]:
        """The heads of all modules, in the order of `head_teacher`."""
        heads = [head for module in self.std if isinstance(module, STDModule) for head in module.heads]
        return [head for head in (*heads, *self.deit_heads) if isinstance(head, nn.Linear)]

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """The class head, and behind it the distillation heads where there are any (timm's interface)."""
        head, others = self.backbone.get_classifier(), self.distillation_heads()
        return (head, *others) if others else head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads of every kind for `num_classes` classes; with 0 the output is the pooled features `[B, C]`."""
        self.backbone.reset_classifier(num_classes, global_pool)
        for head in self.distillation_heads():
            weight = nn.init.trunc_normal_(head.weight.new_empty(num_classes, head.in_features), std=0.02)
            head.out_features, head.weight = num_classes, nn.Parameter(weight)
            head.bias = nn.Parameter(head.bias.new_zeros(num_classes))
        for module in self.std:
            if isinstance(module, STDModule):
                module.num_classes = num_classes
        self.num_classes = num_classes

    def training_only(self) -> set[str]:
        """Names of the parameters and saved buffers that only training needs (the statistics networks)."""
        return {name for name in self.state_dict() if name.startswith(TRAINING_ONLY)}

    def no_weight_decay(self) -> set[str]:
        """Names of two-dimensional parameters without weight decay: tokens, and those that the backbone names."""
        names = {f"std.{i}.{token}" for i in range(len(self.std)) for token in ("token_s", "token_c")}
        if hasattr(self.backbone, "no_weight_decay"):
            names |= {f"backbone.{name}" for name in self.backbone.no_weight_decay()}
        return names


def resize_images(images: Tensor, size: int | None) -> Tensor:
    """Images `[B, 3, H, W]` as `[B, 3, size, size]`, channels-last, antialiased; as they are if they have the size."""
    if size is None or images.shape[2:] == (size, size):
        return images
    resized = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return resized.contiguous(memory_format=torch.channels_last)


def predict(output: StudentOutput, how: Prediction = "mean") -> Tensor:
    """Logits `[B, K]` by the class head, the mean of the distillation heads, or the mean of the two (METHOD.md 6).

    Raises:
        ValueError: `how` is none of these.
    """
    if how not in PREDICTIONS:
        raise ValueError(f"predict must be one of {', '.join(PREDICTIONS)}, not {how!r}")
    if output.dist_logits is None or how == "class":
        return output.class_logits
    distilled = output.dist_logits.mean(1)
    return distilled if how == "distill" else (output.class_logits + distilled) / 2


def backbone_and_modules(
    name: str,
    num_classes: int,
    image_size: int,
    teachers: int,
    drop_path: float,
    tokens: str,
    taps: Sequence[int] | None,
    assign: Sequence[Sequence[int]] | None,
    options: dict[str, object],
) -> tuple[Backbone, tuple[ModulePlan, ...]]:
    """Backbone and placement of a student. Arguments and errors as for `std_fast.create_student`."""
    if tokens == "deit" and teachers:
        if taps is not None or assign is not None:
            raise UserError("taps, assign: have no effect with tokens='deit'; leave them out")
        options = {**options, "distill_token": True}
    backbone = build_backbone(name, num_classes, image_size, drop_path, **options)
    taps = None if taps is None else tuple(taps)
    assign = None if assign is None else tuple(tuple(group) for group in assign)
    return backbone, plan_modules(backbone, teachers, taps, assign)


def plan_modules(
    backbone: Any,
    num_teachers: int,
    taps: tuple[int, ...] | None = None,
    assign: tuple[tuple[int, ...], ...] | None = None,
) -> tuple[ModulePlan, ...]:
    """The block that each STD module reads, and the teachers that it serves.

    By default (METHOD.md sections 2 and 3) as many modules as teachers up to two: one teacher learns at the last
    block; two at two thirds of the depth and at the last, in the given order (put the small teacher first). More
    teachers share both modules, as two do the one module of a backbone with a single block.

    Args:
        taps: block numbers, counting from 1, instead of the default.
        assign: for each module the teachers it serves; by default module i serves teacher i.

    Raises:
        UserError: taps and assignment do not fit each other, the backbone or the number of teachers.
    """
    if num_teachers == 0:
        return ()
    default = backbone.default_taps()
    if assign is None:
        if taps is None:
            taps = default[-num_teachers:] if num_teachers <= len(default) else default
        if len(taps) == num_teachers:
            assign = tuple((i,) for i in range(num_teachers))
        elif num_teachers == 1:
            assign = ((0,),) * len(taps)
        else:
            assign = (tuple(range(num_teachers)),) * len(taps)
    elif taps is None:
        if len(assign) > len(default):
            raise UserError(f"distill.taps: name {len(assign)} blocks, one for each entry of distill.assign")
        taps = default[-len(assign) :]
    if len(taps) != len(assign):
        raise UserError(
            f"distill.assign: has {len(assign)} entries for {len(taps)} modules (distill.taps); give one each"
        )
    if any(tap < 1 or tap > backbone.depth for tap in taps) or len(set(taps)) != len(taps):
        raise UserError(f"distill.taps: {list(taps)} must be different block numbers from 1 to {backbone.depth}")
    served = {teacher for group in assign for teacher in group}
    if any(not group for group in assign) or served != set(range(num_teachers)):
        raise UserError(
            f"distill.assign: {[list(g) for g in assign]} must name each of the {num_teachers} teachers (0 to "
            f"{num_teachers - 1}) at least once and leave no module empty"
        )
    return tuple(ModulePlan(tap, tuple(group)) for tap, group in zip(taps, assign, strict=True))
