"""Runs the fuzzers: `python -m tests.fuzz --minutes 60`, or `make fuzz MINUTES=60`.

Each target has its share of the time, which is the processor's, in processes of its own (worker.py), and starts from
its seeds, tests/fuzz/corpus and what earlier runs found worth keeping in --out. Findings are named on standard
output, with the file that causes each; the exit code is 1 if there are any. Put such a file into
tests/fuzz/corpus/TARGET, fix the reader, and tests/fuzz/test_corpus.py replays it from then on.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import harness
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
CORPUS = Path(__file__).resolve().parent / "corpus"
HANG = 900  # seconds by the clock until an input is taken for a loop without end; see worker.HANG
SHARES = {"beton": 2.0, "ffcv": 2.0, "recipe": 1.5, "checkpoint": 1.5, "tar": 1.5, "labels": 0.4,
          "devkit": 0.5, "target_cache": 0.7, "weights": 0.7, "run_folder": 0.5}  # fmt: skip
"""of the time, where it is not 1"""


def fuzz(name: str, seconds: float, seed: int, out: Path) -> dict[str, Any]:
    """Fuzzes one target; returns its row of the report."""
    work = out / name
    for part in ("corpus", "artifacts", "seeds"):
        (work / part).mkdir(parents=True, exist_ok=True)
    (work / "count").write_bytes(bytes(8))
    shutil.rmtree(work / "findings", ignore_errors=True)
    scratch = work / "scratch"
    scratch.mkdir(exist_ok=True)
    for number, data in enumerate(TARGETS[name](scratch).seeds()):
        (work / "seeds" / f"{number}").write_bytes(data)
    shutil.rmtree(scratch)
    began, deaths, used, rounds = time.monotonic(), [], _processor_seconds(), 0
    while (left := seconds - (_processor_seconds() - used)) >= 1:
        rounds += 1
        command = [sys.executable, "-m", "tests.fuzz.worker", name, str(work), str(seed + rounds)]
        command += [f"-max_total_time={int(left)}", f"-timeout={HANG}", "-rss_limit_mb=4096", "-print_final_stats=1"]
        command += [f"-artifact_prefix={work / 'artifacts'}/", str(work / "corpus"), str(work / "seeds")]
        command += [str(CORPUS / name)] if (CORPUS / name).is_dir() else []
        with open(work / "log.txt", "ab") as log:
            code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ).returncode
        if code == 0:
            continue  # the machine was busy with other things for a part of the time
        newest = max((work / "artifacts").iterdir(), key=lambda path: path.stat().st_mtime, default=None)
        deaths.append({"code": code, "input": str(newest)})
        if len(deaths) > 5:
            break
    count = struct.unpack("<q", (work / "count").read_bytes())[0]
    found = sorted(path.name for path in (work / "findings").glob("*"))
    return {
        "target": name,
        "seconds": round(time.monotonic() - began, 1),
        "processor_seconds": round(_processor_seconds() - used, 1),
        "executions": count,
        "corpus": len(list((work / "corpus").iterdir())),
        "exceptions": found,
        "deaths": deaths,
    }


def _processor_seconds() -> float:
    """Of all children so far: on a busy machine the clock says little about the work done."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="of processor time, over all targets [5]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", default=",".join(TARGETS), help="some of: %(default)s")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "fuzz", help="[build/fuzz]")
    parser.add_argument("--json", type=Path, help="write the report there")
    args = parser.parse_args()
    names = args.targets.split(",")
    if unknown := set(names) - set(TARGETS):
        parser.error(f"--targets: unknown {', '.join(sorted(unknown))}")
    if importlib.util.find_spec("atheris") is None:
        parser.error("needs atheris: pip install atheris")
    share = {name: SHARES.get(name, 1.0) for name in names}
    rows = []
    for name in names:
        row = fuzz(name, 60 * args.minutes * share[name] / sum(share.values()), args.seed, args.out)
        rows.append(row)
        problems = [*row["exceptions"], *(f"ended with {d['code']}: {d['input']}" for d in row["deaths"])]
        text = f"{name:<12} {row['seconds']:8.1f} s, {row['processor_seconds']:8.1f} of the processor,"
        text += f" {row['executions']:10d} executions"
        print(text + "".join(f"\n    {problem}" for problem in problems), flush=True)
    conditions = harness.conditions() | {"seed": args.seed, "atheris": importlib.metadata.version("atheris")}
    report = {"question": "Does any file break its reader?", "conditions": conditions, "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(any(row["exceptions"] or row["deaths"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
