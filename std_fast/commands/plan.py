"""`std-fast plan`: what a GPU-hour budget buys, before it is spent.

`measure` runs the real training for up to a minute: with the teachers, with their targets at hand, and without
teachers. `buy` turns that, or a measurement stored on another machine, into epochs; it needs no GPU and no data.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import resource
import shlex
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from pipelines.augment.device import TrainBatch
from pipelines.errors import UserError
from pipelines.read.batch import Batch, Loader
from pipelines.untrusted import read_json
from std_fast.config.recipe import Distill, Duration, Recipe, dump, loads
from std_fast.config.schema import difference
from std_fast.method.losses import TeacherTargets
from std_fast.runtime.budget import CLOSING, productive_seconds
from std_fast.teachers.stream import NoTargets
from std_fast.teachers.target_cache import bytes_per_epoch
from std_fast.training.build import resolved
from std_fast.training.run import Run, Stopped
from std_fast.training.run_folder import versions

log = logging.getLogger("std_fast")
FORMAT = 1
WORTH = 1.1  # stored targets are recommended where they buy a tenth more epochs
EVALUATION_SHARE = 0.03  # of the budget, that evaluations on the way may take
VIEWS = 10, 300
"""fewest and most views of an image that are recommended: half as many as epochs, within these"""

# A measurement of a recipe that differs in these is still one of the same work.
SAME_WORK = (
    "name", "summary", "data.train", "data.val", "data.threads", "data.ahead", "data.eval_crop", "data.crop",
    "student.weights", "student.early_share",
    "distill.teachers", "distill.target_cache", "distill.views", "distill.alpha", "distill.temperature",
    "distill.reweight", "distill.predict", "distill.mine.weight", "distill.mine.lr", "optim.lr", "optim.lr_batch",
    "optim.min_lr", "optim.warmup", "optim.weight_decay", "optim.betas", "optim.eps", "optim.smoothing",
    "run.out", "run.seed", "run.length", "run.timeout", "run.eval_every", "run.save_every", "run.keep_checkpoints",
    "run.log_every",
)  # fmt: skip


# -- measuring --------------------------------------------------------------------------------------------------------


class ConstantTargets(NoTargets):
    """The same targets for every batch, in place of a target cache.

    Reading one costs little beside a step, and the targets of all positions cannot be stored in a minute.
    """

    def __init__(self, targets: TeacherTargets) -> None:
        self.constant = targets

    def targets(self, batch: TrainBatch) -> TeacherTargets:
        return self.constant


class TruncatedLoader:
    """The first batches of a loader, as a loader of as many images."""

    def __init__(self, loader: Loader, batches: int) -> None:
        self.loader, self.batches = loader, batches
        count = min(loader.source.num_samples, batches * loader.spec.global_batch)
        self.source = SimpleNamespace(num_samples=count, path=loader.source.path)
        self.sampler = loader.sampler

    def epoch(self, epoch: int) -> Iterator[Batch]:
        inner = self.loader.epoch(epoch)
        try:
            for _ in range(self.batches):
                yield next(inner)
        finally:
            inner.close()  # type: ignore[attr-defined]

    def close(self) -> None:
        self.loader.close()


def measure(recipe: Recipe, seconds: float = 60.0) -> dict[str, Any]:
    """Runs the recipe for about `seconds`, each way; returns the figures as they are stored (see `read`).

    Raises:
        UserError: whatever `std-fast train` would refuse, and a time of nothing.
    """
    if not 0 < seconds < math.inf:
        raise UserError("--seconds: must be more than nothing")
    home = Path(resolved(recipe).run.out)
    home = next(folder for folder in (home, *home.absolute().parents) if folder.is_dir())  # saves go to the same disk
    try:
        with tempfile.TemporaryDirectory(prefix=".plan-", dir=home) as scratch:
            return _measure(recipe, seconds, Path(scratch))
    except OSError as error:
        raise UserError(f"run.out: {home} cannot be written ({error}); give another --run.out") from None


def _measure(recipe: Recipe, seconds: float, scratch: Path) -> dict[str, Any]:
    modes: dict[str, Any] = {}
    run = start(recipe, scratch / "one")
    try:
        parts = run.parts
        data = parts.train_loader
        figures: dict[str, Any] = {
            "samples": data.source.num_samples,
            "steps_per_epoch": run.per_epoch,
            "val_images": parts.val_loader.source.num_samples if parts.val_loader is not None else 0,
            "evaluation_seconds": time_evaluation(run, seconds / 6),
        }
        share = seconds / 2 if parts.teachers is None else seconds / 4
        modes["none" if parts.teachers is None else "running"] = time_steps(run, share)
        run.folder.writer.wait()
        figures["start_seconds"] = round(run.ledger.read()["start"] - figures["evaluation_seconds"], 3)
        figures["save_seconds"] = {
            "stall": round(run.folder.copy_seconds, 3),
            "write": round(run.folder.writer.seconds, 3),
        }
        figures["checkpoint_bytes"] = max(file.stat().st_size for file in (scratch / "one").glob("checkpoints/*"))
        if parts.teachers is not None:
            with torch.no_grad(), parts.trainer.autocast():
                targets = parts.teachers(parts.augment(next(data.epoch(0))).images)
            parts.stream.source = ConstantTargets(targets)
            modes["stored"] = time_steps(run, seconds / 4)
    finally:
        run.close()
    del run, parts, data
    if recipe.distill.mode != "none":
        plain = start(replace(recipe, distill=Distill(mode="none")), scratch / "two")
        try:
            modes["none"] = time_steps(plain, seconds / 4)
        finally:
            plain.folder.writer.wait()
            plain.close()
    device = f"cpu, {torch.get_num_threads()} threads"
    return {
        "format": FORMAT,
        "recipe": dump(recipe),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() and recipe.run.device != "cpu" else device,
        "versions": versions(),
        **figures,
        "host_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "modes": modes,
    }


def start(recipe: Recipe, out: Path) -> Run:
    """A run that stores nothing of the user's and has no end of its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    distill = replace(recipe.distill, target_cache="", views=0)
    own = replace(recipe.run, out=str(out), length="1e12 steps", eval_every="0 steps")
    return Run(replace(recipe, distill=distill, run=own), quiet=True)


def time_evaluation(run: Run, seconds: float) -> float:
    """Seconds of one evaluation; of a large data set only as much is evaluated as fits into `seconds`."""
    loader = run.parts.val_loader
    if loader is None:
        return 0.0

    def take(batches: int) -> float:
        run.parts.val_loader = cast(Loader, TruncatedLoader(loader, batches))
        began = time.perf_counter()
        run.evaluator(run.step, "start", record=False)
        return time.perf_counter() - began

    try:
        take(1)
        one = take(1)
        batches = max(1, min(loader.steps_per_epoch, int(seconds / one)))
        took = take(batches)
    finally:
        run.parts.val_loader = loader
    return round(took * loader.steps_per_epoch / batches, 3)


def time_steps(run: Run, seconds: float) -> dict[str, Any]:
    """Images per second of the run's loop after it has warmed up, and the memory that it took; where the student sees
    smaller images early, also `early_images_per_second`."""
    if not run.recipe.student.early_size:
        return time_some(run, seconds)
    run.schedule.early_share = math.inf
    early = time_some(run, seconds / 2)
    run.schedule.early_share = 0.0
    later = time_some(run, seconds / 2)
    compiling = round(later["compile_seconds"] + early["compile_seconds"], 3)
    return later | {"early_images_per_second": early["images_per_second"], "compile_seconds": compiling}


def time_some(run: Run, seconds: float) -> dict[str, Any]:
    device = run.parts.device
    on_gpu = device.type == "cuda"
    # until compiled, and until it is decided whether teachers work beside the student
    warm = 70 if run.stream.overlap.trial is not None and run.stream.source.runs_teachers else 4
    marks: list[tuple[int, dict[str, float]]] = []
    began = first_at = time.perf_counter()
    first = run.step

    def on_step(_: Run) -> None:
        nonlocal first_at
        now = time.perf_counter()
        if not marks and (run.step - first >= warm or now - began > seconds / 2):
            mark()
            first_at = time.perf_counter()
        elif marks and now - first_at > seconds / 2:
            mark()
            run.stop_wanted = True

    def mark() -> None:
        if on_gpu:
            torch.cuda.synchronize(device)
        marks.append((run.step, run.ledger.read()))

    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    before = run.ledger.read()
    try:
        run.loop(on_step)
    except Stopped:
        run.stop_wanted = False
    (step_1, then), (step_2, now) = marks
    busy = productive_seconds(now) - productive_seconds(then)
    images = (step_2 - step_1) * run.recipe.run.batch
    return {
        "images_per_second": round(images / busy, 1),
        "steps": step_2 - step_1,
        "waiting_share": round((now["data"] - then["data"]) / busy, 3),
        "compile_seconds": round(now["compile"] - before["compile"], 3),
        "memory_gib": round(torch.cuda.max_memory_reserved(device) / 2**30, 2) if on_gpu else None,
    }


def early(mode: dict[str, Any]) -> float:
    """Images per second of a mode while the student sees smaller images; as later where it does not."""
    return mode.get("early_images_per_second", mode["images_per_second"])


def read(path: Path, recipe: Recipe) -> dict[str, Any]:
    """A stored measurement of `recipe`'s work.

    Raises:
        UserError: the file is none, or was measured with another student, batch, image size, ...
    """
    try:
        data = read_json(path)
        stored = loads(data["recipe"])
        numbers = [data["samples"], data["steps_per_epoch"], data["start_seconds"], data["evaluation_seconds"]]
        numbers += [*data["save_seconds"].values()]
        for mode in data["modes"].values():
            numbers += [mode["images_per_second"], mode["steps"], early(mode)]
        sound = all(isinstance(n, (int, float)) and 0 <= n < math.inf for n in numbers)
        sound = (
            sound
            and data["steps_per_epoch"] > 0
            and all(rate > 0 for mode in data["modes"].values() for rate in (mode["images_per_second"], early(mode)))
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(
            f"{path}: is no measurement of std-fast plan ({type(error).__name__}); make one with --save"
        ) from None
    if data.get("format") != FORMAT or not sound:
        raise UserError(f"{path}: is damaged or of another version; measure again with std-fast plan --save {path}")
    other = [name for name in difference(recipe, stored) if name not in SAME_WORK]
    if [(t.name, t.image_size) for t in recipe.distill.teachers] != [
        (t.name, t.image_size) for t in stored.distill.teachers
    ]:
        other.append("distill.teachers")
    if other:
        raise UserError(f"{path}: was measured with another {other[0]}; give that, or measure again with --save")
    return data


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
    """All figures are of one GPU; many share the images, and each is held through start, evaluation and save."""

    device: str
    measured: str
    gpu_hours: float | None
    start_seconds: float
    evaluation_seconds: float
    save_seconds: float
    reserve_seconds: float
    host_memory_gib: float
    checkpoint_bytes: int
    ends: str | None
    rows: tuple[Row, ...]
    recommended: str
    options: tuple[str, ...]
    """the recommendation as arguments of `std-fast train`"""
    notes: tuple[str, ...]


def buy(figures: dict[str, Any], recipe: Recipe, now: datetime | None = None) -> Plan:
    """From a measurement to what `run.length` of the recipe buys (gpu-hours) or costs (anything else)."""
    length = Duration.parse(recipe.run.length)
    hours = length.amount if length.unit == "gpu-hours" else None
    batch, per_epoch = recipe.run.batch, figures["steps_per_epoch"]
    every = Duration.parse(recipe.run.eval_every).steps(per_epoch, batch) / per_epoch  # epochs, 0: only at the end
    evaluation, save = figures["evaluation_seconds"], sum(figures["save_seconds"].values())
    reserve = 1.25 * (evaluation + save) + CLOSING
    modes = figures["modes"]
    teachers = len(recipe.distill.teachers)

    def rate(mode: str) -> float:
        """Images per second, over the whole training: what is early is a share of the hours, or of the steps."""
        first, later, share = early(modes[mode]), modes[mode]["images_per_second"], recipe.student.early_share
        if hours is not None:
            return share * first + (1 - share) * later
        return 1 / (share / first + (1 - share) / later)

    def epoch_seconds(mode: str) -> float:
        """With the share of evaluations that falls on it."""
        return per_epoch * batch / rate(mode) + (evaluation / every if every else 0.0)

    def fixed(mode: str) -> float:
        rehearsal = evaluation if hours is not None else 0.0
        return figures["start_seconds"] + modes[mode]["compile_seconds"] + rehearsal + reserve

    def row(mode: str, views: int = 0) -> Row:
        base = "running" if mode == "views" else mode
        first, later = epoch_seconds(base), epoch_seconds("stored" if mode == "views" else mode)
        if hours is not None:
            left = max(0.0, 3600 * hours - fixed(base))
            once = min(left / first, views) if mode == "views" else left / first
            epochs = once + (left - once * first) / later
            cost = hours
        else:
            epochs = length.steps(per_epoch, batch) / per_epoch
            once = min(epochs, views) if mode == "views" else epochs
            cost = (fixed(base) + once * first + (epochs - once) * later) / 3600
        kept = {"views": min(views, math.ceil(epochs)), "stored": math.ceil(epochs)}.get(mode, 0)
        return Row(
            mode=mode,
            label=LABELS[mode].format(views=views),
            images_per_second=round(rate(base), 1),
            epochs=round(epochs, 2),
            steps=int(epochs * per_epoch),
            gpu_hours=round(cost, 4),
            memory_gib=modes[base]["memory_gib"],
            targets_bytes=kept * bytes_per_epoch(figures["samples"], teachers, recipe.distill.top_k),
        )

    rows = [row(mode) for mode in ("running", "stored", "none") if mode in modes]
    views = recipe.distill.views or min(max(round(rows[0].epochs / 2), VIEWS[0]), VIEWS[1])
    if "stored" in modes and views < row("views", views).epochs:
        rows.insert(1, row("views", views))
    by_mode = {r.mode: r for r in rows}
    recommended, options = recommend(recipe, by_mode, views)
    main = by_mode.get("running", rows[0])
    options += fewer_evaluations(main, evaluation, every)
    ends = None
    if hours is not None:
        ends = ((now or datetime.now()).astimezone() + timedelta(hours=hours)).isoformat(timespec="minutes")
    return Plan(
        device=figures["device"],
        measured=figures["date"],
        gpu_hours=hours,
        start_seconds=round(fixed(main.mode) - reserve, 1),
        evaluation_seconds=round(evaluation, 2),
        save_seconds=round(save, 2),
        reserve_seconds=round(reserve, 1),
        host_memory_gib=figures["host_memory_gib"],
        checkpoint_bytes=figures["checkpoint_bytes"],
        ends=ends,
        rows=tuple(rows),
        recommended=recommended,
        options=tuple(options),
        notes=tuple(notes(figures, main, hours)),
    )


def recommend(recipe: Recipe, rows: dict[str, Row], views: int) -> tuple[str, list[str]]:
    """Which way, in a sentence and as options."""
    if "running" not in rows:
        return "a plain training, as the recipe says", []
    running, stored = rows["running"], rows["stored"]
    slowdown = stored.images_per_second / running.images_per_second
    if slowdown < WORTH:
        return (
            f"teachers running: they cost {100 * (1 - 1 / slowdown):.0f} % of the speed, less than storing is worth",
            [],
        )
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
    """An option, when the evaluations on the way take more than their share."""
    if not every or row.epochs < 1:
        return []
    share = row.epochs / every * evaluation / (3600 * row.gpu_hours)
    if share <= EVALUATION_SHARE:
        return []
    return ["--run.eval-every", f"{math.ceil(every * share / EVALUATION_SHARE)} epochs"]


def notes(figures: dict[str, Any], row: Row, hours: float | None) -> Iterator[str]:
    """What a user should know before the hours are spent."""
    waiting = figures["modes"][row.mode]["waiting_share"]
    if waiting > 0.1:
        yield f"{100 * waiting:.0f} % of the time is waiting for data: more data.threads or a smaller beton would help"
    if hours is not None and row.epochs < 10:
        yield f"{row.epochs:.1f} epochs are few: a smaller student, data.image_size or more hours would learn more"
    few = [mode for mode, found in figures["modes"].items() if found["steps"] < 5]
    if few:
        yield f"measured on fewer than 5 steps ({', '.join(few)}): a rough figure; more --seconds make it better"


def as_text(plan: Plan) -> str:
    """The plan as it is printed."""
    held = f"{plan.gpu_hours:g} GPU-hours" if plan.gpu_hours is not None else "the recipe's length"
    lines = [
        f"{held} on {plan.device} (measured {plan.measured})",
        f"start {plan.start_seconds:.0f} s, each evaluation {plan.evaluation_seconds:.1f} s, "
        f"kept for the last evaluation and save {plan.reserve_seconds:.1f} s",
        f"host memory {plan.host_memory_gib:.1f} GiB, checkpoint {plan.checkpoint_bytes / 1e6:.0f} MB",
        "",
    ]
    width = max(len(row.label) for row in plan.rows)
    lines.append(f"{'':<{width}}  images/s    epochs     steps  GPU-hours  GPU memory  stored targets")
    for row in plan.rows:
        memory = f"{row.memory_gib:.1f} GiB" if row.memory_gib is not None else "-"
        stored = f"{row.targets_bytes / 1e6:,.1f} MB" if row.targets_bytes else "-"
        lines.append(
            f"{row.label:<{width}}{row.images_per_second:>10,.0f}{row.epochs:>10.1f}{row.steps:>10,}"
            f"{row.gpu_hours:>11.4g}{memory:>12}{stored:>16}"
        )
    lines += ["", f"recommended: {plan.recommended}"]
    if plan.options:
        lines.append(f"    {shlex.join(plan.options)}")
    lines += [f"note: {note}" for note in plan.notes]
    if plan.ends is not None:
        lines.append(f"started now on one GPU it ends at {plan.ends}")
    return "\n".join(lines)


def plan(recipe: Recipe, stored: str = "", save: str = "", seconds: float = 60.0) -> Plan:
    """Measures, or takes the measurement `stored`, and says what the recipe's `run.length` buys or costs.

    Args:
        save: file to write the measurement to, for a plan on another machine.

    Raises:
        UserError: as `measure` and `read`; `save` cannot be written.
    """
    figures = read(Path(stored), recipe) if stored else measure(recipe, seconds)
    if save:
        try:
            Path(save).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--save: {save} cannot be written ({error})") from None
    return buy(figures, recipe)


def as_dict(plan: Plan) -> dict[str, Any]:
    """Plain values for --json."""
    return asdict(plan)
