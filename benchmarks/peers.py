"""Our step beside what a user would otherwise run, eager and compiled, from the same batch with the same targets.

- STD, naive: timm's backbone, STD and MINE by concatenation, and DeiT's step, in which the host waits twice.
- plain, timm: timm's model of the same size in timm's own training step (its loss, AdamW and moving average).
- STD, ours and plain, ours: `Trainer.step` as `std-fast train` builds it, with and without STD.

At equal work compare STD with STD and plain with plain; in STD, ours over plain, timm the student does more work.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from benchmarks import harness, naive, workload
from pipelines.errors import UserError
from std_fast.config.recipe import Recipe
from std_fast.runtime.compiling import compiled
from std_fast.training.build import Parts, build_student

OURS, NAIVE, OUR_PLAIN, TIMM = "STD, ours", "STD, naive", "plain, ours", "plain, timm"
# of ResMLP-B24 timm has the patch-8 model only, which takes another patch size
TIMM_NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixer_s16": ("mixer_s16_224", {}),
    "mixer_b16": ("mixer_b16_224", {}),
    "resmlp_s24": ("resmlp_24_224", {}),
    "resmlp_b24": ("resmlp_big_24_224", {"patch_size": 16}),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    workload.add_arguments(parser)
    parser.add_argument("--only", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    parser.set_defaults(compile="inductor")


def run(args: argparse.Namespace) -> dict[str, Any]:
    workload.settle(args)
    if args.smoke:
        args.compile = "eager"  # traced, not compiled
    if args.model != "mixer" and args.model not in TIMM_NAMES:
        raise UserError(f"--model: timm has no {args.model}; take one of {', '.join(TIMM_NAMES)}")
    teachers = (workload.TINY_TEACHER,) * 2  # the targets are given: these only have to be there
    with workload.workplace(args, teachers) as folder, contextlib.ExitStack() as stack:
        steps: dict[str, Callable[[], object]] = {}
        ours: dict[str, workload.Stepper] = {}
        backend = args.compile
        for kind in args.only:
            args.compile = "off" if kind == "eager" else backend
            for name, given in ((OURS, teachers), (OUR_PLAIN, ())):
                recipe = workload.recipe_for(args, folder, given)
                parts = stack.enter_context(workload.built(recipe))
                ours[f"{name}, {kind}"] = workload.Stepper(parts)
            std = ours[f"{OURS}, {kind}"].parts
            batch = workload.given_batch(std)
            steps[f"{OURS}, {kind}"] = partial(ours[f"{OURS}, {kind}"], batch)
            steps[f"{OUR_PLAIN}, {kind}"] = partial(ours[f"{OUR_PLAIN}, {kind}"], replace(batch, targets=None))
            steps[f"{TIMM}, {kind}"] = partial(timm_step(std), batch)
            if kind == "eager":
                steps[f"{NAIVE}, {kind}"] = partial(naive_step(std), batch)
        times = harness.measure(steps, args)
        for stepper in ours.values():
            stepper.check()
    pairs = [
        (f"{OURS}, eager", f"{NAIVE}, eager"),
        (f"{OURS}, compiled", f"{NAIVE}, eager"),
        (f"{OUR_PLAIN}, eager", f"{TIMM}, eager"),
        (f"{OUR_PLAIN}, compiled", f"{TIMM}, compiled"),
        (f"{OURS}, eager", f"{TIMM}, eager"),
        (f"{OURS}, compiled", f"{TIMM}, compiled"),
    ]
    return {
        "variant": workload.variant(args),
        "rows": [harness.row(name, one, args.batch) for name, one in times.items()],
        "ratios": [harness.ratio(f"{a} over {b}", times[a], times[b]) for a, b in pairs if a in times and b in times],
        "precision": str(workload.compute_dtype(std)).removeprefix("torch."),
    }


def timm_backbone(recipe: Recipe, classes: int) -> nn.Module:
    """timm's model of the same shape as the student's backbone, with the same stochastic depth."""
    import timm
    from timm.models.mlp_mixer import MlpMixer

    student, size = recipe.student, recipe.data.image_size
    if student.name == "mixer":
        o = student.options
        ratio = (o["token_dim"] / o["dim"], o["channel_dim"] / o["dim"])
        return MlpMixer(
            classes, size, 3, o["patch_size"], o["depth"], o["dim"], ratio, drop_path_rate=student.drop_path
        )
    name, options = TIMM_NAMES[student.name]
    return timm.create_model(name, num_classes=classes, img_size=size, drop_path_rate=student.drop_path, **options)


def timm_step(parts: Parts) -> naive.TimmStep:
    """With the settings of the run that `parts` belongs to, compiled by the same backend."""
    o, classes = parts.recipe.optim, parts.train_loader.num_classes
    model = timm_backbone(parts.recipe, classes).to(parts.device).train()
    forward = compiled(model, parts.backend)
    return naive.TimmStep(model, forward, classes, o.smoothing, o.weight_decay, o.ema, parts.trainer.autocast)


def naive_step(parts: Parts) -> naive.DeiTStep:
    """With the settings of the run that `parts` belongs to, and STD modules of its own."""
    r, classes = parts.recipe, parts.train_loader.num_classes
    student = build_student(r, classes)
    model = naive.NaiveStudent(timm_backbone(r, classes), student).to(parts.device).train()
    o, d = r.optim, r.distill
    return naive.DeiTStep(
        model, classes, o.smoothing, d.alpha, o.weight_decay, o.ema, student.head_teacher, parts.trainer.autocast
    )


def show(report: dict[str, Any]) -> str:
    return harness.show(report)


if __name__ == "__main__":
    sys.exit(harness.main("peers", run, show, add_arguments, text=__doc__))
