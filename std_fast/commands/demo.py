"""The demo: a Mixer distilled on handwritten digits, from image files to a table and a plot, without downloads."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.errors import UserError
from std_fast.config import recipe as recipes
from std_fast.runtime.budget import productive_seconds
from std_fast.runtime.metrics import read_jsonl
from std_fast.training.run import Stopped
from std_fast.training.train import train

DIGIT, CANVAS = 14, 24  # pixels
STUDENTS = {"plain": "digits_mixer", "STD": "digits_std"}


def write_digits(folder: Path) -> None:
    """scikit-learn's 1,797 handwritten digits (UCI, 8 x 8), each drawn 14 px high at a random place of a 24 px canvas.

    They become JPEGs: `train/DIGIT/*` and, of every second image of a class, `val/DIGIT/*`.

    The random places make the task hard for the student: a convolutional teacher recognises a digit anywhere, and an
    MLP that mixes patches by position has to learn that.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    random = np.random.default_rng(0)
    seen: dict[int, int] = {}
    for image, label in zip(digits.images, digits.target, strict=True):
        number = seen[label] = seen.get(label, -1) + 1
        part = folder / ("val" if number % 2 else "train") / str(label)
        part.mkdir(parents=True, exist_ok=True)
        digit = Image.fromarray((image * (255 / 16)).astype(np.uint8)).resize((DIGIT, DIGIT), Image.Resampling.BICUBIC)
        canvas = Image.new("RGB", (CANVAS, CANVAS))
        canvas.paste(digit.convert("RGB"), tuple(random.integers(0, CANVAS - DIGIT + 1, 2).tolist()))
        canvas.save(part / f"{number:03d}.jpg", quality=95)


def run_demo(out: Path, seeds: int = 3) -> tuple[dict, str]:
    """Makes the data, trains a teacher, then both students for each seed.

    Returns:
        The metrics, as written to `demo.json`, and the text to print.

    Raises:
        UserError: fewer than one seed, or the folder holds other runs.
    """
    if seeds < 1:
        raise UserError("--seeds: must be 1 or more")
    from pipelines.convert.job import ConvertSettings, convert

    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    for part in ("train", "val"):
        if not (out / "images" / part).is_dir():
            write_digits(out / "images")
        if not (out / f"{part}.beton").is_file():
            convert(str(out / "images" / part), str(out / f"{part}.beton"), settings=ConvertSettings())
    data = [("data.train", str(out / "train.beton")), ("data.val", str(out / "val.beton"))]

    rows: dict[str, list[dict]] = {"teacher": [], "plain": [], "STD": []}
    workers = max(1, min(len(os.sched_getaffinity(0)), 2 * seeds))
    spawn = multiprocessing.get_context("spawn")
    stopped = spawn.Event()
    with ProcessPoolExecutor(workers, spawn, initializer=begin, initargs=(stopped,)) as pool, ends_early(pool, stopped):
        rows["teacher"].append(logged("teacher", pool.submit(one_run, "digits_teacher", out / "teacher", 0, data)))
        students = []
        for seed in range(seeds):
            for name, recipe in STUDENTS.items():
                own = data + ([("distill.teachers.0.weights", str(out / "teacher"))] if name == "STD" else [])
                students.append((name, pool.submit(one_run, recipe, out / f"{name.lower()}-{seed}", seed, own)))
        for name, future in students:
            rows[name].append(logged(name, future))
    plot(rows, out / "curves.png")
    metrics: dict[str, Any] = {"rows": {name: [run["summary"] for run in runs] for name, runs in rows.items()}}
    metrics["seconds"] = round(time.perf_counter() - began, 1)
    (out / "demo.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    return metrics, text(rows, out, metrics["seconds"])


@contextlib.contextmanager
def ends_early(pool: Executor, stopped: Event) -> Iterator[None]:
    """An exception, such as Ctrl-C's, lets running trainings save and begins no further one."""
    try:
        yield
    except BaseException:
        stopped.set()
        pool.shutdown(cancel_futures=True)
        raise


def begin(stopped: Event) -> None:
    """Starts a worker, of one thread: small models train faster one on each core than in turn on all cores."""
    import torch

    torch.set_num_threads(1)
    one_run.stopped = stopped  # type: ignore[attr-defined]


def logged(name: str, future: Future) -> dict:
    """Waits for a run and prints its accuracy to standard error."""
    run = future.result()
    summary = run["summary"]
    took = productive_seconds(summary["seconds"])
    print(
        f"{name}, seed {summary['seed']}: top-1 {summary['result']['top1']:.2f} % after {took:.0f} s",
        file=sys.stderr,
        flush=True,
    )
    return run


def one_run(recipe: str, folder: Path, seed: int, overrides: list[tuple[str, str]]) -> dict:
    """Trains one run, or resumes it; returns its summary and its evaluations. Raises Stopped."""
    stopped: Event = one_run.stopped  # type: ignore[attr-defined]
    if stopped.is_set():
        raise Stopped("not begun")
    loaded = recipes.load(recipe, [*overrides, ("run.out", str(folder)), ("run.seed", str(seed))])
    summary_file = folder / "summary.json"
    if (folder / "recipe.yaml").is_file() and recipes.read_saved(folder) != loaded:
        raise UserError(
            f"{folder}: was made by another version of the demo; remove it and start again: rm -r {folder.parent}"
        )
    if summary_file.is_file():
        summary = json.loads(summary_file.read_text(encoding="utf-8"))
    else:
        try:
            summary = train(loaded, resume=True, quiet=True)
        except Stopped:
            stopped.set()  # the process may get the next run before this one's end has been told
            raise
    return {"summary": summary, "evals": [r for r in read_jsonl(folder / "metrics.jsonl") if r["kind"] == "eval"]}


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def text(rows: dict, out: Path, seconds: float) -> str:
    """The table, the files that were written, and the next commands."""
    lines = [f"{'model':<9}{'top-1 %':>16}{'images/s':>10}{'seconds':>9}   runs"]
    for name, runs in rows.items():
        summaries = [run["summary"] for run in runs]
        top1 = spread([s["result"]["top1"] for s in summaries])
        rate = statistics.fmean(s["images_per_second"] for s in summaries)
        took = statistics.fmean(productive_seconds(s["seconds"]) for s in summaries)
        lines.append(f"{name:<9}{top1:>16}{rate:>10.0f}{took:>9.1f}   {len(runs)}")
    gain = statistics.fmean(r["summary"]["result"]["top1"] for r in rows["STD"])
    gain -= statistics.fmean(r["summary"]["result"]["top1"] for r in rows["plain"])
    lines += [
        "",
        f"STD against plain, same recipe and samples: {gain:+.2f} points (mean ± deviation over seeds, 896 digits).",
        f"Took {seconds:.0f} s in all (images/s and seconds are of one run on one core, others beside it).",
        f"Curves: {out / 'curves.png'}; runs, logs and TensorBoard files: {out}/*/",
        "",
        "Next, with your own images in SRC/CLASS/*.jpg:",
        "  std-fast convert SRC my.beton",
        "  std-fast train digits_mixer --data.train my.beton --data.val my.beton --run.out runs/mine",
    ]
    return "\n".join(lines)


def plot(rows: dict, path: Path) -> None:
    """Validation accuracy against samples seen, one thin line a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120)
    axes = figure.subplots()
    for color, (name, runs) in zip(("0.5", "tab:blue", "tab:red"), rows.items(), strict=True):
        for i, run in enumerate(runs):
            x, y = [r["samples"] for r in run["evals"]], [r["top1"] for r in run["evals"]]
            label, style = None if i else name, "--" if name == "teacher" else "-"
            axes.plot(x, y, color=color, lw=1.2, marker=".", label=label, ls=style)
    axes.set(
        xlabel="training images seen",
        ylabel="validation top-1 (%)",
        title="Digits: teacher, plain Mixer, Mixer with STD",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
