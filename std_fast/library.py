"""STD in your own code: students by name; teachers by name, from files, or as modules.

Shapes: B batch, K classes, M teachers, H distillation heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn

from pipelines.augment.spec import AugmentSpec
from pipelines.errors import UserError
from std_fast.method.student import PREDICTIONS, Prediction, Student, backbone_and_modules
from std_fast.method.tokens import TokenKind

if TYPE_CHECKING:
    import torch

    from std_fast.config.recipe import TeacherSpec
    from std_fast.teachers.teacher import Teachers

TOKENS = (*get_args(TokenKind), "deit")
DEFAULT = AugmentSpec()  # the recipes' normalisation


def create_student(
    name: str,
    num_classes: int,
    image_size: int = 224,
    teachers: int = 2,
    *,
    drop_path: float = 0.0,
    tokens: TokenKind | Literal["deit"] = "both",
    taps: Sequence[int] | None = None,
    assign: Sequence[Sequence[int]] | None = None,
    mine_weight: float = 0.0,
    mine_width: int = 512,
    mine_ema: float = 0.0,
    predict: Prediction = "mean",
    token_mlp_ratio: tuple[float, float] = (0.5, 4.0),
    **options: object,
) -> Student:
    """A student with fresh weights: a vision MLP and its STD modules.

    Args:
        name: mixer_s16, resmlp_s24, cyclemlp_b1, ...: `std_fast.models.list_backbones()` has them all.
        num_classes, image_size: classes K, 0 (pooled features) only without teachers; side of the square images in px.
        teachers: M, number of teachers; 0 for the plain model.
        drop_path: stochastic depth rate.
        tokens, mine_width, mine_ema, token_mlp_ratio: see `Student`.
        taps, assign: the blocks that the STD modules read and the teachers that each serves, in place of the
            paper's: see `plan_modules`.
        mine_weight: strength of the MINE regulariser (the recipes take 0.01). With it, subtract
            `sum(output.information)` from your loss.
        predict: the heads whose logits `student(images)` gives in evaluation: see `predict`.
        options: the backbone's builder's (`patch_size`, `dim`, `depth`, ...).

    Returns:
        `student(images)` gives a `StudentOutput` in training mode and logits `[B, K]` in evaluation; head h learns
        from teacher `student.head_teacher[h]`.

    Raises:
        UserError: an unknown name, option, token or prediction, or sizes or a placement that do not fit together.

    Source: Li et al., ICML 2022 (docs/METHOD.md, sections 2 and 3).
    """
    check_number("teachers", teachers, Integral)
    check_number("num_classes", num_classes, Integral, min(teachers, 1))  # 0: pooled features
    check_number("image_size", image_size, Integral, 1)
    check_number("drop_path", drop_path)
    check_number("mine_weight", mine_weight)
    check_number("mine_width", mine_width, Integral, 1)
    check_number("mine_ema", mine_ema, below=1)
    check_lists(taps=() if taps is None else taps, assign=assign or (), token_mlp_ratio=token_mlp_ratio)
    check_lists(**{f"assign.{i}": group for i, group in enumerate(assign or ())})
    if len(token_mlp_ratio) != 2 or min(token_mlp_ratio) <= 0:
        raise UserError(f"token_mlp_ratio: {token_mlp_ratio} must be two positive numbers")
    for field, value, known in (("tokens", tokens, TOKENS), ("predict", predict, PREDICTIONS)):
        if value not in known:
            raise UserError(f"{field}: {value!r} is unknown; take one of {', '.join(known)}")
    backbone, modules = backbone_and_modules(
        name, num_classes, image_size, teachers, drop_path, tokens, taps, assign, options
    )
    mine = (mine_weight, mine_width, mine_ema)
    return Student(backbone, num_classes, modules, tokens, *mine, predict, token_mlp_ratio)


def check_number(field: str, value: Any, kind: type[Any] = Real, least: float = 0, below: float = math.inf) -> None:
    """UserError for an argument that is no number of this kind from `least` to less than `below`."""
    if not isinstance(value, kind) or isinstance(value, bool) or not least <= value < below:
        wanted = "a whole number" if kind is Integral else "a number"
        less = f", less than {below}" if below < math.inf else ""
        raise UserError(f"{field}: {value!r} must be {wanted}, {least} or more{less}")


def check_lists(**arguments: Any) -> None:
    for field, value in arguments.items():
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise UserError(f"{field}: {value!r} must be a list")


def create_teachers(
    teachers: Sequence[str | Path | TeacherSpec | nn.Module],
    num_classes: int,
    image_size: int = 224,
    *,
    mean: tuple[float, ...] = DEFAULT.mean,
    std: tuple[float, ...] = DEFAULT.std,
    temperature: float | None = None,
    device: torch.device | str = "cpu",
    class_names: Sequence[str] | None = None,
) -> Teachers:
    """Frozen teachers whose targets `distillation_loss` takes; with two, put the small one first.

    Args:
        teachers: each a timm name (its pretrained weights are downloaded), the folder of a plain run or of an export, a
            `TeacherSpec` (name, weights file, own size and normalisation), or a classifier of your own, which is frozen
            and gets the images exactly as they are.
        num_classes: K, of the data; a teacher of other classes is refused, unless `class_names` are given and it has
            them: its other logits are dropped.
        image_size, mean, std: side and normalisation of the images that the teachers will be given (by default as the
            recipes normalise: ImageNet's); those of a teacher that differ are converted.
        temperature: the softmax's, for soft labels; None for hard labels.
        class_names: the data's, in the order of its labels: matched with a teacher's by name or WordNet id (see
            `TeacherSpec.classes`).

    Returns:
        `teachers(images)`, with images `[B, 3, S, S]`, gives `TeacherTargets` of M teachers, without gradients.

    Raises:
        UserError: an unknown name, weights that are missing or do not fit, another number of classes.
    """
    from std_fast.config.recipe import TeacherSpec
    from std_fast.teachers.classes import wrong_classes
    from std_fast.teachers.teacher import Teacher, Teachers, build_teacher

    if not teachers or isinstance(teachers, str):
        raise UserError("teachers: is empty; name at least one" if not teachers else "teachers: give a list, [NAME]")
    check_number("num_classes", num_classes, Integral, 1)
    check_number("image_size", image_size, Integral, 1)
    if temperature is not None and not (isinstance(temperature, Real) and temperature > 0):
        raise UserError(f"temperature: {temperature!r} must be a number above 0")
    built = []
    for i, teacher in enumerate(teachers):
        if not isinstance(teacher, (str, Path, TeacherSpec, nn.Module)):
            raise UserError(f"teachers.{i}: {teacher!r} must be a name, a folder, a TeacherSpec or a module")
        if isinstance(teacher, nn.Module):
            if (found := getattr(teacher, "num_classes", num_classes)) != num_classes:
                raise UserError(wrong_classes(f"teachers.{i}", found, num_classes))
            built.append(Teacher(teacher, mean, std, mean, std, num_classes=num_classes))
            continue
        if isinstance(teacher, (str, Path)):
            folder, teacher = Path(teacher).is_dir(), str(teacher)
            teacher = TeacherSpec(weights=teacher) if folder else TeacherSpec(teacher, "pretrained")
        where = f"teachers.{i}"
        built.append(build_teacher(teacher, num_classes, image_size, mean, std, where, class_names=class_names))
    return Teachers(built, temperature).to(device)
