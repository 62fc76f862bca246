"""The fault campaign: `make faults`, or `python -m tests.faults --help`. Each row is a real fault to real processes."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
import zlib
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the children: sums in one order

import numpy as np

from benchmarks import harness
from tests.faults import rows  # noqa: F401 - registers them
from tests.faults.ground import FAULTS, Ground
from tests.killing import get_ready


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=None, help="of the random moments [by the clock]")
    parser.add_argument("--only", default="", help="rows whose name this pattern finds")
    parser.add_argument("--scale", type=int, default=1, help="how many times as many kills [1]")
    parser.add_argument("--json", default="", metavar="FILE", help="write the table there too")
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else int(time.time())
    harness.progress(f"seed {seed}")
    chosen = [fault for fault in FAULTS if re.search(args.only, fault.name)]
    table, began = [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="std_fast-faults-") as name:
        top = Path(name)
        (top / "shared").mkdir()
        get_ready(top)
        for number, fault in enumerate(chosen):
            folder = top / f"{number:02}"
            folder.mkdir()
            random = np.random.default_rng([seed, zlib.crc32(fault.name.encode())])
            row = {"fault": fault.name, "should": fault.should}
            started = time.monotonic()
            try:
                seen = fault.run(Ground(folder, top / "shared", random, args.scale))
                row |= {"happened": seen.happened, "well": True, "tried": seen.tried, "lost": seen.lost}
                row |= {"seconds_to_notice": None if seen.notice is None else round(seen.notice, 2)}
            except Exception as error:  # a row that fails must not end the campaign
                row |= {"happened": f"{type(error).__name__}: {error}", "well": False, "tried": 1, "lost": "?"}
                row |= {"seconds_to_notice": None}
            row["seconds"] = round(time.monotonic() - started, 1)
            table.append(row)
            harness.progress(f"{'ok ' if row['well'] else 'BAD'} {row['seconds']:6.1f} s  {fault.name}")
            if not row["well"]:
                harness.progress(f"     {row['happened'][:3000]}")
    print(as_text(table))
    well = sum(row["well"] for row in table)
    tried = sum(row["tried"] for row in table)
    took = f"{time.monotonic() - began:.0f} s, seed {seed}"
    print(f"\n{well} of {len(table)} rows as they should be, {tried} faults tried, {took}")
    if args.json:
        Path(args.json).write_text(as_json(seed, table), encoding="utf-8")
    return 0 if well == len(table) else 1


def as_json(seed: int, table: list[dict]) -> str:
    """The table with what it was made on: machine, versions and commit."""
    return json.dumps({"seed": seed, "conditions": harness.conditions(), "rows": table}, indent=1)


def as_text(table: list[dict]) -> str:
    shown = []
    for row in table:
        happened = ("" if row["well"] else "**NOT SO**: ") + " ".join(row["happened"].split())[:120].replace("|", "/")
        shown.append(row | {"happened": happened})
    names = {name: name for name in ("fault", "should", "happened", "tried", "lost")}
    return harness.table(shown, names | {"noticed after, s": "seconds_to_notice"})


if __name__ == "__main__":
    sys.exit(main())
