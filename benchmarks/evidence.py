"""Is STD worth its cost? Students of CIFAR-10 taught in each way, at equal samples and at equal cost, over seeds.

A queue of real `std-fast` runs in --work, each a folder of its own: two teachers, their stored targets for each seed,
then every (student, setting, seed). Killed or stopped at any moment and called again, it goes on where it was.

    std-fast bench evidence --size cpu --data TRAIN.beton TEST.beton --work WORK --jobs 2
    std-fast bench evidence --size cpu --work WORK --out benchmarks/results     # collects: tables, JSON, figure
    std-fast bench evidence --from benchmarks/results/FILE.json                 # draws them again

Sizes: `gpu` is the study itself; `cpu` one that two cores can do in two hours (a small Mixer, few epochs); `smoke` only
tries the machinery.

Equal cost: where a GPU can be had alone (`gpu`), every setting gets a GPU-hour budget, that which the STD run of its
seed took; once as it is, and once with what teachers and targets cost added to the budget of the plain student. On a
machine that others use too (`cpu`), an hour of the clock is no measure: there the settings' processor time per sample
is measured in turns in one process (`costs`), and the others get as many samples as cost what STD's cost. Answers that
a longer run needs beyond the stored ones are asked for then, and not counted in that cost.

Pushed: plain and STD with the size's `push` on top, one seed, for each of its `push_minutes`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from benchmarks import harness
from benchmarks.study import Children, Study
from benchmarks.study_report import draw, show
from benchmarks.study_sizes import SIZES
from pipelines.errors import UserError
from pipelines.files import write_atomic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=SIZES, default="cpu", help="[cpu]")
    parser.add_argument("--work", help="folder of the runs")
    parser.add_argument("--data", nargs=2, metavar=("TRAIN", "TEST"), help="CIFAR-10 as betons; works the queue off")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one core of a CPU [1]")
    parser.add_argument("--only", default="*", help="pattern of job names; what they need is done too")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="then stop, saved; call again to go on")
    parser.add_argument("--list", action="store_true", help="only name the jobs and how they stand")
    parser.add_argument("--from", dest="stored", metavar="FILE", help="a stored result: show and draw it again")
    parser.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"), help="bfloat16 pays on a CPU with AMX [auto]"
    )
    parser.add_argument("--costs", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> harness.Report:
    if args.stored:
        return json.loads(Path(args.stored).read_text(encoding="utf-8"))
    if args.work is None:
        raise UserError("--work: is missing; give the folder of the runs")
    if args.smoke:
        args.size = "smoke"
    work = Path(args.work).resolve()
    record = work / "study.json"
    known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    precision = args.precision or known.get("precision", "auto")
    if args.data is None:
        if not known:
            raise UserError("--data: is missing, and --work holds no study; give CIFAR-10's two betons")
        args.data = known["data"]
        working = False
    else:
        args.data = [os.path.abspath(path) for path in args.data]
        work.mkdir(parents=True, exist_ok=True)
        write_atomic(record, json.dumps({"size": args.size, "data": args.data, "precision": precision}))
        working = not args.list
    study = Study(args.size, work, tuple(args.data), precision)
    if args.costs:
        study.measure_costs(args)
        return {"rows": []}
    if args.list:
        return {"variant": args.size, "listed": {job: study.done(job) for job in study.jobs}, "rows": []}
    if working:
        jobs = max(1, args.jobs)
        study.work_off(jobs, args.only, time.monotonic() + 60 * args.minutes, Children(jobs))
    return study.collect() | {"rows": []}


def show_any(report: harness.Report) -> str:
    if "listed" in report:
        return "\n".join(f"{'done' if done else '    '}  {job}" for job, done in report["listed"].items())
    return show(report) if "runs" in report else ""


def command(argv: list[str] | None = None) -> int:
    """Exit code of `std-fast bench evidence ARGV`."""
    return harness.main("evidence", run, show_any, add_arguments, draw, argv, __doc__)


if __name__ == "__main__":
    sys.exit(command())
