"""Is a distilled MLP, and is STD, worth its cost? A Mixer on Imagenette, trained in each way with two teachers.

A queue of real `std-fast` runs in --work, each a folder of its own: the stored targets of two ImageNet teachers, then
every (setting, student, initialisation). Killed at any moment and called again, it continues where it stopped.

    python examples/imagenet_teachers.py teachers
    std-fast bench evidence --size cpu --data IMAGENETTE --teachers teachers --work WORK
    std-fast bench evidence --work WORK --out benchmarks/results     # collects: tables, JSON, figure
    std-fast bench evidence --from benchmarks/results/FILE.json --out AGAIN     # shows and draws a stored result
    std-fast bench evidence --size gpu --keep RESULTS.json --minutes 9 ...      # on machines that lose their disks

IMAGENETTE holds train/WNID/* and val/WNID/*. Sizes: `gpu` (C 512), `cpu` (C 64 and C 128, about 16 hours of a core),
`short` (C 64, fewer epochs, about an hour of a core), `smoke` (seconds; tries the machinery).

Choices are made on each tenth training image, which no run trains on; the accuracies over the course of a run are on
these images too. The validation images are seen once by each run, at its end, and what each head predicts for each of
them is stored. Initialisations share batches, augmentation and targets (`run.init_seed`).

What the design can see. Two settings that differ on a quarter of the 1,966 validation images have a difference whose
standard error over images is sqrt(0.25 / 1966) = 1.1 points for one pair of runs; means over k initialisations differ
less by chance, but by no less than the share of it that the images themselves decide. Initialisations that deviate by
0.8 points add 0.8 sqrt(2 / k). With three (`short`), both together are about 1.2 points: a difference under 2.4 is not
seen. With four (`cpu`), about 1.1. The paper's 0.6 points between STD and no tokens are not seen by either.

Cost: seconds of the processor per sample, all settings in turns in one process (job `costs`; run it when the machine
does nothing else), and multiply-accumulates. Equal cost: settings that train as many epochs more as STD costs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from benchmarks import best_student, harness
from benchmarks.study import Children, Study, collect, measure_costs, restore
from benchmarks.study_report import draw, show
from benchmarks.study_sizes import SIZES
from pipelines.errors import UserError
from pipelines.files import write_atomic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=SIZES, help="how large; kept in --work [cpu]")
    parser.add_argument("--work", help="folder of the runs")
    parser.add_argument("--data", metavar="IMAGENETTE", help="folder with train/ and val/; works the queue off")
    parser.add_argument("--teachers", metavar="DIR", help="folder of the teachers' weights [teachers]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its share of the cores [1]")
    parser.add_argument("--only", default="*", help="pattern of job names; what they need is done too")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="then stop, saved; call again to continue")
    parser.add_argument(
        "--keep", metavar="FILE", help="results are written there after each run; a run that is in it is not made again"
    )
    parser.add_argument("--list", action="store_true", help="only name the jobs and whether they are done")
    parser.add_argument("--from", dest="stored", metavar="FILE", help="a stored result: show and draw it again")
    parser.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"), help="bfloat16 pays on a CPU with AVX512-BF16 [auto]"
    )
    parser.add_argument(
        "--students",
        nargs="+",
        metavar="RUN",
        help="only the table of these runs' students; times a step of each, in turns",
    )
    parser.add_argument("--costs", action="store_true", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> harness.Report:
    if args.students:
        return best_student.collect(args.students, args)
    if args.stored:
        report = json.loads(Path(args.stored).read_text(encoding="utf-8"))
        if not {"seconds_per_sample", "students"} & report.keys():
            raise UserError(f"--from {args.stored}: holds no table of the study; read it as JSON")
        return report
    if args.work is None:
        raise UserError("--work: is missing; give the folder of the runs")
    work = Path(args.work).resolve()
    record = work / "study.json"
    known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if args.data is None and not known:
        raise UserError("--data: is missing, and --work holds no study; give the folder of Imagenette")
    wanted = {
        "size": "smoke" if args.smoke else args.size,
        "data": args.data and os.path.abspath(args.data),
        "teachers": args.teachers and os.path.abspath(args.teachers),
        "precision": args.precision,
    }
    settings = {"size": "cpu", "teachers": os.path.abspath("teachers"), "precision": "auto"} | known
    settings |= {name: value for name, value in wanted.items() if value}
    source, teachers, precision = settings["data"], settings["teachers"], settings["precision"]
    study = Study(settings["size"], work, source, teachers, precision, args.device)
    if args.costs:
        measure_costs(study, args)
        return {"rows": []}
    if args.list:
        return {"variant": study.name, "listed": {job: study.done(job) for job in study.jobs}, "rows": []}
    if args.data is None:
        return collect(study) | {"rows": []}
    work.mkdir(parents=True, exist_ok=True)
    write_atomic(record, json.dumps(settings))
    left = work_off(study, args)
    return collect(study) | {"rows": [], "left": left}


def work_off(study: Study, args: argparse.Namespace) -> list[str]:
    """The jobs that are left when the time is over, or when a signal came."""
    keep = Path(args.keep) if args.keep else None
    if keep is not None and keep.is_file():
        restore(study, json.loads(keep.read_text(encoding="utf-8")))
    about = {"question": "evidence", "rows": [], "conditions": harness.conditions(args.device)}

    def after_each() -> None:
        if keep is not None:
            write_atomic(keep, json.dumps(about | collect(study), indent=1))

    jobs, until = max(1, args.jobs), time.monotonic() + 60 * args.minutes
    return study.work_off(jobs, args.only, until, Children(jobs), after_each)


def show_any(report: harness.Report) -> str:
    if "listed" in report:
        return "\n".join(f"{'done' if done else '    '}  {job}" for job, done in report["listed"].items())
    if "students" in report:
        return best_student.show(report)
    return show(report) if "runs" in report else ""


def draw_any(report: harness.Report, path: Path) -> None:
    (best_student.draw if "students" in report else draw)(report, path)


def command(argv: list[str] | None = None) -> int:
    """Exit code of `std-fast bench evidence ARGV`."""
    return harness.main("evidence", run, show_any, add_arguments, draw_any, argv, __doc__)


if __name__ == "__main__":
    sys.exit(command())
