"""`std-fast VERB`: parses, calls, and turns a user's mistake into one line and exit code 2."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import difflib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from pipelines.errors import UserError
from std_fast.runtime.memory import ran_out

# exit codes: saved and resumable; a loss or gradient was not finite; another process of the run died or hangs
STOPPED, NOT_FINITE, PEER_LOST = 3, 4, 5


BENCHMARKS = (
    "peers", "kernels", "step", "options", "overlap", "end_to_end", "compile", "roofline", "students", "teachers",
    "loader", "mine_gaussians", "ranks", "budget_runs", "soak", "evidence", "gpu_suite",
)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse with its errors as UserError: one line, without the usage."""

    takes_recipe = False

    def format_help(self) -> str:
        if self.takes_recipe:
            self.epilog = recipe_fields()
        return super().format_help()

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns the exit code (0 done, 2 the user's mistake, 3 to 5 see above)."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("std_fast").setLevel(logging.INFO)
    try:
        with stoppable() if argv[:1] == ["train"] else contextlib.nullcontext():
            return run(argv)
    except UserError as error:
        print(f"std-fast: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        what = " ".join(str(error).split()) or "no more to be had"
        print(f"std-fast: memory was short ({what}); use smaller batches or fewer workers", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has left, e.g. `| head`
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print("std-fast: interrupted", file=sys.stderr)
        return 130


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM or SIGUSR1 before a training has begun (importing torch takes seconds), or after it: exit code 3."""

    def leave(_signum: int, _frame: object) -> NoReturn:
        raise SystemExit(STOPPED)

    kept = {}
    with contextlib.suppress(ValueError):  # not the main thread
        for signum in (signal.SIGTERM, signal.SIGUSR1):
            kept[signum] = signal.signal(signum, leave)
    try:
        yield
    finally:
        for signum, handler in kept.items():
            signal.signal(signum, handler)


def entry(argv: list[str] | None = None) -> NoReturn:
    """`main` as a process, which ends at once: taking torch down would hold the GPU for one or two seconds."""
    code = main(argv)
    for signum in (signal.SIGTERM, signal.SIGUSR1):  # all is saved and said: a late one must not change the exit code
        signal.signal(signum, signal.SIG_IGN)
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):  # a reader that has left, a stream that is closed
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def run(argv: list[str]) -> int:
    from std_fast import __version__

    parser = Parser(prog="std-fast", description="Train vision MLPs by spatial-channel token distillation, fast.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)
    for name, (_, add, text) in VERBS.items():
        sub = verbs.add_parser(name, help=text, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name in argv:  # the others' arguments would import half the project
            add(sub)
    if argv and not argv[0].startswith("-") and argv[0] not in VERBS:
        near = difflib.get_close_matches(argv[0], VERBS, n=1, cutoff=0.0)[0]
        raise UserError(f"{argv[0]}: unknown verb; did you mean {near!r}? (verbs: {', '.join(VERBS)})")
    args, rest = parser.parse_known_args(argv)
    if args.verb is None:
        parser.print_help()
        return 0
    if hasattr(args, "recipe"):
        args.overrides = read_overrides(rest)
    elif rest:
        raise UserError(f"std-fast {args.verb}: unknown argument {rest[0]!r}; see std-fast {args.verb} --help")
    return VERBS[args.verb][0](args) or 0


def read_overrides(rest: list[str]) -> list[tuple[str, str]]:
    """`--a.b value` and `--a.b=value` pairs."""
    pairs, i = [], 0
    while i < len(rest):
        word = rest[i]
        if not word.startswith("--"):
            raise UserError(f"{word!r}: not expected here; a recipe's field is set by --section.key value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if i + 1 >= len(rest):
                raise UserError(f"--{key}: needs a value")
            value = rest[i + 1]
            i += 1
        pairs.append((key.replace("-", "_"), value))
        i += 1
    return pairs


def show(args: argparse.Namespace, data: dict, text: str) -> None:
    """One JSON document on standard output with --json, otherwise the text."""
    print(json.dumps(data, indent=1) if args.json else text)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    assert isinstance(parser, Parser)
    parser.add_argument("recipe", help="a recipe file, or the name of a built-in recipe")
    parser.takes_recipe = True


def recipe_fields() -> str:
    """For the help of a verb that takes a recipe. Importing them takes seconds: only help that is printed does."""
    from std_fast.config.recipe import Recipe
    from std_fast.config.schema import describe

    rows = [f"  --{name:<28} {text} [{default}]" for name, default, text in describe(Recipe)]
    rows.append("  --budget.gpu-hours N            the same as --run.length 'N gpu-hours'")
    return "fields of the recipe, each set by --section.key value:\n" + "\n".join(rows)


# -- verbs ----------------------------------------------------------------------------------------------------------


CONVERT_HELP = {
    "side": "which side `--size` limits: shortest or longest",
    "size": "images larger than this on that side are reduced to it; default: kept as they are",
    "quality": "of JPEGs that are encoded anew",
    "mode": "jpg, raw, or proportion (a share of them raw)",
    "raw_share": "with --mode proportion",
    "seed": "the samples are stored in an order shuffled by it; `none` keeps the source's order",
    "labels": "label file of a source that has none",
    "classes": "file with the class names in order: another beton's manifest, or one name a line",
    "split": "part of a source that holds several: train or test",
    "page_size": "bytes, a power of two; no sample may be larger",
    "max_pixels": "largest image that is accepted",
    "max_bytes": "largest encoded image that is accepted",
}


def add_convert(parser: argparse.ArgumentParser) -> None:
    from dataclasses import fields

    from pipelines.convert.job import ON_ERROR, ConvertSettings

    parser.add_argument(
        "src", help="image folder SRC/CLASS/*, ImageNet's tars, tar shards, parquet files or CIFAR's files"
    )
    parser.add_argument("dst", help="the .beton to write")
    for field in fields(ConvertSettings):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", default=None, help=f"{CONVERT_HELP[field.name]} [{field.default}]"
        )
    parser.add_argument("--workers", type=int, default=0, help="processes [one per core]")
    parser.add_argument(
        "--on-error", choices=ON_ERROR, default="stop", help="what to do about unreadable images [stop]"
    )
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="convert part I (from 0) of N, one beton each")
    add_json(parser)


def convert(args: argparse.Namespace) -> None:
    from pipelines.convert.job import ConvertSettings
    from pipelines.convert.job import convert as run_conversion
    from std_fast.config.schema import from_dict
    from std_fast.runtime.metrics import Progress

    given = {name: getattr(args, name) for name in CONVERT_HELP if getattr(args, name) is not None}
    settings = from_dict(ConvertSettings, {k: None if v == "none" else v for k, v in given.items()})
    part, slash, parts = args.shard.partition("/")
    if not (slash and part.isdigit() and parts.isdigit()):
        raise UserError(f"--shard: {args.shard!r} is not I/N, such as 0/4")
    bar: list[Progress] = []

    def progress(now: Any) -> None:  # of pipelines.convert.job
        if not bar:
            bar.append(Progress("converted", now.total, "images"))
        bar[0].update(now.done)
        left = f"{now.seconds_left:.0f} s left, " if now.phase == "converting" else ""
        bar[0].note(
            now.done, f"{now.phase}: {now.rate:.0f} images/s, {left}{now.estimated_bytes / 1e6:.0f} MB in the end"
        )

    try:
        manifest = run_conversion(
            args.src,
            args.dst,
            settings=settings,
            workers=args.workers,
            on_error=args.on_error,
            shard=(int(part), int(parts)),
            progress=progress,
        )
    finally:
        for one in bar:
            one.close()
    counts = manifest["counts"]
    show(args, manifest, f"{args.dst}: {json.dumps(counts)}")


def add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="a .beton")
    parser.add_argument("--sheet", default="", metavar="PNG", help="draw a contact sheet of its images")
    add_json(parser)


def inspect(args: argparse.Namespace) -> None:
    from pipelines.convert.verify import contact_sheet
    from pipelines.convert.verify import inspect as look

    data = look(args.path)
    if args.sheet:
        contact_sheet(args.path, args.sheet)
    show(args, data, "\n".join(f"{key}: {value}" for key, value in data.items()))


def add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="a .beton")
    parser.add_argument("--decode", action="store_true", help="decode every image too")
    add_json(parser)


def verify(args: argparse.Namespace) -> int:
    from pipelines.convert.verify import verify as check

    faults = check(args.path, decode=args.decode)
    show(args, {"path": args.path, "faults": faults}, "\n".join(faults) or f"{args.path}: whole")
    return 1 if faults else 0


def add_warm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="a .beton")
    add_json(parser)


def warm(args: argparse.Namespace) -> None:
    from pipelines.convert.verify import warm as read_through

    data = read_through(args.path)
    show(args, data, "\n".join(f"{key}: {value}" for key, value in data.items()))


def add_train(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        choices=["auto"],
        help="go on from the newest whole checkpoint of the run's folder, if it has one",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    add_json(parser)


def train(args: argparse.Namespace) -> int:
    from std_fast.config import files as recipe_files
    from std_fast.runtime.held import starting

    with starting(recipe_files.run_folder(recipe_files.read(args.recipe, args.overrides))):
        return train_recipe(args)


def train_recipe(args: argparse.Namespace) -> int:
    from std_fast.config import recipe as recipes
    from std_fast.runtime.budget import in_words
    from std_fast.runtime.distributed import PeerLost, rank
    from std_fast.training.not_finite import NotFinite
    from std_fast.training.run import Stopped, resolved
    from std_fast.training.run import train as run_training

    recipe = recipes.load(args.recipe, args.overrides)
    try:
        summary = run_training(recipe, resume=bool(args.resume), quiet=args.quiet)
    except (Stopped, NotFinite) as end:
        if rank() == 0:
            print(f"std-fast: {end}", file=sys.stderr)
        return STOPPED if isinstance(end, Stopped) else NOT_FINITE
    except PeerLost as error:
        print(f"std-fast: {error}", file=sys.stderr)
        return PEER_LOST
    if rank() != 0:
        return 0
    result = summary["result"]
    heads = "  ".join(f"{k} {v:.2f} %" for k, v in result.items() if k.startswith("top1"))
    where = resolved(recipe).run.out
    lines = [heads or "no validation data", f"{summary['steps']} steps, {summary['gpu_hours']:.4f} GPU-hours, {where}"]
    show(args, summary, "\n".join([*lines, in_words(summary["seconds"])]))
    return 0


def add_plan(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--from", dest="stored", default="", metavar="JSON", help="a stored measurement, of any machine"
    )
    parser.add_argument(
        "--save", default="", metavar="JSON", help="store the measurement, for a plan on another machine"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to measure, after the start [60]")
    add_json(parser)


def plan(args: argparse.Namespace) -> None:
    from std_fast.commands import plan as plans
    from std_fast.config import recipe as recipes

    made = plans.plan(recipes.load(args.recipe, args.overrides), args.stored, args.save, args.seconds)
    show(args, plans.as_dict(made), plans.as_text(made))


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, finished or not")
    parser.add_argument("--out", default="report", help="folder for report.html and the plots as PNG [report]")
    parser.add_argument("--images", type=int, default=12, help="validation images whose predictions are shown [12]")
    add_json(parser)


def report(args: argparse.Namespace) -> None:
    from std_fast.commands.report import write_report

    data = write_report([Path(run) for run in args.runs], Path(args.out), args.images)
    show(args, data, data["html"])


def add_teach(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--views", default="", metavar="N", help="store N views of each image, cycled: distill.views")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    add_json(parser)


def teach(args: argparse.Namespace) -> int:
    from std_fast.commands.teach import teach as ask_teachers
    from std_fast.config import recipe as recipes
    from std_fast.runtime.distributed import PeerLost, rank

    views = [("distill.views", args.views)] if args.views else []
    try:
        data = ask_teachers(recipes.load(args.recipe, [*args.overrides, *views]), quiet=args.quiet)
    except PeerLost as error:
        print(f"std-fast: {error}", file=sys.stderr)
        return PEER_LOST
    if rank() == 0:
        text = f"{data['targets']}: {data['epochs']} epochs, {data['bytes'] / 1e6:.1f} MB, {data['asked']} images asked"
        with_views = f" --distill.views {data['views']}" if data["views"] else ""
        show(args, data, f"{text}\ntrain with --distill.target-cache {data['targets']}{with_views}")
    return 0


def add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="folder of a run")
    parser.add_argument(
        "data", nargs="?", default="", help="a .beton or image folder; by default the run's own data.val"
    )
    parser.add_argument("--backend", default="", help="read with this backend instead of the run's")
    add_json(parser)


def evaluate(args: argparse.Namespace) -> None:
    from std_fast.training.evaluate import evaluate_run

    result = evaluate_run(Path(args.run), args.data, args.backend)
    show(args, result, "\n".join(f"{key} {value:.4g}" for key, value in result.items()))


def add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a student's or any timm model's name")
    parser.add_argument("--teachers", type=int, default=0, help="with STD modules for this many teachers")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--options", default="{}", help="builder's options as YAML, e.g. '{patch_size: 4}'")
    add_json(parser)


def info(args: argparse.Namespace) -> None:
    from std_fast.commands.info import describe_model
    from std_fast.config.schema import read_yaml

    options = read_yaml(args.options, "--options")
    if not isinstance(options, dict):
        raise UserError(f"--options: {args.options!r} is no YAML mapping; write e.g. '{{patch_size: 4}}'")
    data = describe_model(args.model, args.teachers, args.classes, args.image_size, options)
    show(args, data, "\n".join(f"{key}: {value}" for key, value in data.items()))


def add_recipes(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def list_recipes(args: argparse.Namespace) -> None:
    from std_fast.config.files import RECIPES, read

    summaries = {path.stem: read(path.stem)["summary"] for path in sorted(RECIPES.glob("*.yaml"))}
    show(args, summaries, "\n".join(f"{name:<24} {summary}" for name, summary in summaries.items()))


def add_preview(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--out", default="preview.png", help="the PNG to write [preview.png]")
    parser.add_argument("--epoch", type=int, default=0)
    parser.add_argument("--images", type=int, default=64, help="how many of the epoch's first images [64]")


def preview(args: argparse.Namespace) -> None:
    from std_fast.config import recipe as recipes
    from std_fast.training.build import preview as draw

    draw(recipes.load(args.recipe, args.overrides), Path(args.out), args.epoch, args.images)
    print(args.out)


def add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("out", help="the folder to make")
    parser.add_argument(
        "--formats", nargs="+", default=[], help="of timm, class-head, onnx, pt2; default: all that can be had"
    )
    parser.add_argument("--predict", default="", help="mean, class or distill; default: as the recipe says")
    add_json(parser)


def export(args: argparse.Namespace) -> None:
    from std_fast.commands.export import export_run

    report = export_run(args.run, args.out, tuple(args.formats), args.predict)
    lines = [f"{args.out}/{name}  {size / 1e6:.1f} MB" for name, size in report["files"].items()]
    lines += [f"{name}: read back, logits differ by {value:.1e}" for name, value in report["differences"].items()]
    lines += [f"{name}: left out, {why}" for name, why in report["left_out"].items()]
    show(args, report, "\n".join(lines))


def add_doctor(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def doctor(args: argparse.Namespace) -> int:
    from std_fast.commands import doctor as look

    return look.main(args.json)


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="runs/demo", help="folder for everything that it makes")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each student")
    add_json(parser)


def demo(args: argparse.Namespace) -> None:
    from std_fast.commands.demo import run_demo

    data, text = run_demo(Path(args.out), args.seeds)
    show(args, data, text)


def add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="...", help="its own arguments: std-fast bench NAME --help"
    )


def bench(args: argparse.Namespace) -> int:
    """In a process of its own: std_fast imports no benchmark, and nothing is loaded that would disturb it."""
    try:
        return subprocess.run([sys.executable, "-m", f"benchmarks.{args.name}", *args.words]).returncode
    except KeyboardInterrupt:  # the benchmark got it too
        return 130


Verb = tuple[Callable[[argparse.Namespace], "int | None"], Callable[[argparse.ArgumentParser], None], str]
VERBS: dict[str, Verb] = {
    "convert": (convert, add_convert, "image folder, tars, parquet or CIFAR files to .beton"),
    "inspect": (inspect, add_inspect, "what a .beton holds"),
    "verify": (verify, add_verify, "whether a .beton is whole and as its manifest says"),
    "warm": (warm, add_warm, "read a .beton into the page cache"),
    "train": (train, add_train, "train a recipe: a distilled student, a plain model, or a teacher"),
    "plan": (plan, add_plan, "what a budget of GPU-hours buys, before it is spent"),
    "report": (report, add_report, "one HTML page about runs: accuracy, speed, where the hours went"),
    "teach": (teach, add_teach, "store the teacher targets, for any number of later runs"),
    "eval": (evaluate, add_eval, "accuracy of a run's weights on a data set"),
    "export": (export, add_export, "a run's model as safetensors for timm and the hub, ONNX and torch.export"),
    "recipes": (list_recipes, add_recipes, "the built-in recipes, a line each"),
    "preview": (preview, add_preview, "draw what a student sees: a contact sheet of augmented images"),
    "info": (info, add_info, "parameters and multiply-accumulates of a model"),
    "bench": (bench, add_bench, "time a part against what a user would otherwise run"),
    "doctor": (doctor, add_doctor, "what is installed, what is missing, how to get it"),
    "demo": (demo, add_demo, "distil a vision MLP on handwritten digits, in a few minutes, without downloads"),
}


if __name__ == "__main__":
    entry()
