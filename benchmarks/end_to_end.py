"""From disk to updated weights, against the same run with its data on the device: what reading and decoding cost.

Both are the training loop's own batches and step. They take turns in one run: some steps from disk, then as many from
one raw batch that lies on the device; the first steps after each change are not timed, because the loader has worked
ahead meanwhile. Without --data the images are synthetic (as large as photographs of that resolution).
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import harness, workload
from pipelines.errors import UserError
from pipelines.read.batch import Loader
from std_fast.config.recipe import Recipe
from std_fast.training.run import Run

DISK, DEVICE = "from disk", "data on the device"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    workload.add_arguments(parser)
    parser.add_argument(
        "--teachers", nargs="*", default=list(workload.PRETRAINED), help="timm names; none: a plain run"
    )
    parser.add_argument("--data", default="", help="a .beton or image folder [synthetic]")
    parser.add_argument("--backend", default="auto", help="as data.backend [auto]")
    parser.add_argument("--overlap", choices=("off", "on"), default="off", help="as run.overlap [off]")
    parser.add_argument("--steps", type=int, default=0, help="of a turn [20 on a GPU, 3 on a CPU]")


def run(args: argparse.Namespace) -> dict[str, Any]:
    workload.settle(args)
    if args.smoke:
        args.teachers, args.backend, args.steps = [workload.TINY_TEACHER], "torch", 1
    args.steps = args.steps or (20 if args.device == "cuda" else 3)
    teachers = tuple(args.teachers)
    with workload.workplace(args, teachers, images=max(8 * args.batch, args.classes)) as folder:
        recipe = workload.recipe_for(args, folder, teachers)
        source = args.data or as_beton(folder / "images", args)
        data = replace(recipe.data, train=source, backend=args.backend, threads=args.threads)
        recipe = replace(recipe, data=data, run=replace(recipe.run, overlap=args.overlap, length="1000000 steps"))
        times, loader, waiting = alternate(recipe, args)
    return {
        "variant": workload.variant(args),
        "rows": [harness.row(name, one, args.batch) for name, one in times.items()],
        "ratios": [harness.ratio("from disk over data on the device", times[DISK], times[DEVICE])],
        "loader": type(loader).__name__,
        "data": {"path": args.data or "synthetic", "images": loader.source.num_samples},
        "waiting_percent": harness.significant(100 * waiting, 3),
    }


def as_beton(images: Path, args: argparse.Namespace) -> str:
    """The folder converted, or the folder itself where FFCV is not installed or not to be used."""
    if args.backend not in ("auto", "ffcv"):
        return str(images)
    from pipelines.convert.job import ConvertSettings, convert

    target = images.with_suffix(".beton")
    try:
        convert(str(images), str(target), settings=ConvertSettings(size=None))
    except UserError as error:
        if args.backend == "ffcv":
            raise
        harness.progress(f"{error}; reading the folder itself")
        return str(images)
    return str(target)


class Enough(Exception):
    """All turns are measured."""


def alternate(recipe: Recipe, args: argparse.Namespace) -> tuple[dict[str, harness.Times], Loader, float]:
    """Times of both; the loader; the share of its time that the loop from disk waited for data."""
    harness.progress("building")
    run = Run(recipe, quiet=True)
    loader = run.parts.train_loader
    with closing(run):
        alone = workload.same_batch_stream(run.parts, run.stream.source, run.stream.overlap)
        step = workload.Stepper(run.parts)
        skipped = recipe.data.ahead + 2
        wait, turns = harness.synchronizer(args.device), Turns(args.repeats)
        waited = [0.0, 0.0]

        def on_step(_: Run) -> None:
            place = turns.place()
            if place == skipped:
                wait()
                turns.begin()
                waited[0] -= loader.wait_seconds
            elif place == skipped + args.steps:
                wait()
                waited[0] += loader.wait_seconds
                waited[1] += turns.end(DISK, args.steps)
                time_alone()
                if turns.complete:
                    raise Enough
                turns.count = 0

        def time_alone() -> None:
            for number in range(skipped + args.steps):
                if number == skipped:
                    wait()
                    turns.begin()
                step(next(alone))
            wait()
            turns.end(DEVICE, args.steps)

        try:
            run.loop(on_step)
        except Enough:
            step.check()
    return turns.times, loader, waited[0] / waited[1]


class Turns:
    """Counts steps and keeps times; the first turn of each is to warm up."""

    def __init__(self, repeats: int) -> None:
        self.repeats, self.count, self.began = repeats, 0, 0.0
        self.times: dict[str, harness.Times] = {}

    def place(self) -> int:
        self.count += 1
        return self.count

    def begin(self) -> None:
        self.began = time.perf_counter()

    def end(self, name: str, steps: int) -> float:
        """Returns the turn's seconds."""
        seconds = time.perf_counter() - self.began
        if name in self.times:
            self.times[name].turns.append(seconds / steps)
            harness.progress(f"{name}: turn {len(self.times[name].turns)} of {self.repeats}")
        else:
            self.times[name] = harness.Times(seconds / steps)
        return seconds

    @property
    def complete(self) -> bool:
        return all(len(self.times[name].turns) >= self.repeats for name in (DISK, DEVICE))


COLUMNS = {"what": "name", "ms (quartiles)": "milliseconds", "images/s": "images_per_second"}


def show(report: dict[str, Any]) -> str:
    return harness.show(report, COLUMNS) + (
        f"\n\n{report['loader']}, {report['data']['images']} images ({report['data']['path']}); the loop waited for "
        f"data {report['waiting_percent']} % of the time."
    )


if __name__ == "__main__":
    sys.exit(harness.main("end_to_end", run, show, add_arguments, text=__doc__))
