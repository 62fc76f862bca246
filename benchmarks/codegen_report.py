"""The tables of `codegen`: sums of each region and step, and the kernels that take longest at least."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any

from benchmarks import harness

PLAIN, STD, RUNNING = "plain", "STD, targets given", "STD, teachers running"
SHOWN = 0.5  # % of the plain step's least time that a kernel needs to be in the table


@dataclass
class Kernel:
    """The launches of one kernel in one region; bytes and operations of all of them together."""

    region: str
    name: str
    launches: int = 0
    read: float = 0.0
    written: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0
    """the least"""
    compiled: list[dict[str, int]] = field(default_factory=list)
    """`registers`, `spilled` and `shared` (bytes), `warps` of each configuration; empty for kernels of libraries"""


def report_of(args: argparse.Namespace, kernels: list[Kernel]) -> dict[str, Any]:
    regions: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        if kernel.region != "outside":
            regions.setdefault(kernel.region, []).append(kernel)
    sums = [sum_of(name, inside) for name, inside in regions.items()]
    plain = [k for k in kernels if k.region.startswith(f"{PLAIN}: ")]
    std = [k for k in kernels if k.region.startswith(f"{STD}: ")]
    around = [k for k in kernels if k.region in ("augmentation", "teachers")]
    steps = [sum_of(PLAIN, plain), sum_of(STD, std)]
    if not args.no_teachers:
        steps.append(sum_of(RUNNING, std + around))
    for step in steps:
        step["images_per_second"] = harness.significant(args.batch / (step["least_ms"] / 1e3))
        step["mfu_percent"] = harness.significant(100 * step["gflop"] / args.tflops / step["least_ms"], 3)
    rows = sorted((row_of(kernel) for inside in regions.values() for kernel in inside), key=lambda r: -r["least_us"])
    return {
        "variant": "-".join([args.model, args.target, *args.set]),
        "rows": rows,
        "regions": sums,
        "steps": steps,
        "std_percent": harness.significant(100 * (steps[1]["least_ms"] / steps[0]["least_ms"] - 1), 3),
        "precision": args.precision,
    }


def sum_of(name: str, kernels: list[Kernel]) -> dict[str, Any]:
    keys = ("launches", "read", "written", "flops", "seconds")
    total = {key: sum(getattr(kernel, key) for kernel in kernels) for key in keys}
    triton = [kernel for kernel in kernels if kernel.compiled]
    return {
        "name": name,
        "launches": total["launches"],
        "triton_launches": sum(kernel.launches for kernel in triton),
        "gflop": harness.significant(total["flops"] / 1e9),
        "read_gb": harness.significant(total["read"] / 1e9),
        "written_gb": harness.significant(total["written"] / 1e9),
        "least_ms": harness.significant(1e3 * total["seconds"]),
        "spilling": sum(min(one["spilled"] for one in kernel.compiled) > 0 for kernel in triton),
    }


def row_of(kernel: Kernel) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": kernel.name,
        "region": kernel.region,
        "launches": kernel.launches,
        "read_mb": harness.significant(kernel.read / 1e6),
        "written_mb": harness.significant(kernel.written / 1e6),
        "gflop": harness.significant(kernel.flops / 1e9),
        "least_us": harness.significant(1e6 * kernel.seconds),
    }
    for key in ("registers", "spilled", "shared", "warps") if kernel.compiled else ():
        row[key] = " ".join(str(one[key]) for one in kernel.compiled)
    return row


KERNELS = {
    "kernel (what is fused is in its name)": "name",
    "region": "region",
    "launches": "launches",
    "read, MB": "read_mb",
    "written, MB": "written_mb",
    "GFLOP": "gflop",
    "least us": "least_us",
    "registers": "registers",
    "spilled, B": "spilled",
    "shared, B": "shared",
    "warps": "warps",
}
SUMS = {
    "": "name",
    "launches": "launches",
    "of Triton": "triton_launches",
    "GFLOP": "gflop",
    "read, GB": "read_gb",
    "written, GB": "written_gb",
    "least ms": "least_ms",
    "kernels that spill": "spilling",
    "images/s at most": "images_per_second",
    "MFU at most, %": "mfu_percent",
}


def show(report: dict[str, Any]) -> str:
    settings = report["settings"]
    head = (
        f"{settings['model']}, batch {settings['batch']}, {settings['target']}, torch "
        f"{report['conditions']['versions']['torch']}; least times at {settings['tflops']} TFLOP/s and "
        f"{settings['tbps']} TB/s. Registers and so on: of each configuration that inductor would choose from.\n\n"
        "Nothing was timed: predictions, the best that these kernels allow."
    )
    last = f"STD and MINE add {report['std_percent']} % to the plain step's least time."
    parts = (harness.table(report["steps"], SUMS), last, harness.table(report["regions"], SUMS))
    long = [row for row in report["rows"] if row["least_us"] > 10 * SHOWN * report["steps"][0]["least_ms"]]
    left = f"{len(report['rows']) - len(long)} kernels below {SHOWN} % of the plain step are left out; --json has them."
    return "\n\n".join([head, *parts, harness.table(long, KERNELS), left])
