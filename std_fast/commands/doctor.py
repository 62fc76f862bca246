"""What is installed, what is missing or broken, and the exact command that repairs it: `std-fast doctor`.

A probe that fails becomes a line of the report and never ends it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from dataclasses import asdict

from std_fast.commands.doctor_probes import Check, one_line, probes
from std_fast.runtime.process import say


def checks() -> list[Check]:
    """Runs every probe, in the order of the report. Raises nothing. Imports torch, FFCV and DALI: takes seconds."""
    results: list[Check] = []
    # What a package prints to standard output must not get into `--json`.
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for probe in probes():
            try:
                results.append(probe())
            except Exception as error:  # whatever a broken package or an unusual machine raises is a finding
                name = probe.__name__.strip("_").replace("_", " ")
                results.append(Check(name, False, detail=f"could not be checked: {one_line(error)}"))
    return results


def exit_code(results: list[Check]) -> int:
    """0, or 1 when something required is missing."""
    return int(any(check.required and not check.ok for check in results))


def as_json(results: list[Check]) -> str:
    """One JSON document: `{"ok": bool, "checks": [{name, status, ok, required, version, detail, fix}, ...]}`."""
    rows = [{"status": check.status, **asdict(check)} for check in results]
    return json.dumps({"ok": exit_code(results) == 0, "checks": rows}, indent=2)


def report(results: list[Check]) -> int:
    """Prints the report as a table, then the commands that fix what is not in order. Returns `exit_code`."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(as_json(results))  # the same content, without rich
        return exit_code(results)
    console = Console()
    table = Table("", "what", "version", title="std-fast doctor", title_justify="left")
    table.add_column("detail", overflow="fold")
    styles = {"ok": "green", "optional": "yellow", "MISSING": "bold red"}
    for check in results:
        table.add_row(Text(check.status, styles[check.status]), check.name, Text(check.version), Text(check.detail))
    console.print(table)
    for check in results:
        if not check.ok and check.fix:
            console.print(Text(f"\n{check.name}:", "bold"))
            for manager, command in check.fix.items():
                # soft_wrap: a command copied from a narrow terminal must stay one line
                console.print(Text(f"  {manager:<7} {command}"), soft_wrap=True)
    return exit_code(results)


def main(json_document: bool = False) -> int:
    """`std-fast doctor [--json]`: prints either form, returns the exit code."""
    say("std-fast doctor: importing torch, FFCV and DALI, which takes seconds")
    results = checks()
    if not json_document:
        return report(results)
    print(as_json(results))
    return exit_code(results)
