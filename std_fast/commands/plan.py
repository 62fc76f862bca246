"""`std-fast plan`: what a GPU-hour budget buys, before it is spent.

`measure` runs the real training for about a minute: with the teachers, with their targets given, and without teachers.
`buy` turns that, or a measurement stored on another machine, into epochs; it needs no GPU and no data.

For N GPUs one process is measured with its share of the batch, and N are assumed to be N times as fast. A GPU-hour is
an hour of one GPU: N GPUs use N in an hour.
"""

from __future__ import annotations

import json
import logging
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from pipelines.errors import UserError, quantity
from std_fast.commands.measure import LEAST_STEPS, early, measure, read
from std_fast.config.recipe import Duration, Recipe
from std_fast.runtime.budget import CLOSING
from std_fast.runtime.metrics import three_digits
from std_fast.teachers.target_format import bytes_per_epoch

log = logging.getLogger("std_fast")
WORTH = 1.1  # stored targets are recommended where they buy a tenth more epochs
EVALUATION_SHARE = 0.03  # of the budget, that evaluations on the way may take
VIEWS = 10, 300
"""fewest and most views of an image that are recommended: half as many as epochs, within these"""

# -- what it buys -----------------------------------------------------------------------------------------------------

LABELS = {
    "running": "teachers running",
    "views": "targets stored on the way, {views} views cycled",
    "stored": "targets stored before",
    "none": "no teachers",
}


@dataclass(frozen=True)
class Row:
    """What the budget buys in one way of training; or, without a budget, what the recipe's length costs."""

    mode: str
    label: str
    images_per_second: float
    epochs: float
    steps: int
    gpu_hours: float
    memory_gib: float | None
    targets_bytes: int
    """on the disk in the end"""


@dataclass(frozen=True)
class Plan:
    """Rates and seconds are of all GPUs together, memory is of one. GPU-hours count every GPU from start to end."""

    device: str
    gpus: int
    measured: str
    gpu_hours: float | None
    start_seconds: float
    evaluation_seconds: float
    save_seconds: float
    reserve_seconds: float
    host_memory_gib: float
    checkpoint_bytes: int
    ends: str
    """when a training that starts now ends, teachers running where there are any"""
    rows: tuple[Row, ...]
    recommended: str
    options: tuple[str, ...]
    """the recommendation as arguments of `std-fast train`"""
    notes: tuple[str, ...]


class Costs:
    """Epochs, hours and bytes of each way of training, from a measurement (`measure.measure`) and a recipe."""

    def __init__(self, measured: dict[str, Any], recipe: Recipe) -> None:
        self.measured, self.recipe, self.modes = measured, recipe, measured["modes"]
        self.gpus = measured["gpus"]
        self.length = Duration.parse(recipe.run.length)
        self.hours = self.length.amount if self.length.unit == "gpu-hours" else None
        self.batch, self.per_epoch = recipe.run.batch, measured["steps_per_epoch"]
        self.eval_every = Duration.parse(recipe.run.eval_every).steps(self.per_epoch, self.batch) / self.per_epoch
        """epochs, 0: only at the end"""
        self.evaluation = measured["evaluation_seconds"] / self.gpus
        self.save = sum(measured["save_seconds"].values())
        self.reserve = 1.25 * (self.evaluation + self.save) + CLOSING

    def rate(self, mode: str) -> float:
        """Images per second of all GPUs, averaged over the training; the early phase is a share of the hours, or of the
        steps."""
        first = self.gpus * early(self.modes[mode])
        later = self.gpus * self.modes[mode]["images_per_second"]
        share = self.recipe.student.early_share
        if self.hours is not None:
            return share * first + (1 - share) * later
        return 1 / (share / first + (1 - share) / later)

    def epoch_seconds(self, mode: str) -> float:
        """With the share of evaluations that falls on it."""
        evaluation = self.evaluation / self.eval_every if self.eval_every else 0.0
        return self.per_epoch * self.batch / self.rate(mode) + evaluation

    def fixed(self, mode: str) -> float:
        """Seconds that no epoch takes; a budget also times its evaluation once."""
        timed = self.evaluation if self.hours is not None else 0.0
        return self.measured["start_seconds"] + self.modes[mode]["compile_seconds"] + timed + self.reserve

    def row(self, mode: str, views: int = 0) -> Row:
        base = "running" if mode == "views" else mode
        first, later = self.epoch_seconds(base), self.epoch_seconds("stored" if mode == "views" else mode)
        if self.hours is not None:
            left = max(0.0, 3600 * self.hours / self.gpus - self.fixed(base))
            once = min(left / first, views) if mode == "views" else left / first
            epochs = once + (left - once * first) / later
            cost = max(self.hours, self.gpus * self.fixed(base) / 3600)
        else:
            epochs = self.length.steps(self.per_epoch, self.batch) / self.per_epoch
            once = min(epochs, views) if mode == "views" else epochs
            cost = self.gpus * (self.fixed(base) + once * first + (epochs - once) * later) / 3600
        kept = {"views": min(views, math.ceil(epochs)), "stored": math.ceil(epochs)}.get(mode, 0)
        distill = self.recipe.distill
        return Row(
            mode=mode,
            label=LABELS[mode].format(views=views),
            images_per_second=round(self.rate(base), 1),
            epochs=round(epochs, 2),
            steps=int(epochs * self.per_epoch),
            gpu_hours=round(cost, 4),
            memory_gib=self.modes[base]["memory_gib"],
            targets_bytes=kept * bytes_per_epoch(self.measured["samples"], len(distill.teachers), distill.top_k),
        )

    def too_few_steps(self) -> str:
        """Why nothing can be recommended; empty where enough steps were measured."""
        steps = min(mode["steps"] for mode in self.modes.values())
        if steps >= LEAST_STEPS:
            return ""
        slowest = max(self.batch / self.gpus / early(mode) for mode in self.modes.values())
        parts = 8 if self.recipe.distill.mode != "none" else 4  # of the seconds, one is timed; see `measure.time_some`
        seconds = parts * LEAST_STEPS * slowest * (2 if self.recipe.student.early_size else 1)
        return (
            f"nothing: measured {steps} step{'s' * (steps != 1)} only, and a recommendation takes {LEAST_STEPS}; give "
            f"--seconds {10 * math.ceil(seconds / 10)}"
        )


def buy(measured: dict[str, Any], recipe: Recipe, now: datetime | None = None) -> Plan:
    """From a measurement to what `run.length` of the recipe buys (gpu-hours) or costs (anything else)."""
    costs = Costs(measured, recipe)
    rows = [costs.row(mode) for mode in ("running", "stored", "none") if mode in costs.modes]
    views = recipe.distill.views or min(max(round(rows[0].epochs / 2), VIEWS[0]), VIEWS[1])
    if "stored" in costs.modes and views < costs.row("views", views).epochs:
        rows.insert(1, costs.row("views", views))
    by_mode = {r.mode: r for r in rows}
    main = by_mode.get("running", rows[0])
    recommended = costs.too_few_steps()
    options: list[str] = []
    if not recommended:
        recommended, options = recommend(recipe, by_mode, views)
        options += fewer_evaluations(main, costs.gpus * costs.evaluation, costs.eval_every)
    end = (now or datetime.now()).astimezone() + timedelta(hours=main.gpu_hours / costs.gpus)
    return Plan(
        device=measured["device"],
        gpus=costs.gpus,
        measured=measured["date"],
        gpu_hours=costs.hours,
        start_seconds=round(costs.fixed(main.mode) - costs.reserve, 1),
        evaluation_seconds=round(costs.evaluation, 2),
        save_seconds=round(costs.save, 2),
        reserve_seconds=round(costs.reserve, 1),
        host_memory_gib=measured["host_memory_gib"],
        checkpoint_bytes=measured["checkpoint_bytes"],
        ends=end.isoformat(timespec="minutes"),
        rows=tuple(rows),
        recommended=recommended,
        options=tuple(options),
        notes=tuple(notes(measured, main, costs.hours)),
    )


def recommend(recipe: Recipe, rows: dict[str, Row], views: int) -> tuple[str, list[str]]:
    """Which way, in a sentence and as options."""
    if "running" not in rows:
        return "a plain training, as the recipe says", []
    running, stored = rows["running"], rows["stored"]
    slowdown = stored.images_per_second / running.images_per_second
    if slowdown < WORTH:
        cost = max(0.0, 100 * (1 - 1 / slowdown))  # below 0 by noise
        return f"teachers running: they cost {cost:.0f} % of the speed, less than storing is worth", []
    targets = recipe.distill.target_cache or f"targets/{recipe.name or 'run'}"
    options = ["--distill.target-cache", targets]
    gain = f"an epoch from stored targets is {slowdown:.2f} times as fast"
    if "views" not in rows:
        return f"store the targets: {gain}, for every later run with the same data settings", options
    way = rows["views"]
    what = f"{way.epochs:.0f} epochs instead of {running.epochs:.0f}"
    if running.gpu_hours != way.gpu_hours:
        what = f"{way.gpu_hours:.3g} GPU-hours instead of {running.gpu_hours:.3g}"
    text = f"store the targets and cycle {views} views of each image: {what}; {gain}, also for later runs"
    return text, [*options, "--distill.views", str(views)]


def fewer_evaluations(row: Row, evaluation: float, every: float) -> list[str]:
    """An option, when the evaluations on the way, of so many GPU-seconds each, take more than their share."""
    if not every or row.epochs < 1:
        return []
    share = row.epochs / every * evaluation / (3600 * row.gpu_hours)
    if share <= EVALUATION_SHARE:
        return []
    return ["--run.eval-every", f"{math.ceil(every * share / EVALUATION_SHARE)} epochs"]


def notes(measured: dict[str, Any], row: Row, hours: float | None) -> Iterator[str]:
    """Warnings about the measurement, and about what the hours buy."""
    waiting, gpus = measured["modes"][row.mode]["waiting_share"], measured["gpus"]
    if waiting > 0.1:
        yield f"{100 * waiting:.0f} % of the time is waiting for data: more data.threads or a smaller beton would help"
    if hours is not None and row.gpu_hours > hours:
        yield "the budget is less than the start, the last evaluation and the save take: it would be exceeded"
    if hours is not None and row.epochs < 10:
        yield f"{row.epochs:.1f} epochs are few: a smaller student or data.image_size, or more hours, would give more"
    if gpus > 1:
        yield (
            f"one of {gpus} processes was measured; {gpus} are assumed to be {gpus} times as fast, the all-reduce of "
            "their gradients is left out"
        )
    if gpus > 1 and measured["device"].startswith("cpu"):
        yield f"{gpus} processes on one CPU share its cores, and are slower than this plan"


def as_text(plan: Plan) -> str:
    """The plan as it is printed."""
    on_cpu = plan.device.startswith("cpu")
    hours, memory_of = ("hours", "") if on_cpu else ("GPU-hours", "GPU memory")
    held = f"{plan.gpu_hours:g} {hours}" if plan.gpu_hours is not None else "the recipe's length"
    timed = " with an evaluation" * (plan.gpu_hours is not None)
    lines = [
        f"{held} on {f'{plan.gpus} x ' if plan.gpus > 1 else ''}{plan.device} (measured {plan.measured})",
        f"start {plan.start_seconds:.0f} s{timed}, each evaluation {plan.evaluation_seconds:.1f} s, "
        f"kept for the last evaluation and save {plan.reserve_seconds:.1f} s",
        f"host memory {plan.host_memory_gib:.1f} GiB, checkpoint {plan.checkpoint_bytes / 1e6:.0f} MB",
        "",
    ]
    width = max(len(row.label) for row in plan.rows)
    lines.append(f"{'':<{width}}  images/s    epochs     steps{hours:>11}{memory_of:>12}  stored targets")
    for row in plan.rows:
        memory = f"{row.memory_gib:.1f} GiB" if row.memory_gib is not None else "-" * (not on_cpu)
        stored = f"{row.targets_bytes / 1e6:,.1f} MB" if row.targets_bytes else "-"
        lines.append(
            f"{row.label:<{width}}{three_digits(row.images_per_second):>10}{row.epochs:>10.1f}{row.steps:>10,}"
            f"{row.gpu_hours:>11.4g}{memory:>12}{stored:>16}"
        )
    lines += ["", f"recommended: {plan.recommended.replace('GPU-hours', hours)}"]
    if plan.options:
        lines.append(f"    {shlex.join(plan.options)}")
    lines += [f"note: {note}" for note in plan.notes]
    devices = "" if on_cpu else f" on {quantity(plan.gpus, 'GPU')}"
    lines.append(f"started now{devices} it ends at {plan.ends}")
    return "\n".join(lines)


def plan(recipe: Recipe, stored: str = "", save: str = "", seconds: float = 60.0, gpus: int = 0) -> Plan:
    """Measures, or takes the measurement `stored`; returns what the recipe's `run.length` buys or costs.

    Args:
        gpus: that train together; 0: as the stored measurement, or all of this machine.
        save: file to write the measurement to, for a plan on another machine.

    Raises:
        UserError: as `measure` and `read`; `save` cannot be written.
    """
    measured = read(Path(stored), recipe, gpus) if stored else measure(recipe, seconds, gpus)
    if save:
        try:
            Path(save).write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--save: {save} cannot be written ({error})") from None
    return buy(measured, recipe)
