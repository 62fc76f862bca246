"""What gradient accumulation costs: the same steps on the same batches, each in one, two and four pieces.

The student with targets given, MINE in the first step only, as in an epoch of the recipe. Losses, time and memory.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import harness, workload

STEPS = 20
WARM_UP = 2  # the first steps, which compile and choose kernels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    workload.add_arguments(parser)
    parser.add_argument("--pieces", type=int, nargs="+", default=[1, 2, 4], help="of a batch [1 2 4]")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"[{STEPS}]")


def run(args: argparse.Namespace) -> dict[str, Any]:
    args.batch = args.batch or 256
    workload.settle(args)
    if args.smoke:
        args.batch, args.steps = 16, 4
    teachers = (workload.TINY_TEACHER,) * 2
    with workload.workplace(args, teachers) as folder:
        recipe = workload.recipe_for(args, folder, teachers)
        rows = []
        for pieces in args.pieces:
            cut = replace(recipe.run, micro_batch=args.batch // pieces, out=str(folder / f"run-{pieces}"))
            with workload.built(replace(recipe, run=type(cut)(**vars(cut)))) as parts:
                rows.append(steps_of(parts, pieces, args))
    first = rows[0].pop("losses")
    for row, losses in zip(rows, [first, *(row.pop("losses") for row in rows[1:])], strict=True):
        row["largest_difference"] = harness.significant(max(abs(a - b) for a, b in zip(losses, first, strict=True)))
        row["first_loss"], row["last_loss"] = round(losses[0], 5), round(losses[-1], 5)
        row["losses"] = losses
    return {"variant": workload.variant(args), "rows": rows}


def steps_of(parts: Any, pieces: int, args: argparse.Namespace) -> dict[str, Any]:
    """Trains; every step gets another batch, the same for any number of pieces."""
    step, wait, losses, seconds = workload.Stepper(parts), harness.synchronizer(args.device), [], []
    reset_peak(args.device)
    for number in range(args.steps):
        batch = workload.given_batch(parts, seed=number)
        wait()
        began = time.perf_counter()
        step(batch, with_mine=number == 0)
        wait()
        seconds.append(time.perf_counter() - began)
        losses.append(parts.trainer.meters.read()["loss"])
    step.check()
    timed = seconds[WARM_UP:] or seconds
    return {
        "name": f"{pieces} x {args.batch // pieces}",
        "milliseconds": harness.spread([1e3 * value for value in timed]),
        "images_per_second": harness.significant(args.batch / statistics.median(timed)),
        "peak_mib": peak(args.device),
        "losses": losses,
    }


def reset_peak(device: str) -> None:
    """Forgets the peak of the GPU's memory, or on Linux of this process's resident memory."""
    harness.reset_peak_memory(device)
    if device == "cpu" and Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak(device: str) -> int | None:
    if device != "cpu":
        return round(harness.peak_memory(device) or 0)
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    return next((int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM:")), None)


COLUMNS = {
    "passes x images": "name",
    "ms a step (quartiles)": "milliseconds",
    "images/s": "images_per_second",
    "peak memory, MiB": "peak_mib",
    "loss of the first step": "first_loss",
    "of the last": "last_loss",
    "largest difference to the first row": "largest_difference",
}


def show(report: harness.Report) -> str:
    return harness.show(report, COLUMNS)


if __name__ == "__main__":
    sys.exit(harness.main("accumulate", run, show, add_arguments, text=__doc__))
