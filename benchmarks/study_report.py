"""The study's tables and figure, from a stored result; see evidence.py."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import harness
from benchmarks.study_data import unpack
from benchmarks.study_sizes import SETTINGS

AGAINST = ("plain", "no tokens", "STD", "plain, STD's cost", "no tokens, STD's cost")
"""settings that the others are compared with; STD with its variants, one that costs what another costs with that one"""

WITH_LINES = ("plain", "no tokens", "DeiT token", "STD")
"""settings whose course of training is drawn"""


class Group(NamedTuple):
    """All runs of a student and a setting."""

    student: str
    setting: str
    runs: list[harness.Report]

    def correct(self, head: str = "") -> dict[int, np.ndarray]:
        """Which validation images each initialisation gets right `[N]`, by a head; by default by their mean."""
        found = {}
        for run in self.runs:
            predictions = run["predictions"]
            chosen = head or ("mean" if "mean" in predictions else "class")
            if chosen in predictions:
                found[run["init"]] = unpack(predictions[chosen]) == unpack(predictions["labels"])
        return found

    def accuracies(self, head: str = "") -> list[float]:
        """Validation accuracy of each initialisation, %."""
        return [100 * float(correct.mean()) for correct in self.correct(head).values()]

    def accuracy(self, deviation: float | None = None) -> tuple[float, float]:
        """Mean over initialisations, %, and its standard error over images and initialisations together.

        Args:
            deviation: of initialisations, in points; by default that of these runs.
        """
        correct = np.stack(list(self.correct().values())) * 100.0  # [inits, images]
        over_images = float(correct.mean(0).std() / math.sqrt(correct.shape[1]))
        if deviation is None:
            deviation = statistics.stdev(self.accuracies()) if len(correct) > 1 else 0.0
        return float(correct.mean()), math.hypot(over_images, deviation / math.sqrt(len(correct)))


def groups(report: harness.Report) -> Iterator[Group]:
    """In the order in which the report has them, which is that of the study."""
    found: dict[tuple[str, str], list[harness.Report]] = {}
    for run in report["runs"]:
        if "setting" in run:
            found.setdefault((run["student"], run["setting"]), []).append(run)
    for (student, setting), runs in found.items():
        yield Group(student, setting, runs)


class Deviation(NamedTuple):
    """Standard deviation of accuracy over initialisations, in points, and the degrees of freedom of this estimate."""

    points: float
    freedom: int


def deviations(every: list[Group]) -> dict[str, Deviation]:
    """Of each student, pooled over its settings: that of two or four runs alone is too uncertain to be an error.

    A student has none where each setting has one run.
    """
    squares: dict[str, tuple[float, int]] = {}
    for group in every:
        accuracies = group.accuracies()
        if len(accuracies) > 1:
            total, freedom = squares.get(group.student, (0.0, 0))
            total += statistics.variance(accuracies) * (len(accuracies) - 1)
            squares[group.student] = total, freedom + len(accuracies) - 1
    return {student: Deviation(math.sqrt(total / freedom), freedom) for student, (total, freedom) in squares.items()}


class Difference(NamedTuple):
    """Accuracy of one setting less that of another, in points, over the initialisations that both have."""

    points: float
    over_images: float  # standard error of the mean over images, each image's value a mean over initialisations
    over_inits: float | None  # standard error over initialisations; None where their deviation is not known
    better: int  # McNemar's counts, summed over all pairs: images that only this one gets right,
    worse: int  # and that only the other one does

    @property
    def error(self) -> float:
        """Both parts together, as if they were independent; that counts a part of the chance twice."""
        return math.hypot(self.over_images, self.over_inits or 0.0)


def difference(one: Group, other: Group, deviation: float | None) -> Difference | None:
    """None without a common initialisation.

    Args:
        deviation: of a run's accuracy over initialisations, in points. The two runs of a pair count as independent of
            each other: their common first weights were found to decide nothing.
    """
    ours, theirs = one.correct(), other.correct()
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return None
    pairs = np.stack([ours[i].astype(float) - theirs[i] for i in both]) * 100  # [inits, images]
    of_images = pairs.mean(0)
    return Difference(
        float(pairs.mean()),
        float(of_images.std(ddof=1) / math.sqrt(len(of_images))),
        None if deviation is None else deviation * math.sqrt(2 / len(both)),
        int((pairs > 0).sum()),
        int((pairs < 0).sum()),
    )


def per_sample(group: Group, report: harness.Report) -> float | None:
    """Seconds of the processor (or of the GPU) per sample; settings that differ in their length alone cost the same."""
    costs = report["seconds_per_sample"]
    names = (group.setting, group.setting.split(", ")[0])
    return next((costs[key] for name in names if (key := f"{group.student}: {name}") in costs), None)


def cost(group: Group, report: harness.Report, samples: float) -> float:
    """Minutes of the processor where they were measured, else 10^12 multiply-accumulates, three forwards a sample."""
    seconds = per_sample(group, report)
    if seconds is not None:
        return samples * seconds / 60
    return 3e-12 * samples * group.runs[0]["predictions"]["macs"]


def show(report: harness.Report) -> str:
    found = report["conditions"]
    where = found["gpu"]["name"] if found["gpu"] else f"{found['cpu']}, {found['cores']} cores"
    every = list(groups(report))
    deviating = deviations(every)
    lines = [f"{where}, torch {found['versions']['torch']}, {found['date'][:10]}, commit {found['commit'][:9]}"]
    rows = []
    for group in every:
        samples = statistics.mean(run["summary"]["samples"] for run in group.runs)
        row: harness.Report = {"student": group.student, "setting": group.setting, "runs": len(group.runs)}
        for head in ("", "class", "distill"):
            accuracies = group.accuracies(head)
            row[head or "top1"] = f"{statistics.mean(accuracies):.1f}" if accuracies else None
        if group.student in deviating:
            row["top1"] += f" ± {deviating[group.student].points / math.sqrt(len(group.runs)):.1f}"
        row |= {"samples": round(samples), "macs": f"{group.runs[0]['predictions']['macs'] / 1e6:.1f}"}
        row["cost"] = f"{cost(group, report, samples):.3g}"
        rows.append(row)
    columns = {
        "student": "student",
        "setting": "setting",
        "runs": "runs",
        "validation top-1, %": "top1",
        "class head": "class",
        "distillation heads": "distill",
        "samples": "samples",
        "MMACs of a forward": "macs",
        "CPU minutes" if report["seconds_per_sample"] else "10^12 MACs": "cost",
    }
    lines.append(harness.table(rows, columns))
    if table := differences(every, deviating):
        lines.append(table)
    known = [f"{of.points:.2f} ({name}, {of.freedom} degrees of freedom)" for name, of in deviating.items()]
    if known:
        lines.append(f"± standard error; deviation of a run over initialisations, in points: {', '.join(known)}.")
    if report["missing"]:
        lines.append(f"Not run: {', '.join(report['missing'])}.")
    return "\n\n".join(lines)


def differences(every: list[Group], deviating: dict[str, Deviation]) -> str:
    """Table of all settings against some, paired by images and initialisations; empty where none can be compared."""
    rows = []
    for group in every:
        row = {"student": group.student, "setting": group.setting}
        deviation = deviating[group.student].points if group.student in deviating else None
        for other in every:
            if other.student == group.student and compares(group.setting, other.setting):
                if found := difference(group, other, deviation):
                    counts = f"({found.better} : {found.worse})"
                    row[other.setting] = f"{found.points:+.1f} ± {found.error:.1f} {counts}"
        rows.append(row)
    shown = [name for name in AGAINST if any(name in row for row in rows)]
    columns = {"student": "student", "setting": "setting"} | {f"over {name}": name for name in shown}
    return harness.table([row for row in rows if len(row) > 2], columns) if shown else ""


def compares(setting: str, other: str) -> bool:
    """Whether the table holds the first less the second: not both ways round, and at equal cost what costs the same."""
    if other not in AGAINST or setting == other:
        return False
    if cost_of := SETTINGS[other].cost_of:
        return setting in (cost_of, f"{cost_of}, true labels")
    if other == "STD":
        return setting.startswith((other, "DeiT"))
    return setting not in AGAINST[: AGAINST.index(other)]


def draw(report: harness.Report, path: Path) -> None:
    """Accuracy over cost: lines on the images held out in the course of training, points on the validation images.

    Mean over initialisations; bars are standard errors over images and initialisations together. A setting that only
    lasts longer has the colour of what it repeats. Points of equal cost are drawn beside each other.
    """
    from matplotlib.figure import Figure

    every = [group for group in groups(report) if not group.setting.endswith((" views", ", other loss"))]
    settings = list(dict.fromkeys(group.setting.removesuffix(", STD's cost") for group in every))
    students = list(dict.fromkeys(group.student for group in every))
    deviating = deviations(list(groups(report)))
    unit = "minutes of one core" if report["seconds_per_sample"] else "$10^{12}$ multiply-accumulates of the student"
    figure = Figure(figsize=(7.5 * max(1, len(students)), 4.8), layout="constrained")
    axes = figure.subplots(1, max(1, len(students)), squeeze=False)[0]
    for axis, student in zip(axes, students, strict=False):
        ends: list[float] = []
        lows: list[float] = []
        for group in (one for one in every if one.student == student):
            repeats = group.setting.removesuffix(", STD's cost")
            color, marker = f"C{settings.index(repeats)}", "o" if repeats == group.setting else "s"
            if group.setting in WITH_LINES:
                points = list(zip(*[run["evaluations"] for run in group.runs], strict=False))
                x = [cost(group, report, statistics.mean(e["samples"] for e in at)) for at in points]
                axis.plot(x, [statistics.mean(e["top1"] for e in at) for at in points], color=color, alpha=0.6)
            accuracy, error = group.accuracy(deviating[student].points if student in deviating else None)
            end = cost(group, report, statistics.mean(run["summary"]["samples"] for run in group.runs))
            beside = end * (1 + 0.02 * sum(abs(x - end) < 0.015 * end for x in ends))
            label = f"{group.setting} ({len(group.correct())})"
            axis.errorbar(beside, accuracy, error, fmt=marker, color=color, capsize=3, markersize=5, label=label)
            ends.append(end)
            lows.append(accuracy - error)
        title = f"Mixer {student}, Imagenette at 128 px"
        axis.set(xlabel=f"{unit}, teachers' excluded", ylabel="top-1, %", title=title)
        axis.set_ylim(bottom=min(lows) - 8)  # the end, which is what is compared
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="lower right", title="validation (initialisations)")
    figure.savefig(path, dpi=110)
