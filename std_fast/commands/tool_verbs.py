"""Verbs about models and the machine: info, bench, doctor."""

from __future__ import annotations

import argparse
import os
import shlex
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
    parser.add_argument("model", help="a student's or any timm model's name")
    parser.add_argument("--teachers", type=int, default=0, help="with STD modules for this many teachers [0]")
    parser.add_argument("--classes", type=int, default=1000, help="number of classes [1000]")
    parser.add_argument("--image-size", type=int, default=224, help="side of the images in pixels [224]")
    parser.add_argument("--options", default="{}", help="builder's options as YAML, e.g. '{patch_size: 4}'")
    add_json(parser)


def info(args: argparse.Namespace) -> None:
    import yaml

    from std_fast.commands.info import describe_model
    from std_fast.config import recipe as recipes
    from std_fast.config.files import RECIPES
    from std_fast.config.schema import read_yaml

    if (RECIPES / f"{args.model}.yaml").is_file():
        recipe = recipes.load(args.model)
        options = yaml.safe_dump(dict(recipe.student.options), default_flow_style=True, sort_keys=False, width=1000)
        teachers = f" --teachers {len(recipe.distill.teachers)}" * (recipe.distill.mode != "none")
        raise UserError(
            f"{args.model}: is the name of a recipe; its student: std-fast info {recipe.student.name} "
            f"--image-size {recipe.data.image_size}{teachers} --options {shlex.quote(options.strip())} --classes N"
        )
    options = read_yaml(args.options, "--options")
    if not isinstance(options, dict):
        raise UserError(f"--options: {args.options!r} is no YAML mapping; write e.g. '{{patch_size: 4}}'")
    data = describe_model(args.model, args.teachers, args.classes, args.image_size, options)
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
