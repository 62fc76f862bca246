"""`make rehearse`: the GPU's code under the fake GPU (benchmarks/fake_gpu.py), with a table of what came of it.

The tests marked `gpu` in three ways (ways.py), then commands on "cuda" (commands.py). No kernel runs: this shows
that the host's side is right, not how fast a GPU is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks import fake_gpu, harness
from tests.rehearsal import commands, ways


def main() -> int:
    """Exit code 1 when something failed, 2 where there is no fake GPU."""
    parser = argparse.ArgumentParser(prog="python -m tests.rehearsal", description=__doc__)
    parser.add_argument("--ways", nargs="*", choices=list(ways.WAYS), default=list(ways.WAYS), help="[all]")
    parser.add_argument("--only", default="", help="commands whose name this pattern finds; '-' for none [all]")
    parser.add_argument("--keep", metavar="FOLDER", help="logs go there [a temporary folder]")
    args = parser.parse_args()
    tool = fake_gpu.find()
    if tool is None:
        print(fake_gpu.missing(), file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="std-fast-rehearsal-") as name:
        folder = Path(args.keep or name)
        folder.mkdir(parents=True, exist_ok=True)
        outcomes = []
        for way in args.ways:
            print(f"tests, {way} ...", file=sys.stderr, flush=True)
            outcomes += ways.rehearse(way, tool, folder)
        found = commands.rehearse(tool, folder, args.only)
        failed = [one for one in outcomes if one.state == "failed"]
        for one in failed:
            print(f"{one.test} ({one.way}): {one.reason}", file=sys.stderr)
        print(ways.table(outcomes), harness.table(found, {"command": "name", "outcome": "outcome"}), sep="\n\n")
    return 1 if failed or any(one["reason"] for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
