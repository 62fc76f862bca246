"""Digests of what a run reads: they are stored in its checkpoints, and a resumed run compares them.

So the same bytes on another path are the same training, and other bytes on the same path are another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pipelines.errors import UserError
from pipelines.read.base import sampled_digest
from pipelines.read.batch import Loader
from pipelines.read.manifest import normal
from std_fast.config.files import check_data
from std_fast.config.recipe import Recipe, StudentSpec, TeacherSpec
from std_fast.teachers.fingerprint import names_digest, weights_digest

NOT_COMPARED = ("data.val", "run.device", "student.weights")
"""may differ in a resumed run: it reads no initial weights"""


def content_of(student: StudentSpec, teachers: Sequence[TeacherSpec], train: Loader) -> dict[str, str]:
    """What the fields of a recipe mean here: a fingerprint of data and a digest of some of its images, the backend that
    reads it, a digest of weights.

    Weights that are not here have no entry: a run with all its teacher targets stored needs none.
    """
    found: dict[str, str | None] = {
        "data.train": train.source.fingerprint(),
        "data.train.images": sampled_digest(train.source),
        "data.backend": train.backend,
        "run.device": train.spec.device.partition(":")[0],
        "student.weights": weights_digest(student.weights, "") if student.weights else None,
    }
    for i, teacher in enumerate(teachers):
        found[f"distill.teachers.{i}.weights"] = weights_digest(teacher.weights, teacher.name)
        found[f"distill.teachers.{i}.classes"] = names_digest(teacher.classes)
    return {name: value for name, value in found.items() if value is not None}


def check_paths(recipe: Recipe, saved: Recipe) -> None:
    """UserError where nothing is at the path of data that a resumed run needs.

    Args:
        saved: the recipe of the checkpoint.
    """
    read = " and ".join(filter(None, (saved.data.train, saved.data.val)))
    way_on = f"this run read {read}; where the same data is elsewhere now, resume with"
    check_data(recipe.data.train, recipe.data.val, way_on)


def check_content(recipe: Recipe, stored: dict[str, str], here: dict[str, str]) -> None:
    """UserError for the fields of `recipe` whose content is not what the checkpoint's run read."""
    compared = stored.keys() & here.keys() - set(NOT_COMPARED)
    other = sorted({name.removesuffix(".images") for name in compared if stored[name] != here[name]})
    lines = [
        f"{name}: {_value(recipe, name)} holds other {'data' if name == 'data.train' else name.rpartition('.')[2]} "
        "than this run was trained with"
        for name in other
        if name != "data.backend"
    ]
    if lines:
        raise UserError(f"{'; '.join(lines)}; restore them, or start a new run with another --run.out")
    if other:
        before, now = stored["data.backend"], here["data.backend"]
        raise UserError(
            f"data.backend: {before} read the images of this run, and the pixels of {now} differ by roundings; resume "
            f"with --data.backend {before}"
        )


def check_classes(stored: dict[str, Any], number: int, names: Sequence[str] | None) -> None:
    """UserError unless the training data has the classes of a checkpoint's metadata, in the same order: a resumed run
    maps none."""
    advice = "resume with the data of the run, or start a new one with another --run.out"
    if number != stored["num_classes"]:
        raise UserError(f"data.train: has {number} classes, the run {stored['num_classes']}; {advice}")
    if stored["class_names"] is None or names is None:
        return
    for label, (there, here) in enumerate(zip(normal(stored["class_names"]), normal(names), strict=False)):
        if there != here:
            raise UserError(f"data.train: class {label} is {here!r}, and was {there!r} in the run; {advice}")


def at_stored_paths(recipe: Recipe, saved: Recipe, stored: dict[str, str], here: dict[str, str]) -> Recipe:
    """`recipe` with the fields of `saved` where both mean the same content."""

    def same(name: str) -> bool:
        return name in stored and stored[name] == here.get(name)

    def settled(number: int, ours: TeacherSpec, theirs: TeacherSpec) -> TeacherSpec:
        where = f"distill.teachers.{number}"
        ours = replace(ours, weights=theirs.weights) if same(f"{where}.weights") else ours
        return replace(ours, classes=theirs.classes) if same(f"{where}.classes") else ours

    data, run, student, distill = recipe.data, recipe.run, recipe.student, recipe.distill
    data = replace(data, train=saved.data.train) if same("data.train") else data
    data = replace(data, backend=saved.data.backend) if same("data.backend") else data
    run = replace(run, device=saved.run.device) if same("run.device") else run
    student = replace(student, weights=saved.student.weights) if same("student.weights") else student
    if len(distill.teachers) == len(saved.distill.teachers):
        pairs = zip(distill.teachers, saved.distill.teachers, strict=True)
        distill = replace(distill, teachers=tuple(settled(i, *pair) for i, pair in enumerate(pairs)))
    return replace(recipe, data=data, run=run, student=student, distill=distill)


def _value(recipe: Recipe, name: str) -> str:
    """The path in a field of `content_of`."""
    if name == "data.train":
        return recipe.data.train
    _, _, number, field = name.split(".")
    return str(getattr(recipe.distill.teachers[int(number)], field))
