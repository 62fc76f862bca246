"""What each student costs: parameters, multiply-accumulates, and milliseconds an image, plain and with STD modules.

Time is that of one forward in evaluation mode, as a deployed model runs it (both students answer with all their heads).
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness
from std_fast.commands.info import describe_model
from std_fast.library import create_student
from std_fast.models import list_backbones

SMOKE = ("mixer_s16",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ["mixer_s16", "mixer_b16", "resmlp_s24", "resmlp_b24", "cyclemlp_b1", "cyclemlp_b2"]
    parser.add_argument("--students", nargs="+", default=names, choices=list_backbones(), metavar="NAME")
    parser.add_argument("--teachers", type=int, default=2, help="teachers that the STD modules serve [2]")
    parser.add_argument("--batch", type=int, default=4, help="images a forward [4]")
    parser.add_argument("--image-size", type=int, default=224)


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.smoke:
        args.students, args.batch = list(SMOKE), 1
    rows, ratios = [], []
    images = torch.randn(args.batch, 3, args.image_size, args.image_size, device=args.device)
    images = images.to(memory_format=torch.channels_last)
    for name in args.students:
        contestants: dict[str, Callable[[], object]] = {}
        kinds = {f"{name} plain": 0, f"{name} with STD": args.teachers}
        for kind, teachers in kinds.items():
            model = create_student(name, 1000, args.image_size, teachers=teachers).eval().to(args.device)
            contestants[kind] = functools.partial(torch.no_grad()(model), images)
        times = harness.measure(contestants, args)
        for kind, teachers in kinds.items():
            facts = describe_model(name, teachers, image_size=args.image_size)
            more = {key: facts[key] for key in ("parameters_millions", "gmacs")}
            more["ms_per_image"] = harness.spread([1e3 * t / args.batch for t in times[kind].turns], 3)
            rows.append(harness.row(kind, times[kind], args.batch, **more))
        over = harness.ratio(f"{name} plain over with STD", times[f"{name} plain"], times[f"{name} with STD"])
        over["gmacs_ratio"] = harness.significant(rows[-1]["gmacs"] / rows[-2]["gmacs"], 3)
        ratios.append(over)
    return {"rows": rows, "ratios": ratios}


def show(report: dict[str, Any]) -> str:
    columns = {"student": "name", "parameters, M": "parameters_millions", "GMACs": "gmacs", "ms/image": "ms_per_image"}
    return harness.show(report, columns)


if __name__ == "__main__":
    sys.exit(harness.main("students", run, show, add_arguments, text=__doc__))
