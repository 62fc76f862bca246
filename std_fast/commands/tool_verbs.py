"""Verbs about models and the machine: info, bench, doctor."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from pipelines.errors import UserError
from std_fast.commands.arguments import Parser, Verb, add_json, show

BENCHMARKS = (
    "peers", "kernels", "step", "options", "accumulate", "overlap", "end_to_end", "compile", "roofline", "students",
    "teachers", "loader", "mine_gaussians", "budget_runs", "soak", "evidence", "codegen", "gpu_suite",
)  # fmt: skip


def add_info(parser: Parser) -> None:
    parser.add_argument("model", help="name of a student, a recipe or any timm model, a recipe file, or a run's folder")
    parser.add_argument("--classes", type=int, default=1000, help="number of classes [1000]")
    group = parser.add_argument_group("of a model", "a recipe has its own")
    group.add_argument("--teachers", type=int, help="with STD modules for this many teachers [0]")
    group.add_argument("--image-size", type=int, help="side of the images in pixels [224]")
    group.add_argument("--options", help="builder's options as YAML, e.g. '{patch_size: 4}'")
    add_json(parser)


def info(args: argparse.Namespace) -> None:
    from std_fast.commands.info import describe_model, describe_student
    from std_fast.config import recipe as recipes
    from std_fast.config.files import RECIPES
    from std_fast.config.schema import read_yaml

    given = {key: getattr(args, key) for key in ("teachers", "image_size", "options")}
    given = {key: value for key, value in given.items() if value is not None}
    if (
        args.model.endswith((".yaml", ".yml"))
        or Path(args.model, "recipe.yaml").is_file()
        or (RECIPES / f"{args.model}.yaml").is_file()
    ):
        if given:
            raise UserError(f"--{next(iter(given)).replace('_', '-')}: a recipe has its own; leave it out")
        data = describe_student(recipes.load(args.model), args.classes)
    else:
        if "options" in given:
            given["options"] = read_yaml(args.options, "--options")
            if not isinstance(given["options"], dict):
                raise UserError(f"--options: {args.options!r} is no YAML mapping; write e.g. '{{patch_size: 4}}'")
        data = describe_model(args.model, classes=args.classes, **given)
    show(args, data, "\n".join(f"{key}: {value}" for key, value in data.items()))


def add_bench(parser: Parser) -> None:
    parser.add_argument("name", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="...", help="its own arguments: std-fast bench NAME --help"
    )


def bench(args: argparse.Namespace) -> NoReturn:
    """The benchmark takes this process's place, and with it signals: std_fast imports no benchmark, and nothing is
    loaded that would disturb it."""
    package = Path(__file__).resolve().parents[1]
    home = package.parent if (package.parent / "benchmarks" / "harness.py").is_file() else package / "_benchmarks"
    path = os.pathsep.join(filter(None, [str(home), os.environ.get("PYTHONPATH")]))
    words = [sys.executable, "-m", f"benchmarks.{args.name}", *args.words]
    os.execve(sys.executable, words, {**os.environ, "PYTHONPATH": path})


def doctor(args: argparse.Namespace) -> int:
    from std_fast.commands import doctor

    return doctor.main(args.json)


VERBS = {
    "info": Verb(info, add_info, "parameters and multiply-accumulates of a model"),
    "bench": Verb(bench, add_bench, "time a part against what a user would otherwise run"),
    "doctor": Verb(doctor, add_json, "what is installed, what is missing, how to get it"),
}
