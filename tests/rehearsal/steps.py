"""What the host asks of the GPU in a step: launches, copies and waits, from the fake GPU's log.

python -m tests.rehearsal.steps --out benchmarks/results       # all forms of a step, eager and compiled
"""

from __future__ import annotations

import argparse
import collections
import functools
import importlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import fake_gpu, harness
from benchmarks.harness import ROOT
from pipelines.errors import UserError

FORMS = {
    "plain": "plain",
    "targets given": "STD, targets given",
    "targets stored": "STD, targets read from a cache",
    "targets written": "STD, two teachers in turn, targets written to a cache",
    "teachers": "STD, two teachers in turn",
    "teachers beside": "STD, two teachers beside the student",
}
MOST = {("teachers beside", "off"): 1440, ("targets stored", "off"): 1300, ("teachers beside", "inductor"): 520}
"""launches that a test allows: a tenth more than were counted"""
BATCH = 16
WARM, STEPS = 4, 3  # before counting; counted
EPOCH = 64  # steps: none of those counted begins or ends an epoch


def recipe_of(form: str, compile: str, folder: Path):
    """The small Mixer of commands.py with 1,024 images, so that the counted steps lie inside an epoch."""
    from std_fast.config.recipe import Recipe
    from std_fast.config.schema import from_dict
    from tests.rehearsal.commands import RECIPE

    data = {**RECIPE["data"], "train": str(folder / "images"), "val": ""}
    run = {**RECIPE["run"], "batch": BATCH, "out": str(folder / "run"), "compile": compile, "length": "2 epochs"}
    run |= {"overlap": "on" if form == "teachers beside" else "off"}
    teacher = {"name": "test_resnet", "weights": str(folder / "resnet.safetensors"), "image_size": 16}
    distill = {"mode": "std", "teachers": [teacher] * 2, "mine": {"every": "1 step"}}
    if form in ("targets stored", "targets written"):
        distill["target_cache"] = str(folder / "targets")
    if form == "plain":
        distill = {"mode": "none"}
    return from_dict(Recipe, {**RECIPE, "data": data, "run": run, "distill": distill})


def take_steps(form: str, compile: str, folder: Path) -> None:
    """In the process under the tool: marks the log at each step."""
    import timm
    from safetensors.torch import save_file

    from benchmarks.step import store
    from benchmarks.workload import given_targets, write_images
    from std_fast.commands.measure import ConstantTargets
    from std_fast.method.losses import TeacherTargets
    from std_fast.training.run import Run
    from std_fast.training.schedule import StepSettings

    tool = importlib.import_module("fake_gpu")  # after torch, which imports it itself
    write_images(folder / "images", 3, BATCH * EPOCH, 48)
    save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), folder / "resnet.safetensors")
    run = Run(recipe_of(form, compile, folder), quiet=True)
    if form == "targets given":
        run.stream.source = ConstantTargets(given_targets(run.parts))
    if form == "targets stored":
        on_host = (x if x is None else x.cpu() for x in given_targets(run.parts))  # where `pack` computes
        store(run.parts, TeacherTargets._make(on_host))
    for step in range(1, WARM + STEPS + 1):
        tool.mark("step" if step > WARM else "warm")
        run.trainer.step(next(run.stream), StepSettings(step, 1e-3, 1e-3, with_mine=form != "plain"))
    tool.mark("end")
    run.close()


def counts_of(log: Path) -> list[collections.Counter]:
    """Of each counted step: `launches`, `graph launches`, `copies`, `blocking copies`, `host waits`.

    Waits and blocking copies are those of the thread that takes the steps: loaders and writers have threads to wait in.
    """
    steps: list[collections.Counter] = []
    counting, own = False, ""
    for line in log.read_text(encoding="utf-8").splitlines():
        thread, *words = line.split()[2:]
        if words[0] == "mark":
            own = thread
            counting = words[1] == "step"
            if counting:
                steps.append(collections.Counter())
        elif counting:
            waits = () if thread == own else ("blocking copies", "host waits")
            steps[-1].update(kind for kind in kinds(words) if kind not in waits)
    return steps


def kinds(words: list[str]) -> list[str]:
    """What a line of the log counts as. A copy from pageable memory (`staged`) makes the host wait for its bytes."""
    if words[0] == "launch":
        return ["launches"] + (["of Triton"] if "name=triton_" in " ".join(words) else [])
    if words[0] == "memcpy":
        return ["copies"] + (["blocking copies"] if {"blocking", "staged"} & set(words) else [])
    return {"sync": ["host waits"], "graph-launch": ["graph launches"]}.get(words[0], [])


def count(form: str, compile: str, tool: Path) -> collections.Counter:
    """The most of each kind in any counted step. RuntimeError, with the last line, when the process fails."""
    with tempfile.TemporaryDirectory(prefix="std-fast-steps-") as name:
        log = Path(name) / "calls.log"
        words = fake_gpu.command(["-m", "tests.rehearsal.steps", "--take", form, compile, name], tool)
        env = fake_gpu.environment({"FAKE_GPU_LOG": str(log)})
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        steps = counts_of(log)
    assert len(steps) == STEPS, steps
    return collections.Counter({kind: max(step[kind] for step in steps) for kind in set().union(*steps)})


def check(form: str, compile: str, tool: Path) -> None:
    """AssertionError where a steady step waits, copies in a way that waits, or launches more kernels than it did."""
    found = count(form, compile, tool)
    assert found["host waits"] == found["blocking copies"] == 0, found
    assert 0 < found["launches"] <= MOST[form, compile], found


COLUMNS = {
    "step": "name",
    "compile": "compile",
    "launches": "launches",
    "of these, Triton's": "of Triton",
    "copies": "copies",
    "blocking copies": "blocking copies",
    "waits of the thread that steps": "host waits",
}


def report(args: argparse.Namespace) -> dict[str, Any]:
    tool = fake_gpu.find()
    if tool is None:
        raise UserError(fake_gpu.missing())
    rows = []
    for compile in args.compile:
        for form in args.forms:
            harness.progress(f"{form}, {compile}")
            counts = count(form, compile, tool)
            kinds = {key: counts[key] for key in list(COLUMNS.values())[2:]}
            rows.append({"name": FORMS[form], "compile": compile, **kinds})
    return {"variant": "-".join(["fake-h200", *args.compile]), "rows": rows, "batch": BATCH, "counted_steps": STEPS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS), help="[all]")
    parser.add_argument("--compile", nargs="+", choices=("off", "inductor"), default=["off", "inductor"], help="[both]")


def main() -> int:
    if sys.argv[1:2] == ["--take"]:  # the process under the tool
        form, compile, folder = sys.argv[2:]
        take_steps(form, compile, Path(folder))
        return 0
    show = functools.partial(harness.show, columns=COLUMNS)
    return harness.main("steps", report, show, add_arguments, text=__doc__)


if __name__ == "__main__":
    sys.exit(main())
