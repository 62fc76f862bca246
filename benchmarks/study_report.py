"""The study's tables and figure, from a stored result; see evidence.py."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.study_sizes import SETTINGS


def students_of(report: harness.Report) -> Iterator[tuple[str, str, list[harness.Report]]]:
    """(student, setting, its runs over the seeds), in the order of the study."""
    groups: dict[tuple[str, str], list[harness.Report]] = {}
    for run in report["runs"]:
        if "setting" in run and "minutes" not in run:
            groups.setdefault((run["student"], run["setting"]), []).append(run)
    order = list(SETTINGS)
    for (student, setting), runs in sorted(groups.items(), key=lambda item: (item[0][0], order.index(item[0][1]))):
        yield student, setting, runs


def pushed(report: harness.Report) -> dict[str, dict[float, float]]:
    """Final top-1 of the pushed runs: setting -> minutes -> %."""
    found: dict[str, dict[float, float]] = {}
    for run in report["runs"]:
        if "minutes" in run:
            found.setdefault(run["setting"], {})[run["minutes"]] = run["summary"]["result"]["top1"]
    return found


def cost_of(setting: str, report: harness.Report) -> float | None:
    """Processor seconds per sample; settings that differ in their length alone cost the same."""
    costs = report["cpu_seconds_per_sample"]
    return next((costs[s] for s in sorted(costs, key=len, reverse=True) if setting.startswith(s)), None)


def mean_and_spread(values: list[float]) -> str:
    """Mean, and the deviation over seeds where there are several."""
    mean = statistics.mean(values)
    return f"{mean:.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:.2f}"


def show(report: harness.Report) -> str:
    found = report["conditions"]
    teachers = [
        {
            "job": run["job"],
            "top1": f"{run['summary']['result']['top1']:.2f}",
            "samples": run["summary"]["samples"],
            "hours": run["summary"]["gpu_hours"],
        }
        for run in report["runs"]
        if run["verb"] == "train" and "setting" not in run
    ]
    targets = [
        {
            "job": run["job"],
            "asked": run["summary"]["asked"],
            "bytes": run["summary"]["bytes"],
            "hours": run["summary"]["gpu_hours"],
        }
        for run in report["runs"]
        if run["verb"] == "teach"
    ]
    rows = []
    for student, setting, runs in students_of(report):
        results = [run["summary"]["result"] for run in runs]
        row: harness.Report = {"student": student, "setting": setting, "runs": len(runs)}
        for head in ("top1", "top1_class", "top1_distill"):
            if all(head in r for r in results):
                row[head] = mean_and_spread([r[head] for r in results])
        row["samples"] = round(statistics.mean(run["summary"]["samples"] for run in runs))
        row["hours"] = f"{statistics.mean(run['summary']['gpu_hours'] for run in runs):.3f}"
        if (cost := cost_of(setting, report)) is not None:
            row["cost"] = f"{row['samples'] * cost / 60:.1f}"
        rows.append(row)
    columns = {
        "student": "student",
        "setting": "setting",
        "runs": "runs",
        "top-1, %": "top1",
        "class head": "top1_class",
        "distillation heads": "top1_distill",
        "samples": "samples",
        "CPU minutes": "cost",
        "hours held": "hours",
    }
    where = found["gpu"]["name"] if found["gpu"] else f"{found['cpu']}, {found['cores']} cores"
    parts = [f"{where}, torch {found['versions']['torch']}, {found['date'][:10]}, commit {found['commit'][:9]}"]
    parts.append(
        harness.table(teachers, {"teacher": "job", "top-1, %": "top1", "samples": "samples", "hours held": "hours"})
    )
    parts.append(harness.table(targets, {"targets": "job", "asked": "asked", "bytes": "bytes", "hours held": "hours"}))
    parts.append(harness.table(rows, columns))
    if found_pushed := pushed(report):
        minutes = sorted({m for values in found_pushed.values() for m in values})
        rows = [{"minutes": f"{m:g}"} | {s: f"{v[m]:.2f}" for s, v in found_pushed.items() if m in v} for m in minutes]
        parts.append(harness.table(rows, {"minutes": "minutes"} | {f"{s}: top-1, %": s for s in found_pushed}))
    parts.append(
        "Mean ± deviation over seeds." + (f" Missing: {', '.join(report['missing'])}." if report["missing"] else "")
    )
    return "\n\n".join(parts)


def color_of(setting: str) -> tuple[float, ...]:
    """The same in every figure; light ones from the eleventh setting on."""
    import matplotlib

    number = list(SETTINGS).index(setting)
    return matplotlib.colormaps["tab20"](2 * (number % 10) + number // 10)


def draw(report: harness.Report, path: Path) -> None:
    """Validation accuracy over samples and over cost, mean over seeds with every seed as a dot at the end.

    The pushed runs, which are of the first student, are dots of their own over cost.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    costs = report["cpu_seconds_per_sample"]
    students = sorted({student for student, _, _ in students_of(report)})
    figure, axes = plt.subplots(
        len(students), 2, figsize=(13, 4.2 * len(students)), squeeze=False, sharey="row", layout="constrained"
    )
    for student, setting, runs in students_of(report):
        left, right = axes[students.index(student)]
        style: dict[str, Any] = {
            "color": color_of(setting),
            "linestyle": "--" if SETTINGS[setting].cost_of_std else "-",
        }
        curves = [run["evaluations"] for run in runs]
        points = list(zip(*curves, strict=False))
        x = [statistics.mean(e["samples"] for e in at) for at in points]
        if (per_sample := cost_of(setting, report)) is not None:
            cost = [value * per_sample / 60 for value in x]
        else:
            cost = [statistics.mean(e["gpu_hours"] for e in at) * 60 for at in points]
        y = [statistics.mean(e["top1"] for e in at) for at in points]
        for axis, values in ((left, x), (right, cost)):
            axis.plot(values, y, label=setting, **style)
            axis.scatter([values[-1]] * len(runs), [c[-1]["top1"] for c in curves], s=12, color=style["color"])
    for setting, results in pushed(report).items():
        minutes, top1 = zip(*sorted(results.items()), strict=True)
        axes[0][1].plot(minutes, top1, "o:", label=setting, color=color_of(setting))
    for row, student in zip(axes, students, strict=True):
        row[0].set(xlabel="training samples", ylabel="validation top-1, %", title=f"{student}: over samples")
        row[1].set(
            xlabel="CPU minutes" if costs else "GPU minutes", title=f"{student}: at equal cost, teachers' excluded"
        )
        for axis in row:
            axis.grid(alpha=0.3)
    figure.legend(*axes[0][1].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
