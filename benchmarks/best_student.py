"""Table and figure of the best students for a cost, from a stored result; see evidence.md. The times of their steps:

OMP_NUM_THREADS=1 python -m benchmarks.best_student RECIPE...     # in turns, when the machine does nothing else
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.study import one_step
from std_fast.config import recipe as recipes
from std_fast.training.build import build

COLUMNS = {
    "student": "student",
    "parameters": "parameters",
    "training": "training",
    "recipe": "recipe",
    "step of 128, ms": "step_ms",
    "CPU minutes": "minutes",
    "epochs": "epochs",
    "top-1, %": "top1",
}


def show(report: harness.Report) -> str:
    """One table of the students compared on images held out, one of those read from the validation images."""
    parts = []
    for images in ("held out", "validation"):
        rows = [row | {"top1": f"{row['top1']:.1f} ± {row['error']:.1f}"} for row in report["students"]]
        parts.append(f"{images}:\n\n" + harness.table([row for row in rows if row["images"] == images], COLUMNS))
    return "\n\n".join(parts)


def draw(report: harness.Report, path: Path) -> None:
    """Validation accuracy over processor time, a line for each family of students and way of training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    lines: dict[str, list[harness.Report]] = {}
    for row in report["students"]:
        if row["images"] == "validation":
            lines.setdefault(f"{row['student'].split()[0]}, {row['training']}", []).append(row)
    for label, rows in lines.items():
        rows.sort(key=lambda row: row["minutes"])
        x, y, error = zip(*[(row["minutes"], row["top1"], row["error"]) for row in rows], strict=True)
        axis.errorbar(x, y, error, marker="o", capsize=3, label=label)
    axis.set(xscale="log", xlabel="minutes of one core, teachers' excluded", ylabel="top-1, %")
    axis.set_title("Imagenette at 128 px: accuracy over cost, each run trained to its end")
    ticks = sorted({round(row["minutes"]) for rows in lines.values() for row in rows})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def time_steps(names: Sequence[str], turns: int = 11) -> list[harness.Report]:
    """Processor time, ms, of a training step of each recipe, in turns: median, lowest, highest; two turns warm up."""
    torch.set_num_threads(1)
    with ExitStack() as stack:
        steps = {}
        for name in names:
            parts = build(recipes.load(name))
            stack.callback(parts.close)
            steps[name] = one_step(parts)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(2 + turns):
            for name, step in steps.items():
                began = time.process_time()
                step()
                times[name].append(1e3 * (time.process_time() - began))
    found = {name: sorted(all_turns[2:]) for name, all_turns in times.items()}
    return [
        {"recipe": name, "median": statistics.median(ms), "lowest": ms[0], "highest": ms[-1]}
        for name, ms in found.items()
    ]
