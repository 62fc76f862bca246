"""Verbs that use finished runs: eval, report, export."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipelines.errors import UserError
from std_fast.commands.arguments import Parser, Verb, add_json, show


def add_eval(parser: Parser) -> None:
    parser.add_argument("run", help="folder of a run; with --teacher a recipe")
    parser.add_argument(
        "data", nargs="?", default="", help="a .beton or image folder; by default the run's own data.val"
    )
    parser.add_argument("--backend", default="", help="read with this backend instead of the run's")
    parser.add_argument("--teacher", type=int, metavar="N", help="evaluate teacher N (from 0) of a recipe instead")
    parser.takes_recipe = True
    add_json(parser)


def evaluate(args: argparse.Namespace) -> None:
    from std_fast.config import recipe as recipes
    from std_fast.training.evaluate import evaluate_run, evaluate_teacher

    if args.teacher is not None:
        recipe = recipes.load(args.run, args.overrides)
        result = evaluate_teacher(recipe, args.teacher, args.data, args.backend)
    elif args.overrides:
        raise UserError(f"--{args.overrides[0][0]}: a run is evaluated as its recipe says; only --teacher takes fields")
    else:
        result = evaluate_run(Path(args.run), args.data, args.backend)
    show(args, result, "\n".join(f"{key} {value:.4g}" for key, value in result.items()))


def add_report(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, finished or not")
    parser.add_argument("--out", default="report", help="folder for report.html and the plots as PNG [report]")
    parser.add_argument("--images", type=int, default=12, help="validation images whose predictions are shown [12]")
    add_json(parser)


def report(args: argparse.Namespace) -> None:
    from std_fast.commands.report import write_report

    data = write_report([Path(run) for run in args.runs], Path(args.out), args.images)
    show(args, data, data["html"])


def add_export(parser: Parser) -> None:
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("out", help="the folder to make")
    parser.add_argument(
        "--formats", nargs="+", default=[], help="of timm, class-head, onnx, pt2; default: all that can be had"
    )
    parser.add_argument("--predict", default="", help="mean, class or distill; default: as the recipe says")
    add_json(parser)


def export(args: argparse.Namespace) -> None:
    from std_fast.commands.export import export_run

    done = export_run(args.run, args.out, tuple(args.formats), args.predict)
    lines = [f"{args.out}/{name}  {size / 1e6:.1f} MB" for name, size in done["files"].items()]
    lines += [f"{name}: read back, logits differ by {value:.1e}" for name, value in done["differences"].items()]
    lines += [f"{name}: left out, {why}" for name, why in done["left_out"].items()]
    show(args, done, "\n".join(lines))


VERBS = {
    "eval": Verb(evaluate, add_eval, "accuracy of a run's weights on a data set"),
    "report": Verb(report, add_report, "one HTML page about runs: accuracy, speed, where the hours went"),
    "export": Verb(export, add_export, "a run's model as safetensors for timm and the hub, ONNX and torch.export"),
}
