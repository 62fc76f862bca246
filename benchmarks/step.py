"""What one training step costs, and what of it is due to what.

The plain backbone's step; the STD student's with the teacher targets given, with MINE (as in the first step of an epoch
of the published recipes) and without (as in the others); with the targets read from a store, and
with the teachers running (both from a raw batch that lies on the device, augmentation included); and augmentation and
teachers on their own. MFU counts the products' operations, forward and backward, against the matrix product that this
machine was measured to reach just before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks import harness, workload
from std_fast.method.losses import TeacherTargets
from std_fast.teachers.stream import CachedSource, TeacherSource
from std_fast.teachers.target_format import pack
from std_fast.training.build import Parts

PLAIN, GIVEN, STORED, RUNNING = "plain backbone", "STD, targets given", "STD, targets stored", "STD, teachers running"
NO_MINE = "STD, targets given, no MINE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    workload.add_arguments(parser)
    workload.add_teachers(parser)
    parser.add_argument(
        "--recipe", default="", help="a built-in recipe's student, sizes and teachers, e.g. cifar10_std"
    )
    parser.add_argument("--profile", action="store_true", help="also list the ten longest kernels of the STD step")


def run(args: argparse.Namespace) -> dict[str, Any]:
    workload.settle_recipe(args)
    workload.settle(args)
    if args.smoke:
        args.teachers = [workload.TINY_TEACHER] * 2
    teachers = tuple(args.teachers)
    with workload.workplace(args, teachers) as folder:
        plain_recipe = workload.recipe_for(args, folder, ())
        recipe = workload.recipe_for(args, folder, teachers, target_cache=str(folder / "targets"))
        with workload.built(plain_recipe) as plain, workload.built(recipe) as std:
            return compare(args, plain, std)


def compare(args: argparse.Namespace, plain: Parts, std: Parts) -> dict[str, Any]:
    raw, given = workload.raw_batch(std), workload.given_batch(std)
    bare = replace(given, targets=None)
    assert given.targets is not None and std.target_cache is not None and std.teachers is not None
    store(std, given.targets)
    plain_step, step = workload.Stepper(plain), workload.Stepper(std)
    stored = workload.same_batch_stream(std, CachedSource(std.target_cache, None))
    teachers = TeacherSource(std.teachers, std.trainer.autocast)
    batches = workload.same_batch_stream(std, teachers)

    contestants: dict[str, Callable[[], object]] = {
        PLAIN: lambda: plain_step(bare),
        GIVEN: lambda: step(given),
        NO_MINE: lambda: step(given, with_mine=False),
        STORED: lambda: step(next(stored)),
        RUNNING: lambda: step(next(batches)),
        "augmentation alone": torch.no_grad()(lambda: std.augment(raw)),
        "teachers alone": lambda: teachers.targets(given),
    }
    flops = {
        PLAIN: workload.step_flops(plain, bare),
        GIVEN: workload.step_flops(std, given),
        NO_MINE: workload.step_flops(std, given, with_mine=False),
    }
    ceiling = workload.matmul_ceiling(args.device, workload.compute_dtype(std))
    times = harness.measure(contestants, args)
    plain_step.check()
    step.check()
    rows = []
    for name, one in times.items():
        more = {}
        if name in flops:
            rate = flops[name] * args.batch / one.seconds
            more = {"gflop_per_image": round(flops[name] / 1e9, 3), "mfu_percent": round(100 * rate / ceiling, 1)}
        rows.append(harness.row(name, one, args.batch, **more))
    ratios = [
        harness.ratio("STD (targets given) over the plain backbone", times[GIVEN], times[PLAIN]),
        harness.ratio("targets stored over teachers running", times[STORED], times[RUNNING]),
    ]
    parts = sum(times[name].seconds for name in (GIVEN, "augmentation alone", "teachers alone"))
    report = {
        "variant": workload.variant(args),
        "rows": rows,
        "ratios": ratios,
        "matmul_ceiling_tflops": harness.significant(ceiling / 1e12),
        "shares": [share(name, flops, times) for name in (GIVEN, NO_MINE)],
        "running_over_sum_of_parts": harness.significant(times[RUNNING].seconds / parts),
        "precision": str(workload.compute_dtype(std)).removeprefix("torch."),
    }
    if args.profile:
        report["profile"] = longest_kernels(contestants[GIVEN], args.device)
    return report


def share(name: str, flops: dict[str, int], times: dict[str, harness.Times]) -> dict[str, Any]:
    """What a step costs beyond the plain one: in arithmetic and in time, and the quotient of the two."""
    arithmetic = flops[name] / flops[PLAIN] - 1
    of, over = ([*(t.processor or t.turns)] for t in (times[name], times[PLAIN]))
    time = times[name].seconds / times[PLAIN].seconds - 1
    rounds = harness.spread([100 * (a / b - 1) for a, b in zip(of, over, strict=True)], 3)
    return {
        "what": name,
        "arithmetic_percent": harness.significant(100 * arithmetic, 3),
        "time_percent": rounds | {"median": harness.significant(100 * time, 3)},
        "time_over_arithmetic": harness.significant(time / arithmetic, 3),
    }


def store(parts: Parts, targets: TeacherTargets) -> None:
    """Writes epoch 0 of the run's store with the same targets for every step."""
    assert parts.target_cache is not None
    writer = parts.target_cache.writer(0)
    for number in range(parts.train_loader.steps_per_epoch):
        writer.add(number, pack(targets))
    writer.end()
    parts.target_cache.wait()


def longest_kernels(call: Callable[[], object], device: str, steps: int = 5) -> list[dict[str, Any]]:
    """The ten kernels (on a CPU: operators) that take most time, with their share of all."""
    from torch.profiler import ProfilerActivity, profile

    kind = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]) as found:
        for _ in range(steps):
            call()
        harness.synchronizer(device)()
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    return [
        {
            "kernel": event.key[:100],
            "calls_per_step": event.count / steps,
            "ms_per_step": harness.significant(getattr(event, key) / 1e3 / steps),
            "percent": round(100 * getattr(event, key) / total, 1),
        }
        for event in events[:10]
    ]


def show(report: dict[str, Any]) -> str:
    text = harness.show(report)
    columns = {
        "beyond the plain step": "what", "arithmetic, %": "arithmetic_percent", "time, % (quartiles)": "time_percent",
        "time over arithmetic": "time_over_arithmetic",
    }  # fmt: skip
    text += "\n\n" + harness.table(report["shares"], columns)
    text += (
        f"\n\nWith the teachers running, a step takes {report['running_over_sum_of_parts']} of the sum of its parts. "
        f"Ceiling of matrix products: {report['matmul_ceiling_tflops']} TFLOP/s in {report['precision']}."
    )
    if "profile" in report:
        columns = {name: name for name in ("kernel", "calls_per_step", "ms_per_step", "percent")}
        text += "\n\n" + harness.table(report["profile"], columns)
    return text


if __name__ == "__main__":
    sys.exit(harness.main("step", run, show, add_arguments, text=__doc__))
