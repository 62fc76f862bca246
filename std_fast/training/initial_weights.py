"""Weights that a student's training starts from: the recipe's `student.weights`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from pipelines.errors import UserError
from std_fast.config.recipe import StudentSpec
from std_fast.method.student import Student
from std_fast.models import BACKBONES
from std_fast.teachers.classes import DataClasses, Side, known_classes, places
from std_fast.teachers.classifiers import (
    create_pretrained,
    head_names,
    load_weights,
    other_shapes,
    read_run,
    read_weights,
    timm_config,
)
from std_fast.teachers.hub_folder import is_hub_folder, read_hub_folder

TIMM_NAMES = {
    "mixer_s16": "mixer_s16_224",
    "mixer_b16": "mixer_b16_224",
    "resmlp_s12": "resmlp_12_224",
    "resmlp_s24": "resmlp_24_224",
}
"""this project's students that timm has too, and timm's names of them"""
MODEL_FILE = "model.safetensors"  # of an export, as timm and the Hugging Face hub name it
log = logging.getLogger("std_fast")


class InitialWeights(NamedTuple):
    """What `student.weights` names."""

    state: dict[str, Tensor]
    num_classes: int | None = None  # None where that is not stated
    class_names: Sequence[str] | None = None
    image_size: int | None = None

    @property
    def complete(self) -> bool:
        """Whether it is all of a student, as a run and an export hold it, or a backbone."""
        return any(name.startswith("backbone.") for name in self.state)


def read_initial_weights(path: Path) -> InitialWeights:
    """Weights of a run's folder, an export's (config.json), or a file. UserError where they cannot be read."""
    folder = path.parent if path.name == MODEL_FILE else path  # an export's file stands for its folder
    if is_hub_folder(folder):
        hub = read_hub_folder(folder)
        return InitialWeights(read_weights(folder / MODEL_FILE), hub.num_classes, hub.class_names, hub.image_size)
    if path.is_dir():
        run = read_run(path)
        return InitialWeights(run.state, run.num_classes, run.class_names, run.recipe.data.image_size)
    return InitialWeights(read_weights(path))


def read_pretrained(spec: StudentSpec) -> InitialWeights:
    """Weights of timm's model for a student. UserError where timm has none, or they cannot be downloaded."""
    name = TIMM_NAMES.get(spec.name, spec.name)
    if name in BACKBONES:
        raise UserError(
            f"student.weights: timm has no pretrained weights for {spec.name}, as it has for {', '.join(TIMM_NAMES)} "
            "and its own models; give a file"
        )
    config = timm_config(name)
    size = config.input_size[-1]
    model = create_pretrained(name, size, "student.weights", **(spec.options if name == spec.name else {}))
    return InitialWeights(model.state_dict(), config.num_classes, config.label_names, size)


def load_initial_weights(student: Student, spec: StudentSpec, class_names: Sequence[str] | None) -> None:
    """Loads `spec.weights`: all of the student of a run or an export, or a file's weights into the backbone.

    The classes of a run, an export or a file of ImageNet's classes are matched by name with the data's, `class_names`,
    which may be some of them in another order: each class takes its row of the heads.

    With `spec.new_head` all heads stay as they are, for data of other classes, and a plain student takes only the
    backbone of a distilled one.

    Raises:
        UserError: weights that cannot be read, or do not fit; names the fields that make them fit.
    """
    path = Path(spec.weights)
    where = f"student.weights ({path})"
    stored = read_pretrained(spec) if spec.weights == "pretrained" else read_initial_weights(path)
    state, model = stored.state, student if stored.complete else student.backbone
    size = f" {stored.image_size}" if stored.image_size else ""
    heads = set(head_names(model))
    if not spec.new_head:
        state |= matched_heads(stored, heads, DataClasses.named(student.num_classes, class_names), where)
    else:
        plain = stored.complete and not student.head_teacher
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


def matched_heads(stored: InitialWeights, heads: set[str], data: DataClasses, where: str) -> dict[str, Tensor]:
    """The tensors of the stored heads, one row for each class of the data; empty where one of the two has no names.

    Raises:
        UserError: names a class of the data that the weights lack.
    """
    rows_of_a_head = (len(tensor) for name, tensor in stored.state.items() if name in heads and tensor.ndim)
    count = stored.num_classes or next(rows_of_a_head, None)
    if count is None:
        return {}
    theirs = known_classes(count, stored.class_names, data)
    if theirs.names is None and count != data.number:
        return {}
    fix = "set student.new_head true to start with new heads"
    decides = f"convert the data with --classes FILE, in which its classes stand in their order, or {fix}"
    rows = places(theirs, data, Side(where, "the model", fix, decides))
    return {} if rows is None else {name: stored.state[name][list(rows)] for name in heads & stored.state.keys()}
