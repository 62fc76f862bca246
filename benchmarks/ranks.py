"""Do two processes learn what one learns? The same short training by `std-fast train` and by `torchrun`, side by side.

Losses of every step, MINE's estimate, and the weights in the end; the recipe is the demo's student with its teacher, on
scikit-learn's digits, on the CPU over gloo. Both see the same global batch.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import harness
from pipelines.errors import UserError
from std_fast.commands.demo import write_digits
from std_fast.runtime import checkpoint
from std_fast.runtime.metrics import read_jsonl

FIGURES = ("loss", "loss_class", "loss_distill", "information")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=20, help="of the training [20]")
    parser.add_argument("--processes", type=int, default=2, help="of the second run [2]")


def run(args: argparse.Namespace) -> dict[str, Any]:
    steps = 2 if args.smoke else args.steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_digits(folder / "images")
        data = ["--data.train", str(folder / "images/train"), "--data.val", str(folder / "images/val")]
        data += ["--run.device", "cpu", "--run.log-every", "1", "--run.eval-every", "0 steps", "--quiet"]
        alone = [sys.executable, "-m", "std_fast.cli"]
        many = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        many += [str(args.processes), "-m", "std_fast.cli"]
        length = ["--run.length", f"{steps} steps"]
        call([*alone, "train", "digits_teacher", *data, *length, "--run.out", f"{name}/teacher"])
        std = ["train", "digits_std", *data, *length, "--distill.teachers.0.weights", f"{name}/teacher"]
        call([*alone, *std, "--run.out", f"{name}/one"])
        call([*many, *std, "--run.out", f"{name}/many"])
        return compare(folder / "one", folder / "many", args.processes)


def call(command: list[str]) -> None:
    harness.progress(" ".join(command[1:7]))
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"a training ended with exit code {done.returncode}: {done.stderr[-1000:]}")


def compare(one: Path, many: Path, processes: int) -> dict[str, Any]:
    first, second = (
        {r["step"]: r for r in read_jsonl(folder / "metrics.jsonl") if r["kind"] == "train"} for folder in (one, many)
    )
    assert first.keys() == second.keys()
    rows = []
    for step in first:
        row: dict[str, Any] = {"step": step}
        for figure in FIGURES:
            if figure in first[step]:
                row |= {figure: first[step][figure], f"{figure}_many": second[step][figure]}
        rows.append(row)
    found = [checkpoint.newest(folder / "checkpoints") for folder in (one, many)]
    assert found[0] is not None and found[1] is not None
    weights, others = found[0][1], found[1][1]
    # not psi's: where its gradient is zero but for rounding, Adam's steps are rounding too
    names = [name for name in weights if name.startswith("model.") and ".psi." not in name]
    return {
        "processes": processes,
        "rows": rows,
        "largest_difference": {
            figure: harness.significant(max(abs(row[figure] - row[f"{figure}_many"]) for row in rows), 2)
            for figure in FIGURES
        },
        "largest_weight_difference": harness.significant(
            max(float((weights[name].double() - others[name].double()).abs().max()) for name in names), 2
        ),
        "ratios": [],
    }


def show(report: dict[str, Any]) -> str:
    rows = [row for row in report["rows"] if row["step"] in (1, 2) or row["step"] % 5 == 0]
    lines = ["| step | " + " | ".join(f"{f}: 1 process, {report['processes']}" for f in FIGURES) + " |"]
    lines.append("|---" * (len(FIGURES) + 1) + "|")
    for row in rows:
        cells = [f"{row[f]:.6f}, {row[f'{f}_many']:.6f}" for f in FIGURES]
        lines.append(f"| {row['step']} | " + " | ".join(cells) + " |")
    largest = ", ".join(f"{figure} {value:g}" for figure, value in report["largest_difference"].items())
    return "\n".join(lines) + (
        f"\n\nLargest differences over {len(report['rows'])} steps: {largest}; of a weight "
        f"{report['largest_weight_difference']:g}."
    )


if __name__ == "__main__":
    sys.exit(harness.main("ranks", run, show, add_arguments, text=__doc__))
