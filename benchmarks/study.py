"""The study's queue of real `std-fast` runs in a folder; see evidence.py."""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import os
import re
import signal
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
from benchmarks.study_sizes import BOTH, PUSHED, SETTINGS, SIZES, Overrides, Setting
from pipelines.errors import UserError
from pipelines.files import write_atomic
from std_fast.commands.arguments import STOPPED
from std_fast.config import files as recipe_files
from std_fast.config import recipe as recipes
from std_fast.config.schema import merge
from std_fast.runtime.checkpoint import listed
from std_fast.runtime.metrics import read_jsonl
from std_fast.teachers.overlap import taught
from std_fast.training.build import Parts, build


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
        """Trained to the end, or all targets stored, or costs measured."""
        return (self.out(job) / ("costs.json" if job.startswith("costs") else "summary.json")).is_file()

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
                job = targets_name(teachers, seed)
                yield Job(
                    job,
                    "teach",
                    functools.partial(self._student, Setting({}, teachers), next(iter(size.students)), seed),
                    tuple(f"teacher-{name}" for name in teachers),
                )
        if not size.budget:
            after = tuple(targets_name(t, size.seeds[0]) for t in sorted(stored))
            plain = tuple(name for name in size.settings if not SETTINGS[name].cost_of_std)
            yield Job("costs", "costs", dict, after, {"names": plain})
            if size.push_minutes:
                yield Job("costs-pushed", "costs", dict, after, {"names": PUSHED})
        for seed in size.seeds:
            for student in size.students:
                for name in size.settings:
                    yield self._student_job(student, name, seed)
        for minutes in size.push_minutes:
            for name in PUSHED:
                yield self._pushed_job(name, minutes)

    def _student_job(self, student: str, name: str, seed: int) -> Job:
        setting = SETTINGS[name]
        after: tuple[str, ...] = (targets_name(setting.teachers, seed),) if setting.teachers else ()
        if setting.cost_of_std:
            after += (run_name(student, "STD", seed),) if self.size.budget else ("costs",)
        job = run_name(student, name, seed)

        def recipe() -> Overrides:
            length = f"{self.size.epochs} epochs"
            if setting.cost_of_std:
                length = self._equal_cost(student, name, seed)
            return merged(self._student(setting, student, seed), {"run": {"out": str(self.out(job)), "length": length}})

        return Job(job, "train", recipe, after, {"student": student, "setting": name, "seed": seed})

    def _pushed_job(self, name: str, minutes: float) -> Job:
        setting, seed, student = SETTINGS[name], self.size.seeds[0], next(iter(self.size.students))
        after: tuple[str, ...] = (targets_name(setting.teachers, seed),) if setting.teachers else ()
        after += () if self.size.budget else ("costs-pushed",)
        job = f"{run_name(student, name, seed)}-{minutes:g}-minutes"

        def recipe() -> Overrides:
            length = f"{minutes / 60:.5f} gpu-hours"
            if not self.size.budget:
                length = f"{max(1, round(60 * minutes / self.costs()[name]))} samples"
            return merged(self._student(setting, student, seed), {"run": {"out": str(self.out(job)), "length": length}})

        return Job(job, "train", recipe, after, {"student": student, "setting": name, "seed": seed, "minutes": minutes})

    def _student(self, setting: Setting, student: str, seed: int) -> Overrides:
        """The recipe of a student but for folder and length."""
        distill = dict(setting.distill)
        if setting.teachers:
            targets = targets_name(setting.teachers, seed)
            distill |= {
                "mode": "std",
                "teachers": [{"weights": str(self.out(f"teacher-{name}"))} for name in setting.teachers],
                "target_cache": str(self.out(targets) / "targets"),
            }
            if distill.get("taps") == [-1]:
                distill["taps"] = [self._depth(student)]
            if setting.pushed:
                distill["views"] = self.size.epochs
        overrides = self._common(self.size.students[student], seed=seed, length=f"{self.size.epochs} epochs")
        return merged(overrides, {"distill": distill}, self.size.push if setting.pushed else {})

    def _depth(self, student: str) -> int:
        """Blocks of a student."""
        base = yaml.safe_load(recipe_files.find(self.size.common["base"]).read_text(encoding="utf-8"))
        options = merged(base, self.size.common, self.size.students[student])["student"]["options"]
        return options["depth"] if "depth" in options else sum(options["layers"])

    def _equal_cost(self, student: str, name: str, seed: int) -> str:
        """The length that costs what this seed's STD run cost."""
        if not self.size.budget:
            per_sample = self.costs()
            base = next(s for s in ("plain", "DeiT token") if name.startswith(s))
            return f"{self.size.epochs * per_sample['STD'] / per_sample[base]:.3f} epochs"
        hours = self._hours(run_name(student, "STD", seed))
        if SETTINGS[name].cost_of_std == "with teachers":
            hours += self._hours(targets_name(BOTH, seed)) + sum(self._hours(f"teacher-{t}") for t in BOTH)
        return f"{hours:.5f} gpu-hours"

    def costs(self) -> dict[str, float]:
        """Processor seconds per sample of each setting that was measured."""
        return {name: value for costs in self._measured() for name, value in costs["cpu_seconds_per_sample"].items()}

    def _measured(self) -> list[harness.Report]:
        """What the jobs that measure costs wrote."""
        paths = [self.out(job.name) / "costs.json" for job in self.jobs.values() if job.verb == "costs"]
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]

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
            command = [sys.executable, "-m", "benchmarks.evidence", "--size", self.name, "--costs", job.name, "--json"]
            command += ["--work", str(self.work), "--data", *self.data, "--precision", self.precision]
            command += ["--repeats", str(self.size.cost_turns)]
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
            write_atomic(folder / "summary.json", json.dumps(record))
        return code

    def measure_costs(self, args: argparse.Namespace) -> None:
        """Processor time per sample of each way to teach, targets stored, from raw batch to updated weights."""
        import torch

        torch.set_num_threads(1)
        seed, student = self.size.seeds[0], next(iter(self.size.students))
        parts = {}
        for name in self.jobs[args.costs].about["names"]:
            path = self.out(args.costs) / f"{run_name(student, name, seed)}.yaml"
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
        write_atomic(self.out(args.costs) / "costs.json", json.dumps(report, indent=1))

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
        return {
            "variant": self.name,
            "runs": runs,
            "cpu_seconds_per_sample": self.costs(),
            "costs": self._measured(),
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


def targets_name(teachers: tuple[str, ...], seed: int) -> str:
    return f"targets-{'-'.join(teachers)}-{seed}"


def run_name(student: str, setting: str, seed: int) -> str:
    return f"{student}-{re.sub('[^A-Za-z0-9]+', '-', setting)}-{seed}"


def one_step(parts: Parts) -> Callable[[], None]:
    """Trains on one batch after the other of epoch 0, over and over."""
    stepper = workload.Stepper(parts)

    def pairs() -> Iterator[tuple]:
        while True:
            data = parts.train_loader.epoch(0)
            ask = (parts.augment, parts.teachers, parts.trainer.autocast)
            if parts.target_cache is None:
                yield from taught(data, *ask)
            else:
                yield from parts.target_cache.taught(0, data, *ask)

    batches = pairs()
    return lambda: stepper(*next(batches))


def merged(*parts: Overrides) -> Overrides:
    """Later ones win, as a recipe over its base."""
    return functools.reduce(merge, parts)


def rounded(record: harness.Report) -> harness.Report:
    return {k: harness.significant(v, 6) if isinstance(v, float) else v for k, v in record.items() if k != "time"}


def thin(records: list, most: int) -> list:
    """At most so many, evenly chosen, the last one among them."""
    step = max(1, -(-len(records) // most))
    return records[::-1][::step][::-1]
