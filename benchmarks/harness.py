"""The harness of all benchmarks: how they measure, their command line, their reports and tables.

Contestants take turns in one process, forwards in one round and backwards in the next, so that the machine's load is
the same for all. A report gives the median over the rounds and the quartiles; ratios are ratios of medians, and their
quartiles come from the rounds, each a pair of neighbours in time. The first call, which compiles, is reported alone.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.conditions import ROOT, conditions, cores, hardware  # noqa: F401 - read as harness.NAME
from pipelines.errors import UserError

Report = dict[str, Any]
LIBC = ctypes.CDLL(None)  # loaded before any process is forked


# -- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Times:
    """The measurements of one contestant."""

    first: float
    """seconds of the first call: compilation, allocation, choice of kernels"""
    turns: list[float] = field(default_factory=list)
    """seconds of one call, in each round"""
    processor: list[float] = field(default_factory=list)
    """likewise, CPU seconds of this process, over all cores; empty on a GPU"""
    threads: int = 1
    peak_memory: float | None = None
    """MiB of the GPU's memory in use at the peak, by all tensors; None on a CPU"""

    @property
    def median(self) -> float:
        """By the clock."""
        return statistics.median(self.turns)

    @property
    def seconds(self) -> float:
        """The median that rates are computed from: on a CPU, CPU time per thread, which other load on the machine
        disturbs less than wall time."""
        return statistics.median(self.processor) / self.threads if self.processor else self.median


def measure(
    contestants: Mapping[str, Callable[[], object]], args: argparse.Namespace, warm_up: int = 2
) -> dict[str, Times]:
    """Times callables in turns.

    Args:
        contestants: name -> what to time; called without arguments, its result is dropped.
        args: of `add_arguments`: the device, `repeats` rounds in each of which every contestant has one turn, and
            `turn_seconds`: a turn is as many calls as take about this long, at least one.
        warm_up: calls before the first round, the first of them timed on its own.
    """
    import torch

    device, repeats = args.device, args.repeats
    wait = synchronizer(device)
    times, calls = {}, {}
    for name, call in contestants.items():
        progress(f"{name}: warming up")
        seconds = [_time(call, 1, wait) for _ in range(max(1, warm_up))]
        times[name] = Times(seconds[0], threads=torch.get_num_threads())
        calls[name] = max(1, min(1000, round(args.turn_seconds / max(seconds[-1], 1e-9))))
    for turn in range(repeats):
        gc.collect()
        for name in list(contestants)[:: 1 if turn % 2 == 0 else -1]:
            reset_peak_memory(device)
            before = time.process_time()
            times[name].turns.append(_time(contestants[name], calls[name], wait))
            if device == "cpu":
                times[name].processor.append((time.process_time() - before) / calls[name])
            times[name].peak_memory = peak_memory(device)
        progress(f"round {turn + 1} of {repeats}")
    return times


def _time(call: Callable[[], object], calls: int, wait: Callable[[], None]) -> float:
    """Seconds of one call, the mean of `calls` in a row, without garbage collection."""
    gc.disable()
    try:
        wait()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        return (time.perf_counter() - began) / calls
    finally:
        gc.enable()


def best(call: Callable[[], object], device: str, calls: int = 1, repeats: int = 6) -> float:
    """Seconds of one call in the best of some turns: for ceilings, which other load can only lower."""
    wait = synchronizer(device)
    return min(_time(call, calls, wait) for _ in range(repeats))


def synchronizer(device: str) -> Callable[[], None]:
    """Waits for the device; does nothing on a CPU."""
    if device == "cpu":
        return lambda: None
    import torch

    return torch.cuda.synchronize


def reset_peak_memory(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: str) -> float | None:
    """MiB, the most since the last reset; None on a CPU, where torch does not count it."""
    if device == "cpu":
        return None
    import torch

    return torch.cuda.max_memory_allocated() / 2**20


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median and quartiles, rounded to significant digits."""
    values = list(values)
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
    names = ("median", "lower_quartile", "upper_quartile")
    ordered = (quartiles[1], quartiles[0], quartiles[2])
    return {name: significant(value, digits) for name, value in zip(names, ordered, strict=True)}


def thinned(records: list, most: int) -> list:
    """At most so many, evenly chosen, the last one among them, so that a result is small enough to keep."""
    step = max(1, -(-len(records) // most))
    return records[::-1][::step][::-1]


def significant(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def row(name: str, times: Times, batch: int = 0, **more: Any) -> Report:
    """A contestant's row: milliseconds a call, and images per second where a call takes a batch of images."""
    record: Report = {"name": name, "milliseconds": spread([1e3 * t for t in times.turns])}
    if times.processor:
        record["cpu_milliseconds"] = spread([1e3 * t for t in times.processor])
    if batch:
        record["images_per_second"] = significant(batch / times.seconds)
    record["first_call_seconds"] = significant(times.first, 3)
    if times.peak_memory is not None:
        record["peak_memory_mib"] = round(times.peak_memory)
    return record | more | {"turns_ms": [significant(1e3 * t) for t in times.turns]}


def ratio(what: str, of: Times, over: Times) -> Report:
    """How many times as fast `of` is as `over`, by the clock and by processor time."""

    def of_medians(a: list[float], b: list[float]) -> Report:
        rounds = spread([y / x for x, y in zip(a, b, strict=True)], 3)
        return rounds | {"median": significant(statistics.median(b) / statistics.median(a), 3)}

    found = {"what": what, "ratio": of_medians(of.turns, over.turns)}
    if of.processor and over.processor:
        found["cpu_ratio"] = of_medians(of.processor, over.processor)
    return found


# -- from the command line to a report --------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser, repeats: int = 7) -> None:
    """Arguments of every benchmark."""
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="tiny sizes, on the CPU unless --device says else: whether it runs, not how fast",
    )
    parser.add_argument("--out", metavar="FOLDER", help="also write QUESTION-HARDWARE-DATE.json (and the plot) there")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"rounds [{repeats}]")
    parser.add_argument("--turn-seconds", type=float, default=0.2, help="length of a turn of repeated calls [0.2]")
    parser.add_argument("--threads", type=int, default=0, help="threads of a CPU's kernels; 0: all cores")


class Parser(argparse.ArgumentParser):
    """argparse with its errors as UserError: one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(
    question: str,
    run: Callable[[argparse.Namespace], Report],
    show: Callable[[Report], str],
    add: Callable[[argparse.ArgumentParser], None] | None = None,
    draw: Callable[[Report, Path], None] | None = None,
    argv: list[str] | None = None,
    text: str | None = None,
) -> int:
    """A benchmark as a command; returns the exit code (2: the user's mistake).

    Args:
        question: its name.
        run: the parsed arguments -> `rows`, `ratios` and whatever else; `settings` and `conditions` are added here.
        show: a report -> Markdown.
        add: its own arguments.
        draw: writes a plot of a report as a PNG, beside the JSON file of --out.
        text: what `--help` says.
    """
    parser = Parser(
        f"std-fast bench {question}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    if add is not None:
        add(parser)
    try:
        args = parser.parse_args(argv)
        report = complete(question, run, args)
    except UserError as error:
        print(f"std-fast bench {question}: {error}", file=sys.stderr)
        return 2
    if args.out:
        print(write(report, Path(args.out)), file=sys.stderr)
        if draw is not None:
            draw(report, Path(args.out) / f"{stem(report)}.png")
    print(json.dumps(report, indent=1) if args.json else show(report))
    return 0


def complete(question: str, run: Callable[[argparse.Namespace], Report], args: argparse.Namespace) -> Report:
    """Runs a benchmark; returns its report with settings and conditions. UserError as `run` raises it."""
    import torch

    if args.smoke:
        args.device = "cpu" if args.device == "auto" else args.device
        args.threads, args.repeats, args.turn_seconds = 1, 2, 0.0
    if args.repeats < 1:
        raise UserError("--repeats: must be 1 or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: cuda, but torch sees no GPU; leave it out, or look at `std-fast doctor`")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    try:
        if args.threads:
            torch.set_num_threads(args.threads)
        found = conditions(args.device)
        body = run(args)
    finally:
        torch.set_num_threads(threads)
    found["load_average_after"] = [round(value, 2) for value in os.getloadavg()]
    found["host_memory_peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "out")}
    return {"question": question, "settings": settings, "conditions": found, **body}


def end_with_parent() -> None:
    """`preexec_fn` of a child that works on the GPU: it gets SIGTERM where its parent is killed, and does not run on
    beside what follows (Linux: prctl PR_SET_PDEATHSIG; it holds for the child alone, not for the child's own)."""
    LIBC.prctl(1, signal.SIGTERM, 0, 0, 0)


def printed_report(text: str) -> Report:
    """The report in what a benchmark printed with --json, where libraries may have printed lines around it.

    Raises:
        ValueError: it holds none.
    """
    return json.JSONDecoder().raw_decode("{" + f"\n{text}".partition("\n{\n")[2])[0]


def write(report: Report, folder: Path) -> Path:
    """Writes `QUESTION-HARDWARE-DATE.json`; a `variant` of the question stands in the name too."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem(report)}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return path


def stem(report: Report) -> str:
    """Name of a report's files, without the ending."""
    found = report["conditions"]
    return "-".join(filter(None, (report["question"], report.get("variant"), hardware(found), found["date"][:10])))


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# -- tables -----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Rows as a Markdown table. `columns`: heading -> key; a column that no row has is left out."""
    used = {heading: key for heading, key in columns.items() if any(r.get(key) is not None for r in rows)}
    lines = ["| " + " | ".join(used) + " |", "|" + "---|" * len(used)]
    lines += ["| " + " | ".join(cell(r.get(key)) for key in used.values()) + " |" for r in rows]
    return "\n".join(lines)


def cell(value: Any) -> str:
    """A value as text; a median with its quartiles as `median (lower to upper)`."""
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return f"{cell(value['median'])} ({cell(value['lower_quartile'])} to {cell(value['upper_quartile'])})"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


TIMES = {
    "what": "name",
    "ms (quartiles)": "milliseconds",
    "CPU ms (quartiles)": "cpu_milliseconds",
    "images/s": "images_per_second",
    "MFU, %": "mfu_percent",
    "first call, s": "first_call_seconds",
    "peak GPU memory, MiB": "peak_memory_mib",
}


def ratio_table(ratios: Sequence[Mapping[str, Any]]) -> str:
    """A table of what `ratio` returns."""
    columns = {"times as fast": "what", "by the clock (quartiles)": "ratio", "by CPU time (quartiles)": "cpu_ratio"}
    return table(ratios, columns)


def show(report: Report, columns: Mapping[str, str] = TIMES) -> str:
    """Rows and ratios of a report, under a line with its conditions."""
    found = report["conditions"]
    where = found["gpu"]["name"] if found["gpu"] else f"{found['cpu']}, {found['threads']} of {found['cores']} cores"
    load = f"load {found['load_average'][0]} to {found['load_average_after'][0]}"
    changes = " with uncommitted changes" if found["uncommitted_changes"] else ""
    commit = f"commit {found['commit'][:9]}{changes}"
    head = f"{where}, torch {found['versions']['torch']}, {load}, {found['date'][:10]}, {commit}"
    parts = [head, table(report["rows"], columns)]
    if report.get("ratios"):
        parts.append(ratio_table(report["ratios"]))
    parts += report.get("notes", [])
    return "\n\n".join(parts)
