"""Do runs with a GPU-hour budget land on it: plain, with teachers, with a slow disk, killed, and stopped by a signal?

Each case is a real `std-fast train` in a process of its own, timed by this one from its start to its exit. Asked of
each case: the wall clock is within 97 to 100 % of the budget (time from a kill to the resumption is not counted), the
last learning rate is the final one, and the run's ledger equals the wall clock within 1 %. Else the exit code is 1.

    python -m benchmarks.budget_runs --json benchmarks/results/budget_runs.json

takes about ten minutes on a machine that does nothing else; `--cases plain --hours 0.005` takes half a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import conditions
from pipelines.read.batch import Batch, Loader
from std_fast import cli
from std_fast.commands.arguments import STOPPED
from std_fast.commands.demo import write_digits
from std_fast.config import recipe as recipes
from std_fast.runtime.budget import in_words
from std_fast.runtime.metrics import read_jsonl
from std_fast.training import build


@dataclass(frozen=True)
class Case:
    recipe: str
    hours: float
    throttled: bool = False
    interrupt: tuple[signal.Signals, ...] = ()
    """sent one after the other, each to a process of its own, at random moments"""


CASES = {
    "plain": Case("digits_mixer", 0.01),
    "teachers": Case("digits_std", 0.02),
    "throttled loader": Case("digits_std", 0.03, throttled=True),
    "killed": Case("digits_std", 0.04, interrupt=(signal.SIGKILL, signal.SIGKILL)),
    "stopped": Case("digits_mixer", 0.05, interrupt=(signal.SIGTERM, signal.SIGUSR1)),
}


def throttle(seconds: float) -> None:
    """From now on every tenth batch of every training loader comes late by up to twice `seconds`."""
    opens = build.open_train_loader
    dice = random.Random(0)

    def slow(epoch: Callable[..., Generator[Batch]]) -> Callable[..., Generator[Batch]]:
        def batches(*args: int) -> Generator[Batch]:
            with closing(epoch(*args)) as inner:
                for number, batch in enumerate(inner):
                    if number % 10 == 9:
                        time.sleep(2 * seconds * dice.random())
                    yield batch

        return batches

    def opened(*args: Any, **kw: Any) -> Loader:
        loader = opens(*args, **kw)
        loader.epoch = slow(loader.epoch)  # type: ignore[method-assign]
        return loader

    build.open_train_loader = opened


def run_case(case: Case, hours: float, out: Path, overrides: list[str], throttled_by: float) -> dict[str, Any]:
    """Trains to the end of the budget, with the interruptions of the case."""
    child = ["-m", "benchmarks.budget_runs", "--throttle", str(throttled_by), "--child"]
    program = child if case.throttled else ["-m", "std_fast.cli", "train"]
    command = [sys.executable, *program, case.recipe, "--quiet", "--run.out", str(out), *overrides]
    command += ["--budget.gpu-hours", str(hours), "--run.save-every", "10 seconds"]
    dice = random.Random(f"{case}")
    wall, exits = 0.0, []
    # moments in the first two thirds of the budget, some time apart
    moments = [(0.3 + 0.25 * number + dice.uniform(0, 0.1)) * hours * 3600 for number in range(len(case.interrupt))]
    for number, what in enumerate((*case.interrupt, None)):
        began = time.perf_counter()
        process = subprocess.Popen([*command, *(["--resume"] if number else [])], stdout=subprocess.DEVNULL)
        if what is not None:
            time.sleep(max(0.0, began + moments[number] - wall - time.perf_counter()))
            process.send_signal(what)
        exits.append(process.wait())
        wall += time.perf_counter() - began
    summary = json.loads((out / "summary.json").read_text())
    records = read_jsonl(out / "metrics.jsonl")
    recipe = recipes.loads((out / "recipe.yaml").read_text())
    lr = [r["lr"] for r in records if r["kind"] == "train"][-1]
    expected_exits = [{signal.SIGKILL: -signal.SIGKILL}.get(what, STOPPED) for what in case.interrupt] + [0]
    share, ledger = wall / 3600 / hours, sum(summary["seconds"].values()) / wall
    return {
        "hours": hours,
        "wall_seconds": round(wall, 3),
        "share_of_budget": round(share, 4),
        "ledger_to_wall": round(ledger, 4),
        "last_lr": lr,
        "final_lr": recipe.optim.min_lr,
        "exits": exits,
        "steps": summary["steps"],
        "epochs": summary["epochs"],
        "top1": round(summary["result"]["top1"], 2),
        "seconds": summary["seconds"],
        "ok": bool(
            0.97 <= share <= 1.0
            and abs(ledger - 1) <= 0.01
            and abs(lr / recipe.optim.min_lr - 1) < 1e-6
            and exits == expected_exits
        ),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--hours", type=float, help="budget of every case, instead of its own")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--throttle", type=float, default=0.5, help="mean delay of every tenth batch, in seconds [0.5]")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        if args.throttle:
            throttle(args.throttle)
        cli.entry(["train", *args.child])

    rows = {}
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small are faster on one thread
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "images"
        write_digits(data)
        common = ["--data.train", str(data / "train"), "--data.val", str(data / "val")]
        teacher = ["train", "digits_teacher", "--quiet", *common, "--run.out", f"{folder}/teacher"]
        subprocess.run([sys.executable, "-m", "std_fast.cli", *teacher, "--run.length", "20 steps"], check=True)
        for name in args.cases:
            case = CASES[name]
            teacher = ["--distill.teachers.0.weights", f"{folder}/teacher"] if case.recipe == "digits_std" else []
            out, before = Path(folder) / name.replace(" ", "_"), os.getloadavg()[0]
            row = rows[name] = run_case(case, args.hours or case.hours, out, [*common, *teacher], args.throttle)
            row["load"] = [round(before, 2), round(os.getloadavg()[0], 2)]
            print(
                f"{name:<18}{row['hours']:.3f} h  {100 * row['share_of_budget']:.1f} % of it, ledger/wall "
                f"{row['ledger_to_wall']:.4f}, lr {row['last_lr']:.2e}, {row['epochs']:.1f} epochs, "
                f"top-1 {row['top1']:.1f} %  {'ok' if row['ok'] else 'NOT AS PROMISED'}\n"
                f"    {in_words(row['seconds'])}",
                flush=True,
            )
    if args.json:
        if args.json.exists():  # cases that were run before: one by one they need the machine for less long
            rows = json.loads(args.json.read_text(encoding="utf-8"))["rows"] | rows
        report = {"question": "runs within a GPU-hour budget", "conditions": conditions(), "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["ok"] for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
