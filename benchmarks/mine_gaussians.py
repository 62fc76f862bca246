"""MINE's estimate against the known mutual information of correlated Gaussians.

Two vectors of d components, correlated with rho component by component, have `-d/2 log(1 - rho^2)` nats of mutual
information. The project's `MutualInformation` is trained with Adam on fresh samples. The estimate is its bound on
samples that it has never seen: above the truth only by chance, below it by what psi has not learned. The goal: within
10 %.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from std_fast.method.mine import MutualInformation, mutual_information

RHOS, DIMS = (0.5, 0.9), (1, 4)
GOAL = 0.1
HELD_OUT = 1 << 16  # pairs of the final estimate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=2000, help="of Adam, for each setting [2000]")
    parser.add_argument("--batch", type=int, default=512, help="pairs a step [512]")
    parser.add_argument("--width", type=int, default=128, help="of psi [128]")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak of a cosine [2e-3]")
    parser.add_argument("--ema", type=float, nargs="+", default=[0.0, 0.01], help="0: plain gradient [0 and 0.01]")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.smoke:
        args.steps, args.batch, args.width = 20, 64, 16
    rows = [measure(rho, dim, ema, args) for rho in RHOS for dim in DIMS for ema in args.ema]
    return {"rows": rows, "goal": GOAL, "reached": all(abs(row["error_percent"]) <= 100 * GOAL for row in rows)}


def measure(rho: float, dim: int, ema: float, args: argparse.Namespace) -> dict[str, Any]:
    """Trains psi on one kind of samples."""
    torch.manual_seed(0)
    truth = -dim / 2 * math.log(1 - rho**2)
    mine = MutualInformation(dim, dim, args.width, ema=ema).to(args.device)
    optimizer = torch.optim.Adam(mine.psi.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    curve: list[Tensor] = []
    began = time.perf_counter()
    for _ in range(args.steps):
        value = mine(*gaussians(args.batch, dim, rho, args.device))
        (-value).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        curve.append(value.detach())
    seconds = time.perf_counter() - began
    with torch.no_grad():
        estimate = float(mutual_information(mine.psi, *gaussians(HELD_OUT, dim, rho, args.device)))
    parts = torch.stack(curve).split(max(1, args.steps // 50))
    row = {
        "name": f"rho {rho}, d {dim}, " + (f"moving average {ema:g}" if ema else "plain gradient"),
        "truth_nats": harness.significant(truth),
        "estimate_nats": harness.significant(estimate),
        "error_percent": round(100 * (estimate / truth - 1), 2),
        "seconds": harness.significant(seconds, 3),
        "curve_nats": [harness.significant(float(part.mean())) for part in parts],
    }
    harness.progress(f"{row['name']}: {row['estimate_nats']} nats, truth {row['truth_nats']}")
    return row


def gaussians(pairs: int, dim: int, rho: float, device: str) -> tuple[Tensor, Tensor]:
    """Samples `[pairs, 1, dim]` twice, as tokens of one teacher."""
    x, noise = torch.randn(2, pairs, 1, dim, device=device)
    return x, rho * x + math.sqrt(1 - rho**2) * noise


def draw(report: dict[str, Any], path: Path) -> None:
    """Estimates over training, each against its truth."""
    from matplotlib.figure import Figure

    rows = report["rows"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    truths = dict.fromkeys(row["truth_nats"] for row in rows)
    for row in rows:
        colour = f"C{list(truths).index(row['truth_nats'])}"
        share = [(i + 1) / len(row["curve_nats"]) for i in range(len(row["curve_nats"]))]
        style = "-" if "plain" in row["name"] else ":"
        axes.plot(share, [v / row["truth_nats"] for v in row["curve_nats"]], style, color=colour, label=row["name"])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.axhspan(1 - GOAL, 1 + GOAL, color="black", alpha=0.07)
    axes.set(xlabel="share of the training", ylabel="estimate / true mutual information", ylim=(0, 1.4))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


COLUMNS = {
    "samples": "name",
    "truth, nats": "truth_nats",
    "estimate, nats": "estimate_nats",
    "error, %": "error_percent",
    "s": "seconds",
}


def show(report: dict[str, Any]) -> str:
    verdict = "All" if report["reached"] else "NOT all"
    return harness.show(report, COLUMNS) + f"\n\n{verdict} within {100 * report['goal']:.0f} % of the truth."


if __name__ == "__main__":
    sys.exit(harness.main("mine_gaussians", run, show, add_arguments, draw, text=__doc__))
