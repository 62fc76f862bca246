"""Is STD worth its cost? Students of CIFAR-10 taught in each way, at equal samples and at equal cost, over seeds.

A queue of real `std-fast` runs in --work, each a folder of its own: two teachers, their stored answers for each seed,
then every (student, setting, seed). Killed or stopped at any moment and called again, it goes on where it was.

    std-fast bench evidence --size cpu --data TRAIN.beton TEST.beton --work WORK --jobs 2
    std-fast bench evidence --size cpu --work WORK --out benchmarks/results     # collects: tables, JSON, figure
    std-fast bench evidence --from benchmarks/results/FILE.json                 # draws them again

Sizes: `gpu` is the study itself; `cpu` one that two cores can do in two hours (a small Mixer, few epochs); `smoke` only
tries the machinery.

Equal cost: where a GPU can be had alone (`gpu`), every setting gets a GPU-hour budget, that which the STD run of its
seed took; once as it is, and once with what teachers and answers cost added to the budget of the plain student. On a
machine that others use too (`cpu`), an hour of the clock is no measure: there the settings' processor time per sample
is measured in turns in one process (`costs`), and the plain student gets as many samples as cost what STD's cost.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks import harness, workload
from pipelines.errors import UserError
from std_fast import recipe as recipes
from std_fast import recipe_files
from std_fast.build import Parts, build
from std_fast.checkpoint import listed
from std_fast.cli import STOPPED
from std_fast.config import merge
from std_fast.metrics import read_jsonl
from std_fast.overlap import taught

Overrides = dict[str, Any]
LARGE, BOTH = ("large",), ("small", "large")


@dataclass(frozen=True)
class Setting:
    """A way to teach; the teachers' weights are filled in."""

    distill: Overrides
    teachers: tuple[str, ...] = BOTH
    cost_of_std: str = ""
    """how this one's length is found: "" the study's epochs; "alone", "with teachers": what STD's run cost"""


SETTINGS = {
    "plain": Setting({"mode": "none"}, ()),
    "no tokens": Setting({"tokens": "none", "mine": {"weight": 0.0}}),
    "DeiT token": Setting({"tokens": "deit", "mine": {"weight": 0.0}}),
    "STD": Setting({}),
    "STD, last module": Setting({"taps": [-1], "assign": [[0, 1]]}),
    "STD, no MINE": Setting({"mine": {"weight": 0.0}}),
    "STD, no reweighting": Setting({"reweight": False}),
    "STD, one teacher": Setting({"assign": [[0], [0]]}, LARGE),
    "plain, STD's cost": Setting({"mode": "none"}, (), "alone"),
    "plain, STD's and its teachers' cost": Setting({"mode": "none"}, (), "with teachers"),
    "DeiT token, STD's cost": Setting({"tokens": "deit", "mine": {"weight": 0.0}}, BOTH, "alone"),
}


@dataclass(frozen=True)
class Size:
    """How large the study is."""

    common: Overrides
    teachers: dict[str, Overrides]
    students: dict[str, Overrides]
    epochs: int
    settings: tuple[str, ...] = tuple(SETTINGS)
    budget: bool = True
    """equal cost by budgets of GPU-hours; else by samples, from the measured costs"""
    seeds: tuple[int, ...] = (0, 1, 2)


def mixer(dim: int, depth: int) -> Overrides:
    options = {"patch_size": 4, "dim": dim, "depth": depth, "token_dim": dim // 2, "channel_dim": 4 * dim}
    return {"name": "mixer", "options": options}


def narrow_resnet(layers: list[int], channels: list[int]) -> Overrides:
    return {"name": "resnet18", "options": {"layers": layers, "channels": channels}, "drop_path": 0.0}


LIGHT = {"mix_prob": 0.5}  # half of the samples are mixed: few epochs leave a small student underfitted as it is
SIZES = {
    "gpu": Size(
        common={"base": "cifar10_mixer"},
        teachers={
            "small": {"base": "cifar10_teacher_small"},
            "large": {"base": "cifar10_teacher"},
        },
        students={
            "mixer": {},
            "resmlp": {"student": {"name": "resmlp", "options": {"patch_size": 4, "dim": 384, "depth": 12}}},
            "cyclemlp": {
                "student": {
                    "name": "cyclemlp",
                    "options": {
                        "layers": [2, 2, 4, 2],
                        "embed_dims": [64, 128, 320, 512],
                        "mlp_ratios": [4, 4, 4, 4],
                    },
                }
            },
        },
        epochs=100,
    ),
    "cpu": Size(
        common={
            "base": "cifar10_mixer",
            "augment": LIGHT,
            "student": mixer(64, 4) | {"drop_path": 0.0},
            "optim": {"lr": 2.0e-3, "lr_batch": 0, "warmup": "5 %"},
            "run": {
                "batch": 128,
                "eval_every": "1 epoch",
                "eval_batch": 500,
                "device": "cpu",
                "save_every": "2 minutes",
            },
            "data": {"threads": 1},
        },
        teachers={
            # at 48 px, so that timm's usual stem leaves 12 x 12 positions: 2 to 4 times the speed of a stem for 32 px
            "small": {
                "student": narrow_resnet([1, 1, 1, 1], [32, 64, 128, 256]),
                "data": {"image_size": 48},
                "augment": {"mix_prob": 0.2},
                "run": {"length": "8 epochs", "eval_every": "2 epochs"},
            },
            "large": {
                "student": narrow_resnet([2, 2, 2, 2], [32, 64, 128, 256]),
                "data": {"image_size": 48},
                "augment": {"mix_prob": 0.2},
                "run": {"length": "8 epochs", "eval_every": "2 epochs"},
            },
        },
        students={"mixer": {}},
        epochs=3,
        settings=("plain", "DeiT token", "STD", "plain, STD's cost"),
        budget=False,
    ),
    "smoke": Size(
        common={
            "base": "cifar10_mixer",
            "data": {"image_size": 16, "threads": 1},
            "student": mixer(16, 3) | {"drop_path": 0.0},
            "optim": {"lr_batch": 0},
            "run": {"batch": 8, "eval_every": "1 epoch", "log_every": 1, "device": "cpu"},
        },
        teachers={
            name: {"student": narrow_resnet([1, 1, 1, 1], [8, 8, 8, 8]), "run": {"length": "2 steps"}} for name in BOTH
        },
        students={"mixer": {}},
        epochs=1,
        settings=("plain", "STD", "plain, STD's cost"),
        budget=False,
        seeds=(0,),
    ),
}


# -- the queue --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One process. `recipe` is asked when all jobs in `after` are done."""

    name: str
    verb: str
    recipe: Callable[[], Overrides]
    after: tuple[str, ...] = ()
    about: Overrides = field(default_factory=dict)


class Study:
    """The jobs of a size in a folder."""

    def __init__(self, size: str, work: Path, data: tuple[str, str], precision: str = "auto") -> None:
        self.name, self.size, self.work, self.data, self.precision = size, SIZES[size], work, data, precision
        self.jobs = {job.name: job for job in self._jobs()}

    def out(self, job: str) -> Path:
        return self.work / job

    def done(self, job: str) -> bool:
        """Trained to the end, or all answers stored, or costs measured."""
        return (self.out(job) / ("costs.json" if job == "costs" else "summary.json")).is_file()

    def _common(self, *more: Overrides, **run: Any) -> Overrides:
        own = {"data": {"train": self.data[0], "val": self.data[1]}, "run": {"precision": self.precision} | run}
        return merged(self.size.common, *more, own)

    def _jobs(self) -> Iterator[Job]:
        size = self.size
        for name, overrides in size.teachers.items():
            job = f"teacher-{name}"
            yield Job(job, "train", functools.partial(self._common, overrides, out=str(self.out(job))))
        stored = {SETTINGS[s].teachers for s in size.settings} - {()}
        for seed in size.seeds:
            for teachers in sorted(stored):
                job = answers_name(teachers, seed)
                yield Job(
                    job,
                    "teach",
                    functools.partial(self._student, Setting({}, teachers), next(iter(size.students)), seed),
                    tuple(f"teacher-{name}" for name in teachers),
                )
        if not size.budget:
            yield Job("costs", "costs", dict, tuple(answers_name(t, size.seeds[0]) for t in sorted(stored)))
        for seed in size.seeds:
            for student in size.students:
                for name in size.settings:
                    yield self._student_job(student, name, seed)

    def _student_job(self, student: str, name: str, seed: int) -> Job:
        setting = SETTINGS[name]
        after: tuple[str, ...] = (answers_name(setting.teachers, seed),) if setting.teachers else ()
        if setting.cost_of_std:
            after += (run_name(student, "STD", seed),) if self.size.budget else ("costs",)
        job = run_name(student, name, seed)

        def recipe() -> Overrides:
            length = f"{self.size.epochs} epochs"
            if setting.cost_of_std:
                length = self._equal_cost(student, name, seed)
            return merged(self._student(setting, student, seed), {"run": {"out": str(self.out(job)), "length": length}})

        return Job(job, "train", recipe, after, {"student": student, "setting": name, "seed": seed})

    def _student(self, setting: Setting, student: str, seed: int) -> Overrides:
        """The recipe of a student but for folder and length."""
        distill = dict(setting.distill)
        if setting.teachers:
            distill |= {
                "mode": "std",
                "teachers": [{"weights": str(self.out(f"teacher-{name}"))} for name in setting.teachers],
                "answers": str(self.out(answers_name(setting.teachers, seed)) / "answers"),
            }
            if distill.get("taps") == [-1]:
                distill["taps"] = [self._depth(student)]
        overrides = self._common(self.size.students[student], seed=seed, length=f"{self.size.epochs} epochs")
        return merged(overrides, {"distill": distill})

    def _depth(self, student: str) -> int:
        """Blocks of a student."""
        base = yaml.safe_load(recipe_files.find(self.size.common["base"]).read_text(encoding="utf-8"))
        options = merged(base, self.size.common, self.size.students[student])["student"]["options"]
        return options["depth"] if "depth" in options else sum(options["layers"])

    def _equal_cost(self, student: str, name: str, seed: int) -> str:
        """The length that costs what this seed's STD run cost."""
        if not self.size.budget:
            costs = json.loads((self.out("costs") / "costs.json").read_text(encoding="utf-8"))
            per_sample = costs["cpu_seconds_per_sample"]
            base = next(s for s in ("plain", "DeiT token") if name.startswith(s))
            return f"{self.size.epochs * per_sample['STD'] / per_sample[base]:.3f} epochs"
        hours = self._hours(run_name(student, "STD", seed))
        if SETTINGS[name].cost_of_std == "with teachers":
            hours += self._hours(answers_name(BOTH, seed)) + sum(self._hours(f"teacher-{t}") for t in BOTH)
        return f"{hours:.5f} gpu-hours"

    def _hours(self, job: str) -> float:
        return json.loads((self.out(job) / "summary.json").read_text(encoding="utf-8"))["gpu_hours"]

    # -- work ---------------------------------------------------------------------------------------------------------

    def work_off(self, jobs: int, only: str, until: float, children: Children) -> bool:
        """Runs what is not done, in order, `jobs` at a time; returns whether all of it is done.

        Raises:
            UserError: at the end, naming the jobs that failed.
        """
        wanted = self._wanted(only)
        running: dict[Future[int], str] = {}
        failed: set[str] = set()
        with ThreadPoolExecutor(jobs) as pool, children:
            while True:
                left = [j for j in wanted if not self.done(j) and j not in running.values() and j not in failed]
                ready = [j for j in left if all(self.done(a) for a in self.jobs[j].after)]
                while ready and len(running) < jobs and time.monotonic() < until and not children.stopped:
                    job = ready.pop(0)
                    running[pool.submit(self._do, self.jobs[job], children)] = job
                if not running and failed:
                    logs = ", ".join(str(self.out(job) / "log.txt") for job in sorted(failed))
                    raise UserError(f"--work: {len(failed)} jobs failed; look into {logs}, then call again")
                if not running:
                    return all(self.done(j) for j in wanted)
                for future in wait(running, timeout=1.0, return_when=FIRST_COMPLETED).done:
                    job, code = running.pop(future), future.result()
                    if code not in (0, STOPPED):
                        failed.add(job)
                    harness.progress(f"{job}: {'done' if code == 0 else f'exit code {code}, see its log'}")
                if time.monotonic() > until:
                    children.stop()

    def _wanted(self, only: str) -> list[str]:
        """Jobs whose names match, and what they need."""
        found: dict[str, None] = {}

        def add(job: str) -> None:
            for before in self.jobs[job].after:
                add(before)
            found.setdefault(job)

        for job in fnmatch.filter(self.jobs, only):
            add(job)
        if not found:
            raise UserError(f"--only: no job is called like {only!r}; see --list")
        return list(found)

    def _do(self, job: Job, children: Children) -> int:
        folder = self.out(job.name)
        folder.mkdir(parents=True, exist_ok=True)
        if job.verb == "costs":
            command = [sys.executable, "-m", "benchmarks.evidence", "--size", self.name, "--costs", "--json"]
            command += ["--work", str(self.work), "--data", *self.data, "--precision", self.precision]
        else:
            path = folder / "wanted.yaml"
            if not path.exists():  # a length that follows from measured costs is settled once
                path.write_text(yaml.safe_dump(job.recipe(), sort_keys=False), encoding="utf-8")
            command = [sys.executable, "-m", "std_fast.cli", job.verb, str(path)]
            command += ["--quiet", "--json"] + (["--resume"] if job.verb == "train" else [])
        harness.progress(f"{job.name}: {'goes on' if listed(folder / 'checkpoints') else 'begins'}")
        began = time.perf_counter()
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            code, said = children.run(command, log)
        if code == 0 and job.verb == "teach":
            hours = (time.perf_counter() - began) / 3600  # of the whole process, imports included
            record = json.loads(said) | {"gpu_hours": hours}
            write_whole(folder / "summary.json", json.dumps(record))
        return code

    def measure_costs(self, args: argparse.Namespace) -> None:
        """Processor time per sample of each way to teach, answers stored, from raw batch to updated weights."""
        import torch

        torch.set_num_threads(1)
        seed, student = self.size.seeds[0], next(iter(self.size.students))
        names = [s for s in self.size.settings if not SETTINGS[s].cost_of_std]
        parts = {}
        for name in names:
            path = self.out("costs") / f"{run_name(student, name, seed)}.yaml"
            path.write_text(yaml.safe_dump(self._student(SETTINGS[name], student, seed)), encoding="utf-8")
            parts[name] = build(recipes.load(str(path)))
        try:
            contestants = {name: one_step(p) for name, p in parts.items()}
            times = harness.measure(contestants, args)
        finally:
            for p in parts.values():
                p.close()
        batch = next(iter(parts.values())).recipe.run.batch
        report = {
            "cpu_seconds_per_sample": {name: t.seconds / batch for name, t in times.items()},
            "rows": [harness.row(name, t, batch) for name, t in times.items()],
            "conditions": harness.conditions(args.device),
        }
        write_whole(self.out("costs") / "costs.json", json.dumps(report, indent=1))

    # -- what came out ------------------------------------------------------------------------------------------------

    def collect(self) -> harness.Report:
        """Recipe, evaluations, figures of the log and ledger of every run that is done."""
        runs = []
        for job in self.jobs.values():
            folder = self.out(job.name)
            if not self.done(job.name) or job.verb == "costs":
                continue
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            if job.verb == "teach":
                runs.append({"job": job.name, "verb": job.verb, "summary": summary})
                continue
            records = read_jsonl(folder / "metrics.jsonl")
            runs.append(
                {
                    "job": job.name,
                    "verb": job.verb,
                    **job.about,
                    "recipe": yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")),
                    "summary": summary,
                    "evaluations": [rounded(r) for r in records if r["kind"] == "eval"],
                    "log": thin([rounded(r) for r in records if r["kind"] == "train"], 25),
                }
            )
        costs = self.out("costs") / "costs.json"
        return {
            "variant": self.name,
            "runs": runs,
            "costs": json.loads(costs.read_text(encoding="utf-8")) if costs.is_file() else None,
            "missing": [job for job in self.jobs if not self.done(job)],
        }


class Children:
    """The processes under way: a signal to this one asks them to save and stop."""

    def __init__(self, jobs: int) -> None:
        self.stopped = False
        self._environment = dict(os.environ, OMP_NUM_THREADS=str(max(1, harness.cores() // jobs)))
        self._processes: set[subprocess.Popen] = set()

    def __enter__(self) -> Children:
        self._kept = {s: signal.signal(s, lambda *_: self.stop()) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._kept.items():
            signal.signal(signum, handler)

    def stop(self) -> None:
        self.stopped = True
        for process in list(self._processes):
            process.send_signal(signal.SIGTERM)

    def run(self, command: list[str], log: Any) -> tuple[int, str]:
        """Exit code and standard output; standard error goes to the log."""
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True, env=self._environment
        )
        self._processes.add(process)
        try:
            said, _ = process.communicate()
        finally:
            self._processes.discard(process)
        return process.returncode, said


def answers_name(teachers: tuple[str, ...], seed: int) -> str:
    return f"answers-{'-'.join(teachers)}-{seed}"


def run_name(student: str, setting: str, seed: int) -> str:
    return f"{student}-{re.sub('[^A-Za-z]+', '-', setting)}-{seed}"


def one_step(parts: Parts) -> Callable[[], None]:
    """Trains on one batch after the other of epoch 0, over and over."""
    stepper = workload.Stepper(parts)

    def pairs() -> Iterator[tuple]:
        while True:
            data = parts.train_loader.epoch(0)
            ask = (parts.augment, parts.teachers, parts.trainer.autocast)
            if parts.answers is None:
                yield from taught(data, *ask)
            else:
                yield from parts.answers.taught(0, data, *ask)

    batches = pairs()
    return lambda: stepper(*next(batches))


def merged(*parts: Overrides) -> Overrides:
    """Later ones win, as a recipe over its base."""
    return functools.reduce(merge, parts)


def write_whole(path: Path, text: str) -> None:
    """There whole or not at all."""
    draft = path.with_suffix(".partial")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


# -- tables and figure ------------------------------------------------------------------------------------------------


def students_of(report: harness.Report) -> Iterator[tuple[str, str, list[harness.Report]]]:
    """(student, setting, its runs over the seeds), in the order of the study."""
    groups: dict[tuple[str, str], list[harness.Report]] = {}
    for run in report["runs"]:
        if "setting" in run:
            groups.setdefault((run["student"], run["setting"]), []).append(run)
    order = list(SETTINGS)
    for (student, setting), runs in sorted(groups.items(), key=lambda item: (item[0][0], order.index(item[0][1]))):
        yield student, setting, runs


def mean_and_spread(values: list[float]) -> str:
    """Mean, and the deviation over seeds where there are several."""
    mean = statistics.mean(values)
    return f"{mean:.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:.2f}"


def show(report: harness.Report) -> str:
    found = report["conditions"]
    teachers = [
        {
            "job": run["job"],
            "top1": f"{run['summary']['result']['top1']:.2f}",
            "samples": run["summary"]["samples"],
            "hours": run["summary"]["gpu_hours"],
        }
        for run in report["runs"]
        if run["verb"] == "train" and "setting" not in run
    ]
    answers = [
        {
            "job": run["job"],
            "asked": run["summary"]["asked"],
            "bytes": run["summary"]["bytes"],
            "hours": run["summary"]["gpu_hours"],
        }
        for run in report["runs"]
        if run["verb"] == "teach"
    ]
    rows = []
    for student, setting, runs in students_of(report):
        results = [run["summary"]["result"] for run in runs]
        row: harness.Report = {"student": student, "setting": setting, "runs": len(runs)}
        for head in ("top1", "top1_class", "top1_distill"):
            if all(head in r for r in results):
                row[head] = mean_and_spread([r[head] for r in results])
        row["samples"] = round(statistics.mean(run["summary"]["samples"] for run in runs))
        row["hours"] = f"{statistics.mean(run['summary']['gpu_hours'] for run in runs):.3f}"
        cost = (report["costs"] or {}).get("cpu_seconds_per_sample", {})
        for base in sorted(cost, key=len, reverse=True):
            if setting.startswith(base):
                row["cost"] = f"{row['samples'] * cost[base] / 60:.1f}"
                break
        rows.append(row)
    columns = {
        "student": "student",
        "setting": "setting",
        "runs": "runs",
        "top-1, %": "top1",
        "class head": "top1_class",
        "distillation heads": "top1_distill",
        "samples": "samples",
        "CPU minutes": "cost",
        "hours held": "hours",
    }
    where = found["gpu"]["name"] if found["gpu"] else f"{found['cpu']}, {found['cores']} cores"
    parts = [f"{where}, torch {found['versions']['torch']}, {found['date'][:10]}, commit {found['commit'][:9]}"]
    parts.append(
        harness.table(teachers, {"teacher": "job", "top-1, %": "top1", "samples": "samples", "hours held": "hours"})
    )
    parts.append(harness.table(answers, {"answers": "job", "asked": "asked", "bytes": "bytes", "hours held": "hours"}))
    parts.append(harness.table(rows, columns))
    parts.append(
        "Mean ± deviation over seeds." + (f" Missing: {', '.join(report['missing'])}." if report["missing"] else "")
    )
    return "\n\n".join(parts)


def draw(report: harness.Report, path: Path) -> None:
    """Validation accuracy over samples and over cost, mean over seeds with every seed as a dot at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    costs = (report["costs"] or {}).get("cpu_seconds_per_sample")
    students = sorted({student for student, _, _ in students_of(report)})
    figure, axes = plt.subplots(len(students), 2, figsize=(11, 4.2 * len(students)), squeeze=False, sharey="row")
    for student, setting, runs in students_of(report):
        left, right = axes[students.index(student)]
        number = list(SETTINGS).index(setting)
        style: dict[str, Any] = {
            "color": f"C{number % 10}",
            "linestyle": "--" if SETTINGS[setting].cost_of_std else "-",
        }
        curves = [run["evaluations"] for run in runs]
        points = list(zip(*curves, strict=False))
        x = [statistics.mean(e["samples"] for e in at) for at in points]
        if costs:
            base = next(s for s in sorted(costs, key=len, reverse=True) if setting.startswith(s))
            cost = [value * costs[base] / 60 for value in x]
        else:
            cost = [statistics.mean(e["gpu_hours"] for e in at) * 60 for at in points]
        y = [statistics.mean(e["top1"] for e in at) for at in points]
        for axis, values in ((left, x), (right, cost)):
            axis.plot(values, y, label=setting, **style)
            axis.scatter([values[-1]] * len(runs), [c[-1]["top1"] for c in curves], s=12, color=style["color"])
    for row, student in zip(axes, students, strict=True):
        row[0].set(xlabel="training samples", ylabel="validation top-1, %", title=f"{student}: over samples")
        row[1].set(
            xlabel="CPU minutes" if costs else "GPU minutes", title=f"{student}: at equal cost, teachers' excluded"
        )
        row[0].legend()
        for axis in row:
            axis.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def rounded(record: harness.Report) -> harness.Report:
    return {k: harness.significant(v, 6) if isinstance(v, float) else v for k, v in record.items() if k != "time"}


def thin(records: list, most: int) -> list:
    """At most so many, evenly chosen, the last one among them."""
    step = max(1, -(-len(records) // most))
    return records[::-1][::step][::-1]


# -- the command ------------------------------------------------------------------------------------------------------


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
    parser.add_argument("--costs", action="store_true", help=argparse.SUPPRESS)


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
        write_whole(record, json.dumps({"size": args.size, "data": args.data, "precision": precision}))
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
