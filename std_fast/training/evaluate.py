"""Accuracy on a validation set, each image counted exactly once, by each head and their mean."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.augment.device import Augment
from pipelines.augment.spec import AugmentSpec
from pipelines.errors import UserError
from pipelines.read.batch import Loader
from std_fast.config.options import EVAL_FIELDS
from std_fast.config.recipe import Recipe
from std_fast.config.schema import from_dict, set_dotted
from std_fast.method.student import TRAINING_ONLY, Prediction, Student, StudentOutput, predict
from std_fast.runtime.distributed import SINGLE_PROCESS, World
from std_fast.runtime.metrics import Progress
from std_fast.teachers.classes import DataClasses
from std_fast.teachers.teacher import autocast, build_teacher, load_weights, read_run
from std_fast.training.build import build_student, open_val_loader, pick_device, precision_of, teacher_dtype


class Abandoned(Exception):
    """An evaluation was stopped before its end."""


@torch.no_grad()
def evaluate(
    student: Student,
    loader: Loader,
    normalise: Callable[[Tensor], Tensor],
    autocast: Callable,
    how: Prediction = "mean",
    world: World = SINGLE_PROCESS,
    stop: Callable[[int], bool] = lambda images: False,
) -> dict[str, float]:
    """Evaluates `student` (left in evaluation mode) on one pass over `loader`, whose shards all ranks of `world` take.

    Args:
        stop: called before each batch with the images that this rank has evaluated; True ends the evaluation. All ranks
            must get the same.

    Returns:
        `top1`, `top5` (percent) and `loss` (cross-entropy, nats) of the prediction `how`; for a distilled student also
        `top1_class`, `top1_distill`, `top1_mean` of each head; `images`, how many were counted; `corrupt_images`, how
        many were left out because they are corrupt, if any.

    Raises:
        Abandoned: `stop` returned True.
        RuntimeError: the loader did not give each image exactly once.
        UserError: all images are corrupt.
    """
    student.eval()
    heads: tuple[Prediction, ...] = ("class", "distill", "mean") if student.head_teacher else (how,)
    sums: dict[str, Tensor] = {}
    seen = corrupt = 0
    with closing(loader.epoch(0)) as batches:
        for batch in batches:
            if stop(seen):
                raise Abandoned
            seen += len(batch.labels)
            with autocast():
                out = student.outputs(normalise(batch.images))
            corrupt += int((loader.sampler.positions(batch.step) >= 0).sum() - (batch.indices >= 0).sum())  # numpy
            counts = count_correct(out, batch.labels, heads, how)
            sums = {name: sums.get(name, 0) + value.double() for name, value in counts.items()}
    device = next(student.parameters()).device
    sums["corrupt"] = torch.full((), corrupt, dtype=torch.float64, device=device)
    names = list(sums)
    values = dict(zip(names, world.sum(torch.stack([sums[name] for name in names])).tolist(), strict=True))
    images, corrupt = int(values.pop("images")), int(values.pop("corrupt"))
    if images + corrupt != loader.source.num_samples:
        raise RuntimeError(f"{loader.source.path}: {images} images were counted of {loader.source.num_samples}")
    if not images:
        raise UserError(f"{loader.source.path}: no image in it can be decoded; convert it again")
    result = {name: value / images * (1 if name == "loss" else 100) for name, value in values.items()}
    if len(heads) == 1:
        result.pop(f"top1_{how}")
    return {**result, "images": images} | ({"corrupt_images": corrupt} if corrupt else {})


def count_correct(
    out: StudentOutput, labels: Tensor, heads: tuple[Prediction, ...], how: Prediction
) -> dict[str, Tensor]:
    """Sums over a batch, on the device: images, those that each head and `how` get right, and the loss of `how`."""
    valid = labels >= 0
    right = {head: ((predict(out, head).argmax(-1) == labels) & valid).sum() for head in heads}
    logits = predict(out, how).float()
    five = logits.topk(min(5, logits.shape[1]), dim=-1).indices
    counts = {"images": valid.sum(), "top1": right[how], "top5": ((five == labels[:, None]).any(-1) & valid).sum()}
    counts |= {f"top1_{head}": count for head, count in right.items()}
    return counts | {"loss": F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")}


def result_in_words(result: Mapping[str, float]) -> str:
    """Two lines in the order of `evaluate`: `top1 11.09 %  top5 33.33 %`, `loss 3.1415  images 900`; "" for none."""
    accuracy = [f"{name} {value:.2f} %" for name, value in result.items() if name.startswith("top")]
    rest = [f"loss {v:.4f}" if name == "loss" else f"{name} {v}" for name, v in result.items() if name[:3] != "top"]
    return "  ".join(accuracy) + "\n" * bool(result) + "  ".join(rest)


def for_evaluation(recipe: Recipe, overrides: Sequence[tuple[str, str]]) -> Recipe:
    """With fields of EVAL_FIELDS as (dotted key, text). UserError for another field."""
    changes: dict = {}
    for name, text in overrides:
        if name not in EVAL_FIELDS:
            raise UserError(
                f"--{name}: a trained model is evaluated as its recipe says; it takes {', '.join(EVAL_FIELDS)}, and "
                "with --teacher all fields; other data is a word of its own: std-fast eval RUN DATA"
            )
        set_dotted(changes, name, text)
    return from_dict(Recipe, changes, base=recipe)


class TrainedStudent(NamedTuple):
    """A run's student and what is stored with it."""

    recipe: Recipe
    student: Student  # without statistics networks, in evaluation mode, on the CPU
    step: int
    class_names: list[str] | None


def trained_student(run: Path, predict: str = "") -> TrainedStudent:
    """From a checkpoint of a run (see `read_run`), the moving average where it has one.

    Args:
        predict: which heads predict; by default what the recipe says.

    Raises:
        UserError: the folder holds no run, or no complete checkpoint.
    """
    recipe, state, num_classes, names, step = read_run(run)
    distill = replace(recipe.distill, mine=replace(recipe.distill.mine, weight=0.0))
    bare = replace(recipe, student=replace(recipe.student, weights=""), distill=distill)
    with torch.random.fork_rng(devices=[]):  # fresh weights are drawn, and at once replaced
        student = build_student(bare, num_classes)
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(TRAINING_ONLY)}
    load_weights(student, kept, str(run))
    if predict:
        student.predict = predict  # type: ignore[assignment]
    names = names if names and len(names) == num_classes else None
    return TrainedStudent(recipe, student.eval().requires_grad_(False), step, names)


def evaluate_run(folder: Path, data: str = "", overrides: Sequence[tuple[str, str]] = ()) -> dict[str, float]:
    """Accuracy of a run's newest weights (the moving average where there is one) on `data`, by default its `data.val`.

    The data may have some of the run's classes only, in any order: they are matched by name (see `relabel`).

    Args:
        overrides: see `for_evaluation`.

    Raises:
        UserError: the folder holds no run, the data cannot be read, or has a class that the run lacks.
    """
    recipe, student, _, names = trained_student(folder)
    recipe = for_evaluation(recipe, overrides)
    device = pick_device(recipe.run.device)
    try:
        classes = DataClasses.named(student.num_classes, names)
        loader = open_val_loader(recipe, device, data, classes=classes)
    except UserError as error:
        if data:
            raise
        raise UserError(f"{error} (the run's data.val; for data elsewhere: std-fast eval {folder} DATA)") from None
    if loader is None:
        raise UserError(f"{folder}: its recipe names no data.val; name the data: std-fast eval RUN DATA")
    cast = functools.partial(autocast, device, precision_of(recipe.run.precision, device))
    return evaluate_loader(student, loader, recipe.augment, cast, recipe.distill.predict)


def evaluate_loader(
    student: Student, loader: Loader, augment: AugmentSpec, cast: Callable, how: Prediction
) -> dict[str, float]:
    """`evaluate` on the loader's device, with progress on standard error. The loader is closed.

    Args:
        augment: whose normalisation the images get.
    """
    device = torch.device(loader.spec.device)
    normalise = Augment(augment, 0).to(device).normalise_only
    with loader, closing(Progress("evaluated", loader.source.num_samples, "images")) as progress:

        def before_batch(images: int) -> bool:
            progress.note(images, "")
            return False

        return evaluate(student.to(device), loader, normalise, cast, how, stop=before_batch)


def evaluate_teacher(recipe: Recipe, number: int, data: str = "") -> dict[str, float]:
    """Accuracy of a recipe's teacher on `data`, by default its `data.val`, on the classes of that data.

    Raises:
        UserError: the recipe has no such teacher, the teacher lacks a class of the data, there is no data.
    """
    teachers = recipe.distill.teachers
    if not 0 <= number < len(teachers):
        raise UserError(f"--teacher: the recipe has {len(teachers)} teachers, numbered from 0; there is no {number}")
    device = pick_device(recipe.run.device)
    loader = open_val_loader(recipe, device, data)
    if loader is None:
        raise UserError("data.val: is empty; name the data: std-fast eval RECIPE DATA --teacher N")
    with loader:
        where, spec, augment = f"distill.teachers.{number}", teachers[number], recipe.augment
        dtype, names = teacher_dtype(spec, recipe.run.precision, device), loader.source.class_names
        size = recipe.data.image_size
        teacher = build_teacher(spec, loader.num_classes, size, augment.mean, augment.std, where, dtype, names)
        student = Student(teacher, loader.num_classes)
        return evaluate_loader(student, loader, augment, contextlib.nullcontext, "class")
