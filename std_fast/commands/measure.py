"""How fast a recipe trains here: the measurement behind `std-fast plan`, which may be stored and read elsewhere."""

from __future__ import annotations

import gc
import logging
import math
import resource
import tempfile
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from pipelines.augment.device import TrainBatch
from pipelines.errors import UserError
from pipelines.loaders.base import available_cores
from pipelines.read.batch import Batch, Loader
from pipelines.untrusted import read_json
from std_fast.config.recipe import Distill, Recipe, dump, loads
from std_fast.config.schema import difference
from std_fast.method.losses import TeacherTargets
from std_fast.runtime.budget import process_seconds, productive_seconds
from std_fast.teachers.stream import TargetSource
from std_fast.training.build import pick_device, resolved
from std_fast.training.run import Run, Stopped
from std_fast.training.run_folder import versions

FORMAT = 1
LEAST_STEPS = 5
"""of each way of training, that a recommendation rests on"""
log = logging.getLogger("std_fast")

# A measurement of a recipe that differs in these is still one of the same work.
SAME_WORK = (
    "name", "summary", "data.train", "data.val", "data.one_part", "data.threads", "data.ahead", "data.eval_crop",
    "data.crop", "student.weights", "student.early_share",
    "distill.teachers", "distill.target_cache", "distill.views", "distill.alpha", "distill.temperature",
    "distill.reweight", "distill.predict", "distill.mine.weight", "distill.mine.lr", "optim.lr", "optim.lr_batch",
    "optim.min_lr", "optim.warmup", "optim.weight_decay", "optim.betas", "optim.eps", "optim.smoothing",
    "run.out", "run.seed", "run.length", "run.timeout", "run.eval_every", "run.save_every", "run.keep_checkpoints",
    "run.log_every", "run.trackers",
)  # fmt: skip


class ConstantTargets(TargetSource):
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

    def epoch(self, epoch: int) -> Generator[Batch]:
        inner = self.loader.epoch(epoch)
        try:
            for _ in range(self.batches):
                yield next(inner)
        finally:
            inner.close()

    def close(self) -> None:
        self.loader.close()


def measure(recipe: Recipe, seconds: float = 60.0, gpus: int = 0) -> dict[str, Any]:
    """Runs the recipe for about `seconds`, each way; returns the numbers as they are stored (see `read`).

    Of a slow recipe one batch is evaluated and one step done, with the teachers where there are any; the other ways are
    then left out.

    Rates, memory and evaluation are of one process with its share of the batch, `run.batch / gpus`.

    Args:
        gpus: processes that will train together; 0: as many as this machine has GPUs, 1 on a CPU.

    Raises:
        UserError: whatever `std-fast train` would refuse, a batch that `gpus` does not divide, and a time of 0.
    """
    if not 0 < seconds < math.inf:
        raise UserError("--seconds: must be more than nothing")
    on_gpu = pick_device(recipe.run.device).type == "cuda"
    here = torch.cuda.device_count() if on_gpu else 1
    if gpus < 0:
        raise UserError("--gpus: must be 1 or more, or 0 for the GPUs of this machine")
    gpus = gpus or here
    home = Path(resolved(recipe).run.out)
    home = next(folder for folder in (home, *home.absolute().parents) if folder.is_dir())  # saves go to the same disk
    share = share_of(recipe, gpus, min(gpus, here) if on_gpu else gpus)
    log.info("measures for about %.0f s, after the start: an evaluation, and each way of training", seconds)
    try:
        with tempfile.TemporaryDirectory(prefix=".plan-", dir=home) as scratch:
            measured = _measure(share, seconds, Path(scratch))
    except OSError as error:
        raise UserError(f"run.out: {home} cannot be written ({error}); give another --run.out") from None
    if measured["samples"] < recipe.run.batch:
        raise UserError(f"run.batch: {recipe.run.batch} is more than the {measured['samples']} images of data.train")
    per_epoch = measured["samples"] // recipe.run.batch
    return measured | {"recipe": dump(recipe), "gpus": gpus, "steps_per_epoch": per_epoch}


def share_of(recipe: Recipe, gpus: int, processes: int) -> Recipe:
    """What one of `gpus` processes trains, `processes` of them on a machine: its share of the batch and of the cores.

    Raises:
        UserError: the batch cannot be shared.
    """
    batch, threads = recipe.run.batch, recipe.data.threads
    if gpus == 1:
        return recipe
    if batch % (4 * gpus):
        raise UserError(f"run.batch: {batch} over {gpus} GPUs must be a multiple of {4 * gpus}; or give other --gpus")
    data = replace(recipe.data, threads=threads or max(1, available_cores() // processes))
    return replace(recipe, data=data, run=replace(recipe.run, batch=batch // gpus))


def _measure(recipe: Recipe, seconds: float, scratch: Path) -> dict[str, Any]:
    modes: dict[str, Any] = {}
    run = start(recipe, scratch / "one", process_seconds())
    began = time.perf_counter()

    def worthwhile() -> bool:
        """Whether another way of training is measured."""
        enough = all(mode["steps"] >= LEAST_STEPS for mode in modes.values())
        return enough or time.perf_counter() < began + seconds

    try:
        parts = run.parts
        data = parts.train_loader
        evaluation_seconds = time_evaluation(run, seconds)
        evaluated_for = time.perf_counter() - began
        measured: dict[str, Any] = {
            "samples": data.source.num_samples,
            "val_images": parts.val_loader.source.num_samples if parts.val_loader is not None else 0,
            "evaluation_seconds": evaluation_seconds,
        }
        share = seconds / 2 if parts.teachers is None else seconds / 4
        modes["none" if parts.teachers is None else "running"] = time_steps(run, share)
        run.folder.writer.wait()
        measured["start_seconds"] = round(run.ledger.read()["start"] - evaluated_for, 3)
        measured["save_seconds"] = {
            "stall": round(run.folder.copy_seconds, 3),
            "write": round(run.folder.writer.seconds, 3),
        }
        measured["checkpoint_bytes"] = max(file.stat().st_size for file in (scratch / "one").glob("checkpoints/*"))
        if parts.teachers is not None and worthwhile():
            with torch.no_grad(), parts.trainer.autocast():
                targets = parts.teachers(parts.augment(next(data.epoch(0))).images)
            parts.stream.source = ConstantTargets(targets)
            modes["stored"] = time_steps(run, seconds / 4)
    finally:
        with closing(run):
            run.folder.writer.wait()
    del run, parts, data
    if recipe.distill.mode != "none" and worthwhile():
        plain = start(replace(recipe, distill=Distill(mode="none")), scratch / "two")
        try:
            modes["none"] = time_steps(plain, seconds / 4)
        finally:
            plain.folder.writer.wait()
            plain.close()
    device = f"cpu, {torch.get_num_threads()} threads"
    return {
        "format": FORMAT,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() and recipe.run.device != "cpu" else device,
        "versions": versions(),
        **measured,
        "host_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "modes": modes,
    }


def start(recipe: Recipe, out: Path, already: float = 0.0) -> Run:
    """A run without end that writes to `out` only. already: seconds that the process was held before it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    distill = replace(recipe.distill, target_cache="", views=0)
    own = replace(recipe.run, out=str(out), length="1e12 steps", eval_every="0 steps", trackers=())
    return Run(replace(recipe, distill=distill, run=own), quiet=True, already=already)


def time_evaluation(run: Run, seconds: float) -> float:
    """Seconds of one evaluation; of a large data set only as much is evaluated as fits into a sixth of `seconds`."""
    loader = run.parts.val_loader
    if loader is None:
        return 0.0

    def take(batches: int) -> float:
        run.parts.val_loader = cast(Loader, TruncatedLoader(loader, batches))
        began = time.perf_counter()
        run.evaluator(run.step, "start", record=False)
        return time.perf_counter() - began

    with closing(loader.epoch(0)) as batches_read:  # compiles FFCV's decoding
        next(batches_read)
    try:
        one = take(1)
        least = one * (1 + 4 * run.recipe.run.batch / loader.spec.global_batch)  # a step: forward, backward, teachers
        if least > seconds:
            log.warning("a batch is evaluated in %.1f s here: measuring takes about %.0f s", one, least)
        elif one < seconds / 6:
            one = take(1)  # the first one is slower
        batches = max(1, min(loader.steps_per_epoch, int(seconds / 6 / one)))
        took = take(batches) if batches > 1 else one
    finally:
        run.parts.val_loader = loader
    return round(took * loader.steps_per_epoch / batches, 3)


def time_steps(run: Run, seconds: float) -> dict[str, Any]:
    """Images per second of the run's loop after it has warmed up, and the memory that it took; where the student gets
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
    before = run.step, run.ledger.read()

    def since(mark: tuple[int, dict[str, float]]) -> float:
        """Seconds, without those of compilation."""
        return productive_seconds(run.ledger.read()) - productive_seconds(mark[1])

    def on_step(_: Run) -> None:
        if marks:
            run.stop_wanted = since(marks[0]) > seconds / 2
        elif since(before) > seconds:
            marks.append(before)  # no time for a step after the first
            run.stop_wanted = True
        elif run.step - before[0] >= warm or since(before) > seconds / 2:
            mark()
        if run.stop_wanted:
            mark()

    def mark() -> None:
        if on_gpu:
            torch.cuda.synchronize(device)
        marks.append((run.step, run.ledger.read()))

    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        run.loop(on_step)
    except Stopped:
        run.stop_wanted = False
    (step_1, then), (step_2, now) = marks
    busy = productive_seconds(now) - productive_seconds(then)
    images = (step_2 - step_1) * run.recipe.run.batch
    return {
        "images_per_second": round(images / busy, 4),
        "steps": step_2 - step_1,
        "waiting_share": round((now["data"] - then["data"]) / busy, 3),
        "compile_seconds": round(now["compile"] - before[1]["compile"], 3),
        "memory_gib": round(torch.cuda.max_memory_reserved(device) / 2**30, 2) if on_gpu else None,
    }


def early(mode: dict[str, Any]) -> float:
    """Images per second of a mode in its early phase of smaller images; those of the later phase where it has none."""
    return mode.get("early_images_per_second", mode["images_per_second"])


def read(path: Path, recipe: Recipe, gpus: int = 0) -> dict[str, Any]:
    """A stored measurement of `recipe`'s work; one without a number of GPUs is of one.

    Args:
        gpus: 0: as measured.

    Raises:
        UserError: the file is none, or was measured with another student, batch, image size, number of GPUs, ...
    """
    try:
        data = {"gpus": 1} | read_json(path)
        stored = loads(data["recipe"])
        numbers = [data["samples"], data["steps_per_epoch"], data["start_seconds"], data["evaluation_seconds"]]
        numbers += [*data["save_seconds"].values(), *(mode["steps"] for mode in data["modes"].values())]
        sound = all(isinstance(n, (int, float)) and 0 <= n < math.inf for n in numbers)
        rates = [rate for mode in data["modes"].values() for rate in (mode["images_per_second"], early(mode))]
        positive = [*rates, data["steps_per_epoch"], data["gpus"]]
        sound &= isinstance(data["gpus"], int) and all(0 < n < math.inf for n in positive)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(
            f"{path}: is no measurement of std-fast plan ({type(error).__name__}); make one with --save"
        ) from None
    if data.get("format") != FORMAT or not sound:
        raise UserError(
            f"{path}: is damaged or was made by another version; measure again with std-fast plan --save {path}"
        )
    other = [name for name in difference(recipe, stored) if name not in SAME_WORK]
    if [(t.name, t.image_size) for t in recipe.distill.teachers] != [
        (t.name, t.image_size) for t in stored.distill.teachers
    ]:
        other.append("distill.teachers")
    if gpus not in (0, data["gpus"]):
        raise UserError(
            f"{path}: was measured for {data['gpus']} GPU(s); leave --gpus out, or measure again with --save"
        )
    if other:
        raise UserError(f"{path}: was measured with another {other[0]}; give that, or measure again with --save")
    return data
