"""Everything that needs a GPU, in one call: the tests marked `gpu` and every benchmark, part by part.

Each part is a process of its own with a time limit, so that one that fails or hangs takes nothing with it. After each,
`gpu_suite.json` in the folder of --out (by default $OUT) is written anew, with all that is known; `gpu_suite.log` holds
what the parts said. A short table comes last. --smoke runs the benchmarks at tiny sizes on the CPU.

    std-fast bench gpu_suite --out OUT                            # all, one after the other
    std-fast bench gpu_suite --call 1 --out OUT                   # then 2 and 3: each under ten minutes
    std-fast bench gpu_suite --only kernels "step mixer_s16" --out OUT
    std-fast bench gpu_suite --split OUT/gpu_suite.json --out benchmarks/results   # a file for each benchmark

A machine that is lent for 25 minutes in calls of ten does all by the three --call: what is most worth knowing comes
first, and what does not fit is named.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness
from pipelines.files import write_atomic

OTHERS = ("mixer_b16", "resmlp_s24", "resmlp_b24", "cyclemlp_b1", "cyclemlp_b2")


@dataclass(frozen=True)
class Part:
    name: str
    words: tuple[str, ...]
    """after `python -m`"""
    limit: float
    """seconds"""

    @property
    def question(self) -> str | None:
        """The benchmark's name; None for the tests."""
        return self.words[0].partition("benchmarks.")[2] or None


def bench(question: str, *words: str, name: str = "", limit: float = 180) -> Part:
    return Part(name or question, (f"benchmarks.{question}", *words), limit)


def other(model: str) -> Part:
    """The step of another student; what its teachers are does not matter, so they are tiny."""
    tiny = ("--teachers", "test_resnet", "test_resnet")
    return bench("step", "--model", model, "--batch", "512", "--profile", *tiny, name=f"step {model}", limit=200)


CALLS = (
    (
        Part("tests", ("pytest", "-q", "-m", "gpu", "--no-header", "tests"), 240),
        bench("step", "--profile", name="step mixer_s16", limit=240),
        bench("kernels", limit=150),
    ),
    (
        bench("peers", limit=240),
        bench("overlap", limit=150),
        bench("end_to_end", limit=150),
        bench("roofline", "--compile", "inductor", limit=150),
    ),
    (
        *(other(model) for model in OTHERS),
        bench("teachers", "--teachers", "resnet50", "resnet101", "swin_base_patch4_window7_224", limit=200),
        bench("options", name="options mixer_s16", limit=240),
        bench("options", "--model", "cyclemlp_b1", "--batch", "512", name="options cyclemlp_b1", limit=240),
        bench("compile", "--limit", "240", limit=600),
        bench("mine_gaussians"),
    ),
)
PARTS = tuple(part for call in CALLS for part in call)
SECONDS_OF_A_CALL = 480.0  # three of them and the machine's start fit into 25 minutes


def main(argv: list[str] | None = None) -> int:
    """Exit code 1 when a part failed or ran past its limit."""
    parser = argparse.ArgumentParser(
        "std-fast bench gpu_suite", description=__doc__.split("\n\n")[0] if __doc__ else ""
    )
    parser.add_argument("--out", default=os.environ.get("OUT", ""), help="folder of the results [$OUT]")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=[p.name for p in PARTS], help="these parts")
    parser.add_argument("--call", type=int, choices=range(1, len(CALLS) + 1), help="the parts of one call; see above")
    parser.add_argument(
        "--total", type=float, help=f"seconds for all of them [no limit; with --call {SECONDS_OF_A_CALL:.0f}]"
    )
    parser.add_argument("--split", metavar="FILE", help="only write each report of this gpu_suite.json to --out")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU: whether it runs, not how fast")
    args = parser.parse_args(argv)
    if not args.out:
        parser.error("--out: name a folder, or set $OUT")
    if args.split:
        for one in json.loads(Path(args.split).read_text(encoding="utf-8"))["parts"].values():
            if "report" in one:
                print(harness.write(one["report"], Path(args.out)))
        return 0
    if args.total is None:
        args.total = SECONDS_OF_A_CALL if args.call else float("inf")
    wanted = CALLS[args.call - 1] if args.call else PARTS
    parts = [part for part in wanted if args.only is None or part.name in args.only]
    if args.smoke:
        seen: dict[str, Part] = {p.question: p for p in reversed(parts) if p.question}  # one of each
        parts = [Part(name, (part.words[0], "--smoke"), part.limit) for name, part in reversed(seen.items())]
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu_suite.log").write_text("", encoding="utf-8")
    began = time.monotonic()
    found: dict[str, dict[str, Any]] = {}

    def go(part: Part) -> None:
        if time.monotonic() - began > args.total:
            found[part.name] = {"state": "not begun: --total is used up"}
        else:
            found[part.name] = attempt(part, min(part.limit, args.total - (time.monotonic() - began)), folder)
        save(folder, found, args.smoke)
        harness.progress(f"{part.name}: {found[part.name]['state']}")

    # tiny sizes are for seeing whether it runs: there, all cores may work at once
    with ThreadPoolExecutor(harness.cores() if args.smoke else 1) as pool:
        list(pool.map(go, parts))
    print(table(found))
    return 0 if all(one["state"] == "ok" for one in found.values()) else 1


def attempt(part: Part, limit: float, folder: Path) -> dict[str, Any]:
    """Runs a part; returns its state, seconds, and report or last lines."""
    words = [sys.executable, "-m", *part.words] + (["--json"] if part.question else [])
    began = time.monotonic()
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=harness.ROOT, start_new_session=True
    )
    state = ""
    try:
        out, said = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
        out, said = process.communicate()
        state = f"ran past its limit of {limit:.0f} s"
    with open(folder / "gpu_suite.log", "a", encoding="utf-8") as file:
        file.write(f"== {' '.join(words)}\n{said}\n" + ("" if part.question else out))
    result: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1), "command": " ".join(words[1:])}
    if not state and process.returncode == 0 and part.question:
        return {"state": "ok", **result, "report": json.loads(out)}
    state = state or ("ok" if process.returncode == 0 else f"exit code {process.returncode}")
    return {"state": state, **result, "said": f"{said}\n{out}".strip().splitlines()[-5:]}


def save(folder: Path, found: dict[str, dict[str, Any]], smoke: bool) -> None:
    """Writes what is known, whole or not at all."""
    write_atomic(folder / "gpu_suite.json", json.dumps({"smoke": smoke, "parts": found}, indent=1) + "\n")


def table(found: dict[str, dict[str, Any]]) -> str:
    """A line for each part, and one for each of its rows and ratios."""
    lines = []
    for name, one in found.items():
        lines.append(f"{name}: {one['state']}" + (f", {one['seconds']} s" if "seconds" in one else ""))
        lines += [f"    {line}" for line in one.get("said", ())]
        report = one.get("report", {})
        for row in report.get("rows", ()):
            keys = (
                *("milliseconds", "images_per_second", "mfu_percent", "roof_percent", "times_floor"),
                *("agree_percent", "error_percent"),
            )
            figures = {key: row[key] for key in keys if row.get(key) is not None}
            if "milliseconds" in figures:
                figures["milliseconds"] = figures["milliseconds"]["median"]
            shown = "  ".join(f"{key} {harness.cell(value)}" for key, value in figures.items())
            lines.append(f"    {row['name']}: {shown or row.get('failed', '')}")
        lines += [f"    {r['what']}: {r['ratio']['median']}" for r in report.get("ratios", ())]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
