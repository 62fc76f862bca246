"""Weights that a student's training starts from: the recipe's `student.weights`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from pipelines.errors import UserError
from std_fast.config.recipe import StudentSpec
from std_fast.method.student import Student
from std_fast.teachers.classes import DataClasses, match
from std_fast.teachers.classifiers import (
    StoredRun,
    head_names,
    load_weights,
    other_shapes,
    read_run,
    read_weights,
)

log = logging.getLogger("std_fast")


def load_initial_weights(student: Student, spec: StudentSpec, class_names: Sequence[str] | None = None) -> None:
    """Loads `spec.weights`: all of a run's student, or a file's weights into the backbone.

    The classes of a run are matched by name with the data's, `class_names`, which may be some of them in another order:
    each class takes its row of the heads.

    With `spec.new_head` all heads stay as they are, for data of other classes, and a plain student takes only the
    backbone of a distilled one.

    Raises:
        UserError: weights that cannot be read, or do not fit; names the fields that make them fit.
    """
    path = Path(spec.weights)
    where = f"student.weights ({path})"
    if spec.weights == "pretrained":
        raise UserError(
            f"student.weights: `pretrained` is for teachers; save the state_dict() of timm.create_model({spec.name!r}, "
            "pretrained=True) as .safetensors and name that file"
        )
    model, size = student if path.is_dir() else student.backbone, ""
    if path.is_dir():
        stored = read_run(path)
        state, size = stored.state, f" {stored.recipe.data.image_size}"
    else:
        state = read_weights(path)
    heads = set(head_names(model))
    if path.is_dir() and not spec.new_head:
        state |= matched_heads(stored, heads, DataClasses.of(student.num_classes, class_names), where)
    if spec.new_head:
        plain = path.is_dir() and not student.head_teacher
        kept = {name: tensor for name, tensor in state.items() if name.startswith("backbone.") or not plain}
        own = model.state_dict()
        state = {name: t for name, t in kept.items() if name not in heads} | {name: own[name] for name in heads}
        log.info("%s: new heads for %d classes", where, student.num_classes)
    other = other_shapes(model, state)
    if other and set(other) <= heads:
        raise UserError(
            f"{where}: of {len(state[other[0]])} classes, but the data has {student.num_classes}; set student.new_head "
            "true to start with new heads, or use data of the same classes"
        )
    if other:
        name = next(name for name in other if name not in heads)
        raise UserError(
            f"{where}: {name} has shape {tuple(state[name].shape)}, this model needs "
            f"{tuple(model.state_dict()[name].shape)}; set data.image_size{size} and student.options as in its training"
        )
    load_weights(model, state, where)


def matched_heads(stored: StoredRun, heads: set[str], data: DataClasses, where: str) -> dict[str, Tensor]:
    """The tensors of a run's heads, one row for each class of the data; empty where one of the two has no class names.

    Raises:
        UserError: names a class of the data that the run lacks.
    """
    names = DataClasses.of(stored.num_classes, stored.class_names).names
    if names is None or data.names is None:
        return {}
    fix = "set student.new_head true to start with new heads"
    rows = list(match(names, data.names, where, "the run", fix))
    return {name: stored.state[name][rows] for name in heads & stored.state.keys()}
