"""What a teacher's precision costs and gains: time, and how many of its hard labels are those of float32.

With --recipe the teachers and the training data are the recipe's, augmented as the student sees them: the agreement is
what a run would have. Without it they are timm models of random weights on synthetic images, whose logits lie closer
together than a trained model's: the times hold, the agreement is pessimistic.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, workload
from pipelines.augment.device import Augment
from pipelines.errors import UserError
from std_fast.config import recipe as recipes
from std_fast.config.recipe import Recipe, TeacherSpec
from std_fast.teachers.teacher import Teachers, autocast
from std_fast.training.build import build_teachers, make_fast, open_train_loader, pick_device, precision_of

PRECISIONS = ("float32", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    workload.add_arguments(parser)
    parser.add_argument("--recipe", default="", help="whose teachers and data; by default --teachers on noise")
    parser.add_argument("--data", default="", help="instead of the recipe's data.train")
    workload.add_teachers(parser)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--batches", type=int, default=8, help="on which the labels are compared [8]")


def run(args: argparse.Namespace) -> dict[str, Any]:
    given = args.batch
    workload.settle(args)
    if args.smoke:
        args.teachers, args.precisions, args.batches = [workload.TINY_TEACHER], ["float32", "bfloat16"], 2
    if args.batches < 1:
        raise UserError("--batches: must be 1 or more")
    with contextlib.ExitStack() as stack:
        if args.recipe:
            recipe = recipes.load(args.recipe, [("data.train", args.data)] if args.data else [])
            changes = {"device": args.device, "compile": args.compile, "precision": args.precision}
            run = replace(recipe.run, batch=given or recipe.run.batch, **changes)
            recipe = replace(recipe, run=recipes.from_dict(type(run), vars(run)))
        else:
            folder = stack.enter_context(workload.workplace(args, tuple(args.teachers)))
            recipe = workload.recipe_for(args, folder, tuple(args.teachers))
        args.batch = recipe.run.batch
        return compare(args, recipe)


def compare(args: argparse.Namespace, recipe: Recipe) -> dict[str, Any]:
    device = pick_device(recipe.run.device)
    images, classes = batches(recipe, device, args.batches)
    calls: dict[str, Callable[[], object]] = {}
    numbers: dict[str, dict[str, Any]] = {}
    failed = []
    for number, spec in enumerate(recipe.distill.teachers):
        exact = None
        # float32 first: what the others are compared with, also where it is not asked for
        for precision in dict.fromkeys(("float32", *args.precisions)):
            name = f"{number} {spec.name or spec.weights}, {precision}"
            harness.progress(f"{name}: predicting")
            try:
                predict = teacher_of(recipe, replace(spec, precision=precision), classes, device)
            except UserError as error:
                failed.append({"name": name, "failed": str(error)})
                continue
            targets = [predict(one) for one in images]
            labels = torch.cat([answer.labels for answer in targets])
            confidence = torch.cat([answer.confidence.float() for answer in targets])
            exact = exact or (labels, confidence)
            if precision in args.precisions:
                calls[name] = lambda predict=predict: predict(images[0])  # type: ignore[misc]
                numbers[name] = {
                    "agree_percent": round(100 * (labels == exact[0]).float().mean().item(), 3),
                    "confidence_off": harness.significant((confidence - exact[1]).abs().mean().item(), 3),
                }
    times = harness.measure(calls, args)
    return {
        "rows": [harness.row(name, one, args.batch, **numbers[name]) for name, one in times.items()] + failed,
        "images": sum(len(one) for one in images),
        "weights": "the recipe's" if args.recipe else "random",
    }


def batches(recipe: Recipe, device: torch.device, count: int) -> tuple[list[Tensor], int]:
    """Augmented images of the first steps of training, and the number of classes."""
    with open_train_loader(recipe, device) as loader:
        augment = Augment(recipe.augment, recipe.run.seed).to(device)
        steps: Iterator = itertools.chain.from_iterable(loader.epoch(epoch) for epoch in itertools.count())
        with torch.no_grad():
            return [augment(batch).images.clone() for batch in itertools.islice(steps, count)], loader.num_classes


def teacher_of(recipe: Recipe, spec: TeacherSpec, classes: int, device: torch.device) -> Callable[[Tensor], Any]:
    """One teacher as in a run of `recipe`: images `[B, 3, H, W]` -> targets."""
    alone = replace(recipe, distill=replace(recipe.distill, teachers=(spec,), assign=None, taps=None))
    teachers = build_teachers(alone, classes, device)
    assert isinstance(teachers, Teachers)
    make_fast(alone.run.compile, device, Augment(alone.augment, alone.run.seed), teachers)
    precision = precision_of(alone.run.precision, device)

    @torch.no_grad()
    def predict(images: Tensor) -> Any:
        with autocast(device, precision):
            return teachers(images)

    return predict


COLUMNS = {
    "teacher, precision": "name",
    "ms (quartiles)": "milliseconds",
    "CPU ms (quartiles)": "cpu_milliseconds",
    "images/s": "images_per_second",
    "labels of float32, %": "agree_percent",
    "confidence off by, nats": "confidence_off",
    "failed": "failed",
}


def show(report: dict[str, Any]) -> str:
    return harness.show(report, COLUMNS) + f"\n\nLabels of {report['images']} images, weights {report['weights']}."


if __name__ == "__main__":
    sys.exit(harness.main("teachers", run, show, add_arguments, text=__doc__))
