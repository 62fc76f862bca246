"""Verbs that use finished runs: eval, predict, report, export.

Each begins with a line of what it does: importing torch and loading a model may take a minute.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import sys
from pathlib import Path

from pipelines.errors import UserError, printable, quantity
from std_fast.commands.arguments import Parser, Verb, add_json, printing, show
from std_fast.config.files import RECIPES
from std_fast.config.options import EVAL_FIELDS
from std_fast.runtime.process import say


def add_eval(parser: Parser) -> None:
    parser.add_argument("run", help="folder of a run or an export, or a checkpoint of a run; with --teacher a recipe")
    parser.add_argument(
        "data", nargs="?", default="", help="a .beton or image folder; by default the run's own data.val"
    )
    parser.add_argument("--backend", default="", help="read with this backend instead of the run's")
    parser.add_argument("--teacher", type=int, metavar="N", help="evaluate teacher N (from 0) of a recipe instead")
    parser.takes_recipe, parser.of_a_run = True, EVAL_FIELDS
    add_json(parser)


def evaluate(args: argparse.Namespace) -> None:
    from std_fast.config import recipe as recipes

    overrides = [*args.overrides, *([("data.backend", args.backend)] if args.backend else [])]
    recipe = None if args.teacher is None else recipes.load(args.run, overrides)
    if (
        recipe is None
        and not Path(args.run).is_dir()
        and (args.run.endswith((".yaml", ".yml")) or (RECIPES / f"{args.run}.yaml").is_file())
    ):
        raise UserError(f"{args.run}: is a recipe; name the folder of a run, or a teacher of the recipe: --teacher N")
    say(f"evaluating {printable(args.run)}{'' if recipe is None else f', teacher {args.teacher}'}")

    from std_fast.commands.predict import evaluate_export
    from std_fast.teachers.hub_folder import is_hub_folder
    from std_fast.training.evaluate import evaluate_run, evaluate_teacher, result_in_words

    if recipe is not None:
        result = evaluate_teacher(recipe, args.teacher, args.data)
    else:
        evaluate_folder = evaluate_export if is_hub_folder(Path(args.run)) else evaluate_run
        result = evaluate_folder(Path(args.run), args.data, overrides)
    show(args, result, result_in_words(result))


def add_predict(parser: Parser) -> None:
    parser.add_argument(
        "model",
        metavar="RUN_OR_EXPORT",
        help="folder of a run, or one that `std-fast export` wrote, or a checkpoint of a run",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="image files, folders of images, patterns")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="so many classes of each image [5]")
    parser.add_argument("--backend", default="", help="read with this backend instead of the run's")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="comma-separated values, a line for each class of an image")
    form.add_argument("--json", action="store_true", help="one JSON document on standard output")


def predict(args: argparse.Namespace) -> int:
    """Exit code 2 where a file was no image; the others are predicted."""
    say(f"loading the model of {printable(args.model)}")
    from std_fast.commands.predict import predict_images

    images: list[dict] = []
    faults: list[str] = []
    writer = csv.writer(sys.stdout, lineterminator="\n")
    found = predict_images(Path(args.model), args.images, args.top, args.backend)
    with printing():
        if args.csv:
            writer.writerow(["image", "rank", "label", "name", "words", "probability"])
        for path, guesses in found:
            if not guesses:
                faults.append(path)
            elif args.json:
                images.append({"image": path, "classes": [guess._asdict() for guess in guesses]})
            elif args.csv:
                rows = enumerate(guesses, 1)
                writer.writerows([path, rank, g.label, g.name, g.words, f"{g.probability:.6f}"] for rank, g in rows)
            else:
                print(printable(path))
                width = max(len(guess.name) for guess in guesses)
                for g in guesses:
                    print(f"  {100 * g.probability:6.2f} %  {g.label:5}  {g.name:<{width}}  {g.words}".rstrip())
        if args.json:
            print(json.dumps({"model": args.model, "images": images, "not_images": faults}, indent=1))
    return 2 if faults else 0


def add_report(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, finished or not, or checkpoints")
    parser.add_argument("--out", default="report", help="folder for report.html and the plots as PNG [report]")
    parser.add_argument("--images", type=int, default=12, help="validation images whose predictions are shown [12]")
    add_json(parser)


def report(args: argparse.Namespace) -> None:
    predicted = f", then predicting {quantity(args.images, 'image')} of each" * (args.images > 0)
    say(f"reading {quantity(len(args.runs), 'run')}{predicted}")
    from std_fast.commands.report import write_report

    data = write_report([Path(run) for run in args.runs], Path(args.out), args.images)
    show(args, data, data["html"])


def add_export(parser: Parser) -> None:
    parser.add_argument("run", help="folder of a run, or one of its checkpoints")
    parser.add_argument("out", help="the folder to make")
    parser.add_argument(
        "--formats", nargs="+", default=[], help="of timm, class-head, onnx, pt2; default: all that can be had"
    )
    parser.add_argument("--predict", default="", help="mean, class or distill; default: as the recipe says")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    add_json(parser)


def export(args: argparse.Namespace) -> None:
    if not args.quiet:
        say(f"exporting {printable(args.run)}: each format is written, read back and compared")
    if args.quiet or not sys.stderr.isatty():  # a line for each format is for a terminal
        logging.getLogger("std_fast").setLevel(logging.WARNING)
    from std_fast.commands.export import export_run

    done = export_run(args.run, args.out, tuple(args.formats), args.predict)
    lines = [f"{args.out}/{name}  {size / 1e6:.1f} MB" for name, size in done["files"].items()]
    for name, value in done["differences"].items():
        lines.append(f"{name}: read back, its logits differ from the student's by {value:.1e} of the largest")
    lines += [f"{name}: not written; {why}" for name, why in done["left_out"].items()]
    show(args, done, "\n".join(lines))


VERBS = {
    "eval": Verb(evaluate, add_eval, "accuracy of a run's or an export's weights on a data set"),
    "predict": Verb(predict, add_predict, "classes of image files, by a run or an exported model"),
    "report": Verb(report, add_report, "one HTML page about runs: accuracy, speed, where the hours went"),
    "export": Verb(export, add_export, "a run's model as safetensors for timm and the hub, ONNX and torch.export"),
}
