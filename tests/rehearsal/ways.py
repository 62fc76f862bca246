"""The ways in which the tests marked `gpu` are rehearsed under the fake GPU, and what came of them."""

from __future__ import annotations

import subprocess
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import fake_gpu, gpu_suite, harness
from benchmarks.harness import ROOT

WAYS = {
    "values": {"FAKE_GPU_VALUES": "1"},  # operations get their true values; nothing is compiled
    "lazy": {"FAKE_GPU_LAZY": "1"},  # nothing is done before the host waits; no values
    "compiled": {"FAKE_GPU_VALUES": "compile"},  # Triton's kernels are compiled and launched, and compute nothing
}


@dataclass(frozen=True)
class Outcome:
    test: str
    way: str
    state: str
    """passed, failed or skipped"""
    reason: str

    @property
    def function(self) -> str:
        """The test without its parameters."""
        return self.test.partition("[")[0]


def rehearse(way: str, tool: Path, folder: Path, tests: tuple[str, ...] = gpu_suite.TESTS) -> list[Outcome]:
    """Runs the tests in one way, in a process of its own; its output goes to FOLDER/WAY.log."""
    report, log = folder / f"{way}.xml", folder / f"{way}.log"
    words = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    settings = {**WAYS[way], "STD_FAST_REHEARSAL": way}
    with open(log, "w", encoding="utf-8") as file:
        subprocess.run(
            fake_gpu.command(words, tool), cwd=ROOT, env=fake_gpu.environment(settings), stdout=file, stderr=file
        )
    if not report.is_file():
        return [Outcome("pytest", way, "failed", f"it wrote no report; see {log}")]
    return [outcome_of(case, way) for case in ElementTree.parse(report).iter("testcase")]


def outcome_of(case: ElementTree.Element, way: str) -> Outcome:
    test = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
    for state, tag in (("failed", "failure"), ("failed", "error"), ("skipped", "skipped")):
        if (found := case.find(tag)) is not None:
            return Outcome(
                test, way, state, (found.get("message") or "").splitlines()[0] if found.get("message") else ""
            )
    return Outcome(test, way, "passed", "")


def table(outcomes: list[Outcome]) -> str:
    """A line for each test function, a column for each way; the reasons of what was skipped or failed below."""
    ways = list(dict.fromkeys(one.way for one in outcomes))
    functions = list(dict.fromkeys(one.function for one in outcomes))
    rows = []
    for function in (*functions, "all"):
        of = [one for one in outcomes if function in (one.function, "all")]
        rows.append({"test": function} | {way: counted(one for one in of if one.way == way) for way in ways})
    lines = [harness.table(rows, {name: name for name in ("test", *ways)}), ""]
    for state in ("failed", "skipped"):
        reasons = Counter((one.reason, one.way) for one in outcomes if one.state == state)
        lines += [f"- {state}, {way}, {count}: {reason}" for (reason, way), count in reasons.items()]
    return "\n".join(lines)


def counted(outcomes: Iterable[Outcome]) -> str:
    """`3 passed, 1 skipped`."""
    found = Counter(one.state for one in outcomes)
    return ", ".join(f"{found[state]} {state}" for state in ("passed", "skipped", "failed") if found[state]) or "-"
