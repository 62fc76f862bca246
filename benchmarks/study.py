"""The study's queue of real `std-fast` runs in a folder; see evidence.py."""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks import harness, workload
from benchmarks.study_data import BETONS, prepare, store_predictions
from benchmarks.study_sizes import SETTINGS, SIZES, Overrides, Setting
from pipelines.errors import UserError
from pipelines.files import write_atomic
from std_fast.cli import STOPPED
from std_fast.config import recipe as recipes
from std_fast.config.schema import merge
from std_fast.runtime.checkpoint import listed
from std_fast.runtime.metrics import read_jsonl
from std_fast.training.build import Parts, build

TARGETS = "targets"
COLLECTED = "collected.json"  # in the folder of a run that another machine made


@dataclass(frozen=True)
class Job:
    """One process. `recipe` is asked when all jobs in `after` are done."""

    name: str
    verb: str
    recipe: Callable[[], Overrides]
    after: tuple[str, ...] = ()
    about: Overrides = field(default_factory=dict)


COSTS = Job("costs", "costs", dict, (TARGETS,))


class Study:
    """The jobs of a size in a folder.

    Args:
        source: Imagenette, as DIR/train and DIR/val.
        teachers: folder of the teachers' weights.
    """

    def __init__(
        self, size: str, work: Path, source: str, teachers: str, precision: str = "auto", device: str = "auto"
    ) -> None:
        self.name, self.size, self.work = size, SIZES[size], work
        self.precision, self.device = precision, device
        self.source, self.teachers = Path(source), Path(teachers)
        self.jobs = {job.name: job for job in self._jobs()}

    def out(self, job: str) -> Path:
        return self.work / job

    def done(self, job: str) -> bool:
        """Trained and its predictions stored, or all targets stored, or costs measured."""
        name = {"train": "predictions.json", "teach": "summary.json", "costs": "costs.json"}[self.jobs[job].verb]
        return (self.out(job) / name).is_file()

    def _jobs(self) -> Iterator[Job]:
        """In the order in which partial results are worth most: one initialisation of every setting, then the next."""
        size = self.size
        length = f"{size.epochs} epochs"
        first = next(iter(size.students))
        yield Job(TARGETS, "teach", functools.partial(self._student, Setting({}), first, length=length))
        costs_due = True
        for init in range(max(len(inits) for inits in size.inits.values())):
            for student in size.students:
                for name in size.settings if init < len(size.inits[student]) else ():
                    setting = SETTINGS[name]
                    if setting.once and init > 0:
                        continue
                    if setting.cost_of and costs_due:
                        yield COSTS
                        costs_due = False
                    yield self._run(student, name, size.inits[student][init])
        if costs_due:
            yield COSTS

    def _run(self, student: str, name: str, init: int) -> Job:
        setting = SETTINGS[name]
        job = run_name(student, name, init)
        after = ((COSTS.name,) if setting.cost_of else ()) + ((TARGETS,) if setting.teachers else ())

        def recipe() -> Overrides:
            distill = dict(setting.distill)
            epochs = float(self.size.epochs)
            if setting.cost_of:
                costs, base = self.costs(), name.split(",")[0]
                epochs *= costs[cost_name(student, setting.cost_of)] / costs[cost_name(student, base)]
                distill |= {"views": self.size.epochs} if setting.teachers else {}  # there are no other targets
            return self._student(Setting(distill, setting.teachers), student, job, init, f"{epochs:.3f} epochs")

        return Job(job, "train", recipe, after, {"student": student, "setting": name, "init": init})

    def _student(
        self, setting: Setting, student: str, job: str = TARGETS, init: int = 0, length: str = ""
    ) -> Overrides:
        """A recipe."""
        size = self.size
        betons = {name: str(self.work / "data" / f"{name}.beton") for name in BETONS}
        run = {"precision": self.precision, "init_seed": init, "length": length, "out": str(self.out(job))}
        common: Overrides = {"data": {"train": betons["train"], "val": betons["held-out"]}, "run": run}
        distill: Overrides = dict(setting.distill)
        if setting.teachers:
            weights = {name: str((self.teachers / f"{name}.safetensors").resolve()) for name in size.teachers}
            distill = {
                "mode": "std",
                "teachers": [{"name": name, "weights": path} for name, path in weights.items()],
                "target_cache": str(self.out(TARGETS) / "targets"),
            } | distill
            if distill.get("taps") == [-1]:
                distill["taps"] = [size.students[student]["student"]["options"]["depth"]]
        on = {"run": {"device": self.device}}
        return merged(on, size.common, size.students[student], common, {"distill": distill})

    # -- what later jobs follow from ----------------------------------------------------------------------------------

    def costs(self) -> dict[str, float]:
        """Seconds per sample of each student and setting that was measured; of the processor where it trains on one."""
        path = self.out("costs") / "costs.json"
        return json.loads(path.read_text(encoding="utf-8"))["seconds_per_sample"] if path.is_file() else {}

    def summary(self, job: str) -> harness.Report:
        return json.loads((self.out(job) / "summary.json").read_text(encoding="utf-8"))

    # -- work ---------------------------------------------------------------------------------------------------------

    def work_off(
        self, jobs: int, only: str, until: float, children: Children, after_each: Callable[[], None] = lambda: None
    ) -> list[str]:
        """Runs what is not done, in order, `jobs` at a time; returns the jobs that are left.

        Raises:
            UserError: at the end, naming the jobs that failed.
        """
        wanted = self._wanted(only)
        for name in self.size.teachers:
            if not (self.teachers / f"{name}.safetensors").is_file():
                raise UserError(
                    f"--teachers: {self.teachers} lacks {name}.safetensors; make it by examples/imagenet_teachers.py"
                )
        prepare(self.source, self.work / "data")
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
                    return [j for j in wanted if not self.done(j)]
                for future in wait(running, timeout=1.0, return_when=FIRST_COMPLETED).done:
                    job, code = running.pop(future), future.result()
                    if code not in (0, STOPPED) and not children.stopped:
                        failed.add(job)
                    harness.progress(f"{job}: {'done' if code == 0 else f'exit code {code}, see its log'}")
                    after_each()
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
            command = [sys.executable, "-m", "benchmarks.evidence", "--work", str(self.work), "--costs", "--json"]
            command += ["--repeats", str(self.size.cost_turns)]
        else:
            path = folder / "wanted.yaml"
            if not path.exists():  # a length that follows from measured costs is settled once
                path.write_text(yaml.safe_dump(job.recipe(), sort_keys=False), encoding="utf-8")
            command = [sys.executable, "-m", "std_fast.cli", job.verb, str(path)]
            command += ["--quiet", "--json"] + (["--resume"] if job.verb == "train" else [])
        harness.progress(f"{job.name}: {'continues' if listed(folder / 'checkpoints') else 'begins'}")
        began = time.perf_counter()
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            code, said = children.run(command, log)
        if code == 0 and job.verb == "teach":
            hours = (time.perf_counter() - began) / 3600  # of the complete process, imports included
            record = json.loads(said) | {"gpu_hours": hours}
            write_atomic(folder / "summary.json", json.dumps(record))
        if code == 0 and job.verb == "train":
            store_predictions(folder, self.work / "data" / "val.beton")
        return code


def measure_costs(study: Study, args: argparse.Namespace) -> None:
    """Time per sample of each way to train, targets stored, from raw batch to updated weights."""
    import torch

    torch.set_num_threads(1)
    folder = study.out("costs")
    folder.mkdir(exist_ok=True)
    wanted = {}
    for student in study.size.students:
        for name in study.size.settings:
            setting = SETTINGS[name]
            if setting.cost_of or setting.once:
                continue
            path = folder / f"{run_name(student, name, 0)}.yaml"
            recipe = study._student(setting, student, "costs", 0, f"{study.size.epochs} epochs")
            path.write_text(yaml.safe_dump(merge(recipe, study.size.costs)), encoding="utf-8")
            wanted[cost_name(student, name)] = recipes.load(str(path))
    times = time_steps(wanted, args)
    batch = next(iter(wanted.values())).run.batch
    report = {
        "seconds_per_sample": {name: t.seconds / batch for name, t in times.items()},
        "rows": [harness.row(name, t, batch) for name, t in times.items()],
        "conditions": harness.conditions(args.device),
    }
    write_atomic(folder / "costs.json", json.dumps(report, indent=1))


def time_steps(wanted: Mapping[str, recipes.Recipe], args: argparse.Namespace) -> dict[str, harness.Times]:
    """A training step of each recipe, all in turns. UserError where one cannot be built."""
    with ExitStack() as stack:
        parts = {}
        for name, recipe in wanted.items():
            parts[name] = build(recipe)
            stack.callback(parts[name].close)
        return harness.measure({name: one_step(p) for name, p in parts.items()}, args)


def collect(study: Study) -> harness.Report:
    """Recipe, evaluations, metrics of the log, ledger and predictions of every run that is done."""
    runs = []
    for job in study.jobs.values():
        folder = study.out(job.name)
        if job.verb == "costs":
            continue
        if (folder / COLLECTED).is_file():
            runs.append(json.loads((folder / COLLECTED).read_text(encoding="utf-8")))
            continue
        if not study.done(job.name):
            continue
        run = {"job": job.name, "verb": job.verb, **job.about, "summary": study.summary(job.name)}
        if job.verb == "train":
            records = read_jsonl(folder / "metrics.jsonl")
            run |= {
                "recipe": yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")),
                "predictions": json.loads((folder / "predictions.json").read_text(encoding="utf-8")),
                "evaluations": [rounded(r) for r in records if r["kind"] == "eval"],
                "log": harness.thinned([rounded(r) for r in records if r["kind"] == "train"], 25),
            }
        runs.append(run)
    costs = study.out("costs") / "costs.json"
    return {
        "variant": study.name,
        "runs": runs,
        "seconds_per_sample": study.costs(),
        "costs": json.loads(costs.read_text(encoding="utf-8")) if costs.is_file() else None,
        "missing": [job for job in study.jobs if not study.done(job)],
    }


def restore(study: Study, report: harness.Report) -> None:
    """Takes what `collect` found on another disk as done, but for the targets themselves, which it does not hold."""
    for run in report["runs"]:
        folder = study.out(run["job"])
        if run["job"] not in study.jobs or study.done(run["job"]):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("summary", "predictions") if run["verb"] == "train" else ():
            write_atomic(folder / f"{name}.json", json.dumps(run[name]))
        write_atomic(folder / COLLECTED, json.dumps(run))
    if report["costs"] and not study.done(COSTS.name):
        study.out(COSTS.name).mkdir(exist_ok=True)
        write_atomic(study.out(COSTS.name) / "costs.json", json.dumps(report["costs"]))


class Children:
    """The processes under way: a signal to this one asks them to save and stop."""

    def __init__(self, jobs: int) -> None:
        self.stopped = False
        self._environment = {"OMP_NUM_THREADS": str(max(1, harness.cores() // jobs))} | dict(os.environ)
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
        """Exit code and standard output; standard error goes to the log, and at the end the processor time."""
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True, env=self._environment,
            preexec_fn=harness.end_with_parent,
        )  # fmt: skip
        self._processes.add(process)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        try:
            said, _ = process.communicate()
        finally:
            self._processes.discard(process)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        log.write(f"processor time of all children that ended: {after.ru_utime - before.ru_utime:.1f} s\n")
        return process.returncode, said


def run_name(student: str, setting: str, init: int) -> str:
    return re.sub("[^A-Za-z0-9]+", "-", f"{student}-{setting}-{init}")


def cost_name(student: str, setting: str) -> str:
    return f"{student}: {setting}"


def one_step(parts: Parts) -> Callable[[], None]:
    """Trains on one batch after the other of epoch 0, over and over."""
    stepper = workload.Stepper(parts)

    parts.stream.views = 1
    return lambda: stepper(next(parts.stream))


def merged(*parts: Overrides) -> Overrides:
    """Later ones win, as a recipe over its base."""
    return functools.reduce(merge, parts)


def rounded(record: harness.Report) -> harness.Report:
    return {k: harness.significant(v, 6) if isinstance(v, float) else v for k, v in record.items() if k != "time"}
