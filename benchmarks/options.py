"""Time that the cheaper options save: one training step with each, over the step without.

Student (targets given): stochastic depth that skips what it drops, smaller images (students that take them), a step
without MINE, as all are but the first of an epoch, Muon. Teachers alone: input of five sevenths of the side. Time is
all that is measured here; the effect on accuracy needs a training.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks import harness, workload
from pipelines.augment.device import TrainBatch
from std_fast.models.drop_path import GROUP
from std_fast.training.build import Parts

BASE = "MINE in each step"
RATES = 0.1, 0.3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    workload.add_arguments(parser)
    workload.add_teachers(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    args.batch = args.batch or (1024 if args.device == "cuda" else GROUP)
    workload.settle(args)
    if args.smoke:
        args.teachers, args.batch = [workload.TINY_TEACHER], GROUP
    teachers = tuple(args.teachers)
    with workload.workplace(args, teachers) as folder, contextlib.ExitStack() as stack:
        recipe = workload.recipe_for(args, folder, teachers)
        recipe = replace(recipe, student=replace(recipe.student, drop_path=RATES[0]))
        skipping = [replace(recipe.student, drop_path=rate, drop_path_mode="subset") for rate in RATES]
        small = tuple(replace(spec, image_size=5 * args.image_size // 7) for spec in recipe.distill.teachers)
        variants = {
            BASE: recipe,
            **{f"skips at rate {s.drop_path:g}": replace(recipe, student=s) for s in skipping},
            "Muon": replace(recipe, optim=replace(recipe.optim, name="muon")),
            "small teachers": replace(recipe, distill=replace(recipe.distill, teachers=small)),
        }
        built = {name: stack.enter_context(workload.built(one)) for name, one in variants.items()}
        return compare(args, built)


def compare(args: argparse.Namespace, built: dict[str, Parts]) -> dict[str, Any]:
    base, cheap = built[BASE], built.pop("small teachers")
    given = workload.given_batch(base)
    steppers = {name: workload.Stepper(parts) for name, parts in built.items()}
    contestants: dict[str, Callable[[], object]] = {
        name: lambda step=step: step(given)  # type: ignore[misc]
        for name, step in steppers.items()
    }
    contestants["without MINE"] = functools.partial(steppers[BASE], given, with_mine=False)
    if getattr(base.trainer.student.backbone, "any_size", False):
        for side in (5 * args.image_size // 7, 4 * args.image_size // 7):
            contestants[f"images of {side} px"] = functools.partial(steppers[BASE], given, image_size=side)
    sizes = {"teachers, full size": base, f"teachers, {5 * args.image_size // 7} px": cheap}
    for name, parts in sizes.items():
        contestants[name] = teacher_pass(parts, given)
    times = harness.measure(contestants, args)
    for step in steppers.values():
        step.check()
    full_size, other = sizes
    ratios = [
        harness.ratio(f"{name} over {BASE}", times[name], times[BASE])
        for name in contestants
        if name not in (BASE, *sizes)
    ]
    return {
        "variant": workload.variant(args),
        "rows": [harness.row(name, one, args.batch) for name, one in times.items()],
        "ratios": [*ratios, harness.ratio(f"{other} over {full_size}", times[other], times[full_size])],
        "precision": str(workload.compute_dtype(base)).removeprefix("torch."),
    }


def teacher_pass(parts: Parts, batch: TrainBatch) -> Callable[[], object]:
    def run_teachers() -> None:
        assert parts.teachers is not None
        with torch.no_grad(), parts.trainer.autocast():
            parts.teachers(batch.images)

    return run_teachers


if __name__ == "__main__":
    sys.exit(harness.main("options", run, harness.show, add_arguments, text=__doc__))
