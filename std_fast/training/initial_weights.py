"""Weights that a student's training starts from: the recipe's `student.weights`."""

from __future__ import annotations

import logging
from pathlib import Path

from pipelines.errors import UserError
from std_fast.config.recipe import StudentSpec
from std_fast.method.student import Student
from std_fast.teachers.classifiers import head_names, load_weights, other_shapes, read_run, read_weights

log = logging.getLogger("std_fast")


def load_initial_weights(student: Student, spec: StudentSpec) -> None:
    """Loads `spec.weights`: all of a run's student, or a file's weights into the backbone.

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
