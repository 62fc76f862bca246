"""What compiling costs and gains: seconds of the first step, cold and from the cache, and the step after it.

Each mode runs twice, in two processes of its own: the first with an empty compile cache, the second with what the first
left in it. The step is the STD student's with given targets, as run.compile makes it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks import harness, workload
from pipelines.errors import UserError

UNCACHED = ("off", "eager", "aot_eager")  # nothing is kept between runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    workload.add_arguments(parser)
    parser.add_argument("--modes", nargs="+", default=[], help="values of run.compile [all that pay here]")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one process [300]")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # this process measures args.compile


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.one:
        return measure_one(args)
    workload.settle(args)
    modes = args.modes or ["off", "aot_eager", "inductor"] + ["max-autotune"] * (args.device == "cuda")
    if args.smoke:
        modes = ["eager"]
    rows: list[dict[str, Any]] = []
    for mode in modes:
        with tempfile.TemporaryDirectory(prefix="std-fast-compile-") as cache:
            for name in [mode] if mode in UNCACHED else [f"{mode}, cold", f"{mode}, warm"]:
                harness.progress(name)
                rows.append(child(args, mode, cache) | {"name": name})
    return {"variant": workload.variant(args), "rows": rows}


def child(args: argparse.Namespace, mode: str, cache: str) -> dict[str, Any]:
    """The row of a separate process; `failed` is the reason where there are no numbers."""
    words = [sys.executable, "-m", "benchmarks.compile", "--one", "--json", "--compile", mode, "--device", args.device]
    for name in ("model", "batch", "image_size", "classes", "precision", "repeats", "threads", "turn_seconds"):
        words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=args.limit, cwd=harness.ROOT, env=env)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {args.limit:g} s"}
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if done.returncode == 2:
            raise UserError(reason)
        return {"failed": reason[:200]}
    return harness.printed_report(done.stdout)["rows"][0]


def measure_one(args: argparse.Namespace) -> dict[str, Any]:
    teachers = (workload.TINY_TEACHER,) * 2  # the targets are given: these only have to be there
    with workload.workplace(args, teachers) as folder:
        with workload.built(workload.recipe_for(args, folder, teachers)) as parts:
            batch, step = workload.given_batch(parts), workload.Stepper(parts)
            times = harness.measure({"step": lambda: step(batch)}, args, warm_up=3)
            step.check()
    return {"rows": [harness.row("step", times["step"], args.batch)]}


COLUMNS = {
    "run.compile": "name",
    "first step, s": "first_call_seconds",
    "ms a step after it (quartiles)": "milliseconds",
    "CPU ms (quartiles)": "cpu_milliseconds",
    "images/s": "images_per_second",
    "peak GPU memory, MiB": "peak_memory_mib",
    "failed": "failed",
}


def show(report: dict[str, Any]) -> str:
    return harness.show(report, COLUMNS)


if __name__ == "__main__":
    sys.exit(harness.main("compile", run, show, add_arguments, text=__doc__))
