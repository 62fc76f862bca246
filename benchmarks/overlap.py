"""Teachers and student in turn, side by side, and each alone: how close the pair comes to the longer of the two.

Serial and concurrent are the batch stream with run.overlap off and on, followed by `Trainer.step`, from a raw batch on
the device; the student alone has its targets given; the teachers alone are augmentation and teachers. A CPU has no
streams: there the two orders are the same, and the benchmark shows only that they cost the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import harness, workload
from benchmarks.step import add_arguments
from std_fast.teachers.overlap import Overlap
from std_fast.teachers.stream import TeacherSource
from std_fast.training.build import Parts

SERIAL, BESIDE, STUDENT, TEACHERS = "serial", "concurrent", "student alone", "teachers alone"


def run(args: argparse.Namespace) -> dict[str, Any]:
    workload.settle(args)
    if args.smoke:
        args.teachers = [workload.TINY_TEACHER] * 2
    teachers = tuple(args.teachers)
    with workload.workplace(args, teachers) as folder:
        with workload.built(workload.recipe_for(args, folder, teachers)) as parts:
            return compare(args, parts)


def compare(args: argparse.Namespace, parts: Parts) -> dict[str, Any]:
    given, step = workload.given_batch(parts), workload.Stepper(parts)
    assert parts.teachers is not None
    source = TeacherSource(parts.teachers, parts.trainer.autocast)
    orders = {
        SERIAL: workload.same_batch_stream(parts, source, Overlap("off", parts.device)),
        BESIDE: workload.same_batch_stream(parts, source, Overlap("on", parts.device)),
    }
    alone = workload.same_batch_stream(parts, source)
    contestants: dict[str, Callable[[], object]] = {
        SERIAL: lambda: step(next(orders[SERIAL])),
        BESIDE: lambda: step(next(orders[BESIDE])),
        STUDENT: lambda: step(given),
        TEACHERS: lambda: next(alone),
    }
    times = harness.measure(contestants, args)
    step.check()
    parts_alone = [times[STUDENT].seconds, times[TEACHERS].seconds]
    notes = []
    if args.device == "cpu":
        notes.append("A CPU has no streams: concurrent is serial here, and the ratio shows the noise.")
    return {
        "variant": workload.variant(args),
        "rows": [harness.row(name, one, args.batch) for name, one in times.items()],
        "ratios": [harness.ratio("concurrent over serial", times[BESIDE], times[SERIAL])],
        "serial_over_sum": harness.significant(times[SERIAL].seconds / sum(parts_alone), 3),
        "concurrent_over_longer": harness.significant(times[BESIDE].seconds / max(parts_alone), 3),
        "precision": str(workload.compute_dtype(parts)).removeprefix("torch."),
        "notes": notes,
    }


def show(report: dict[str, Any]) -> str:
    return harness.show(report) + (
        f"\n\nSerial takes {report['serial_over_sum']} of the sum of the two alone, concurrent "
        f"{report['concurrent_over_longer']} of the longer of them."
    )


if __name__ == "__main__":
    sys.exit(harness.main("overlap", run, show, add_arguments, text=__doc__))
