"""Verbs that train, or prepare a training: train, plan, teach, recipes, demo.

A recipe is loaded before torch is imported, which takes seconds: a mistake in one of its fields is an error at once.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import quantity
from std_fast.commands.arguments import NOT_FINITE, PEER_LOST, STOPPED, Parser, Verb, add_json, add_recipe, show
from std_fast.runtime.process import say

if TYPE_CHECKING:
    from std_fast.config.recipe import Recipe


def add_train(parser: Parser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--resume", action="store_true", help="continue from the run's newest complete checkpoint, if it has one"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    add_json(parser)


def train(args: argparse.Namespace) -> int:
    from std_fast.config import recipe as recipes
    from std_fast.config.files import check_data, filled_in
    from std_fast.runtime.folder_lock import check_free
    from std_fast.training import existing

    recipe = recipes.load(args.recipe, args.overrides)
    if args.resume and not any(key == "run.out" for key, _ in args.overrides):
        recipe = in_its_folder(args.recipe, recipe, args.quiet)
    where = filled_in(recipe.run.out, recipe.name, recipe.run.seed)
    alone = os.environ.get("WORLD_SIZE", "1") == "1"  # else rank 0 looks, and tells the others
    summary = existing.finished(recipe, where) if args.resume and alone else None
    if summary is not None and not args.quiet:
        say(existing.complete_line(where))
    if alone and not args.resume:
        check_free(where)
        existing.check_unused(recipe, where)
    if not args.resume:
        check_data(recipe.data.train, recipe.data.val)

    from std_fast.runtime.budget import in_words, process_seconds
    from std_fast.runtime.distributed import PeerLost, rank
    from std_fast.training.evaluate import result_in_words
    from std_fast.training.not_finite import NotFinite
    from std_fast.training.run import Stopped
    from std_fast.training.train import train as run_training

    try:
        summary = summary or run_training(recipe, args.resume, args.quiet, already=process_seconds())
    except (Stopped, NotFinite) as end:
        if rank() == 0:
            say(f"std-fast: {end}")
        return STOPPED if isinstance(end, Stopped) else NOT_FINITE
    except PeerLost as error:
        say(f"std-fast: {error}")
        return PEER_LOST
    if rank() != 0:
        return 0
    accuracy = result_in_words(summary["result"]) or "no validation data"
    hours = f"{summary['gpu_hours']:.4f} {'hours' if summary['device'].startswith('cpu') else 'GPU-hours'}"
    lines = [accuracy, f"{quantity(summary['steps'], 'step')}, {hours}, {where}"]
    text = "\n".join([*lines, in_words(summary["seconds"])])
    show(args, summary, text, kept=f"{where}/summary.json")
    return 0


def in_its_folder(name: str, recipe: Recipe, quiet: bool) -> Recipe:
    """The recipe with the folder in which it lies as `run.out`, where that is a run's: it may have been moved."""
    from std_fast.config.files import filled_in, find
    from std_fast.training.existing import checkpoints, is_complete

    file, out = find(name), filled_in(recipe.run.out, recipe.name, recipe.run.seed)
    folder = file.parent
    holds_run = file.name == "recipe.yaml" and (checkpoints(folder) or is_complete(folder))
    if not holds_run or out.resolve() == folder.resolve():
        return recipe
    if not quiet and os.environ.get("RANK", "0") == "0":
        say(f"{folder}: its recipe names {out}; the run continues in {folder}, as moved or copied")
    return replace(recipe, run=replace(recipe.run, out=str(folder)))


def add_plan(parser: Parser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--from", dest="stored", default="", metavar="JSON", help="a stored measurement, of any machine"
    )
    parser.add_argument(
        "--save", default="", metavar="JSON", help="store the measurement, for a plan on another machine"
    )
    parser.add_argument(
        "--gpus", type=int, default=0, help="GPUs that train together; 0: those of the measurement, or of this machine"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to measure, after the start [60]")
    add_json(parser)


def plan(args: argparse.Namespace) -> None:
    from std_fast.config import recipe as recipes
    from std_fast.config.files import check_data

    recipe = recipes.load(args.recipe, args.overrides)
    if not args.stored:
        check_data(recipe.data.train, recipe.data.val)

    from std_fast.commands import plan as plans

    made = plans.plan(recipe, args.stored, args.save, args.seconds, args.gpus)
    show(args, asdict(made), plans.as_text(made))


def add_teach(parser: Parser) -> None:
    add_recipe(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress")
    add_json(parser)


def teach(args: argparse.Namespace) -> int:
    from std_fast.config import recipe as recipes
    from std_fast.config.files import check_data

    recipe = recipes.load(args.recipe, args.overrides)
    check_data(recipe.data.train)

    from std_fast.commands.teach import teach as store_targets
    from std_fast.runtime.distributed import PeerLost, rank
    from std_fast.training.run import Stopped

    try:
        data = store_targets(recipe, quiet=args.quiet)
    except Stopped as end:
        if rank() == 0:
            say(f"std-fast: {end}")
        return STOPPED
    except PeerLost as error:
        say(f"std-fast: {error}")
        return PEER_LOST
    if rank() == 0:
        size = f"{quantity(data['epochs'], 'epoch')}, {data['bytes'] / 1e6:.1f} MB"
        text = f"{data['targets']}: {size}, {quantity(data['images'], 'image')} seen by the teachers"
        with_views = f" --distill.views {data['views']}" if data["views"] else ""
        show(args, data, f"{text}\ntrain with --distill.target-cache {data['targets']}{with_views}")
    return 0


def list_recipes(args: argparse.Namespace) -> None:
    from std_fast.config.files import RECIPES, read

    summaries = {path.stem: read(path.stem)["summary"] for path in sorted(RECIPES.glob("*.yaml"))}
    show(args, summaries, "\n".join(f"{name:<24} {summary}" for name, summary in summaries.items()))


def add_demo(parser: Parser) -> None:
    parser.add_argument("--out", default="runs/demo", help="folder for everything that it makes [runs/demo]")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each student [3]")
    add_json(parser)


def demo(args: argparse.Namespace) -> int:
    from std_fast.commands.demo import run_demo
    from std_fast.training.run import Stopped

    try:
        data, text = run_demo(Path(args.out), args.seeds)
    except (Stopped, KeyboardInterrupt):
        say("std-fast: stopped; the same command continues")
        return STOPPED
    show(args, data, text)
    return 0


VERBS = {
    "train": Verb(train, add_train, "train a recipe: a distilled student, a plain model, or a teacher"),
    "plan": Verb(plan, add_plan, "what a budget of GPU-hours buys, before it is spent"),
    "teach": Verb(teach, add_teach, "store the teacher targets, for any number of later runs"),
    "recipes": Verb(list_recipes, add_json, "the built-in recipes, a line each"),
    "demo": Verb(demo, add_demo, "distil a vision MLP on handwritten digits, in a few minutes, without downloads"),
}
