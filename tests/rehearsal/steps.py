"""What the host asks of the GPU in a step: launches, copies and waits, from the fake GPU's log.

python -m tests.rehearsal.steps --json FILE        # all forms of a step, eager and compiled
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import fake_gpu, harness
from benchmarks.harness import ROOT

FORMS = ("plain", "teachers", "teachers beside", "targets written")
WARM, STEPS = 4, 3  # before counting; counted
EPOCH = 64  # steps: none of those counted begins or ends an epoch


def recipe_of(form: str, compile: str, folder: Path):
    """The small Mixer of commands.py with 1,024 images, so that the counted steps lie inside an epoch."""
    from std_fast.config.recipe import Recipe
    from std_fast.config.schema import from_dict
    from tests.rehearsal.commands import RECIPE

    data = {**RECIPE["data"], "train": str(folder / "images"), "val": ""}
    run = {**RECIPE["run"], "batch": 16, "out": str(folder / "run"), "compile": compile, "length": "2 epochs"}
    run |= {"overlap": "on" if form == "teachers beside" else "off"}
    teacher = {"name": "test_resnet", "weights": str(folder / "resnet.safetensors"), "image_size": 16}
    distill = {"mode": "std", "teachers": [teacher] * 2, "mine": {"every": "1 step"}}
    if form == "targets written":
        distill["target_cache"] = str(folder / "targets")
    if form == "plain":
        distill = {"mode": "none"}
    return from_dict(Recipe, {**RECIPE, "data": data, "run": run, "distill": distill})


def take_steps(form: str, compile: str, folder: Path) -> None:
    """In the process under the tool: marks the log at each step."""
    import timm
    from safetensors.torch import save_file

    from benchmarks.workload import write_images
    from std_fast.training.run import Run
    from std_fast.training.schedule import StepSettings

    tool = importlib.import_module("fake_gpu")  # after torch, which imports it itself
    write_images(folder / "images", 3, 16 * EPOCH, 48)
    save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), folder / "resnet.safetensors")
    run = Run(recipe_of(form, compile, folder), quiet=True)
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
        words = fake_gpu.command(
            ["-m", "tests.rehearsal.steps", "--form", form, "--compile", compile, "--in", name], tool
        )
        env = fake_gpu.environment({"FAKE_GPU_LOG": str(log)})
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        steps = counts_of(log)
    assert len(steps) == STEPS, steps
    return collections.Counter({kind: max(step[kind] for step in steps) for kind in set().union(*steps)})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.rehearsal.steps", description=__doc__)
    parser.add_argument("--form", choices=FORMS)
    parser.add_argument("--compile", choices=("off", "inductor"), default="off")
    parser.add_argument("--in", dest="folder", help="used by this command itself, under the tool")
    parser.add_argument("--json", metavar="FILE", help="write the counts there too")
    args = parser.parse_args()
    if args.folder:
        take_steps(args.form, args.compile, Path(args.folder))
        return 0
    tool = fake_gpu.find()
    if tool is None:
        print(fake_gpu.missing(), file=sys.stderr)
        return 2
    rows = []
    for compile in ("off", "inductor"):
        for form in FORMS:
            rows.append({"step": form, "compile": compile, **count(form, compile, tool)})
            print(rows[-1], file=sys.stderr, flush=True)
    if args.json:
        report = {"conditions": harness.conditions(), "rows": rows}
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    keys = ("step", "compile", "launches", "of Triton", "copies", "blocking copies", "host waits")
    print(harness.table([{key: row.get(key, 0) for key in keys} for row in rows], {key: key for key in keys}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
