"""`std-fast teach`: runs the teachers on every view that a recipe shows, and stores their targets."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipelines.augment.device import Augment
from pipelines.errors import UserError, quantity
from pipelines.read.batch import Loader
from std_fast.config.recipe import Duration, Recipe, parse_seconds
from std_fast.runtime.budget import duration_in_words
from std_fast.runtime.distributed import RankSync, World, init_distributed
from std_fast.runtime.metrics import Progress, three_digits
from std_fast.runtime.process import stop_on_signal
from std_fast.teachers.fingerprint import fingerprint
from std_fast.teachers.stream import BatchStream, TeacherSource
from std_fast.teachers.target_cache import TargetCache, epochs_needed, open_target_cache
from std_fast.teachers.target_format import pack
from std_fast.teachers.teacher import autocast
from std_fast.training.build import build_teachers, make_fast, open_train_loader, pick_device, precision_of, uses_gpu
from std_fast.training.run import Stopped

log = logging.getLogger("std_fast")


def teach(recipe: Recipe, quiet: bool = False) -> dict[str, Any]:
    """Stores the targets of all epochs of `run.length`, or of `distill.views` views; returns what was done.

    Complete epochs are left as they are, damaged ones are made again, an interrupted one is continued. All positions
    are stored, also those that training with this batch drops, so that a run with any batch can read them. Started by
    torchrun, the processes share the work.

    Raises:
        Stopped: one of STOP_SIGNALS, as of Ctrl-C; what was done is stored.
        UserError: the recipe names no teachers, no folder or no length in epochs; whatever else the user can fix.
    """
    d, run = recipe.distill, recipe.run
    if not d.target_cache:
        raise UserError(
            "distill.target_cache: is empty; name the folder to be made, e.g. --distill.target-cache targets/run1"
        )
    limit = parse_seconds(run.timeout, "run.timeout")
    with stop_on_signal() as signals, init_distributed(uses_gpu(run.device), limit) as world:
        device = pick_device(run.device)
        with open_train_loader(recipe, device, world, drop_last=False) as loader:
            steps_per_epoch = loader.source.num_samples // run.batch
            epochs = epochs_needed(Duration.parse(run.length), steps_per_epoch, run.batch, d.views)
            if epochs is None:
                raise UserError(
                    "run.length: gpu-hours have no number of epochs; give it in epochs, or give --distill.views"
                )
            try:
                images, seconds = fill_cache(recipe, loader, device, world, epochs, quiet, signals)
            except Stopped:  # all ranks alike: they stay until rank 0 has stored all, or torchrun would end it
                world.wait_for_all()
                raise
            world.wait_for_all()
    return {
        "targets": d.target_cache,
        "epochs": epochs,
        "views": d.views,
        "images": images,
        "images_per_second": round(images / seconds, 1),
        "bytes": sum(file.stat().st_size for file in Path(d.target_cache).glob("epoch-*") if file.suffix != ".partial"),
    }


def fill_cache(
    recipe: Recipe,
    loader: Loader,
    device: torch.device,
    world: World,
    epochs: int,
    quiet: bool,
    signals: Sequence[int],
) -> tuple[int, float]:
    """Stores what is missing of the first `epochs` epochs.

    Args:
        signals: that asked it to stop; the caller adds to it.

    Returns:
        How many images the teachers were run on, and in how many seconds.

    Raises:
        Stopped: `signals` holds one, on any rank.
    """
    run, samples = recipe.run, loader.source.num_samples
    precision = precision_of(run.precision, device)
    even = samples // 2 * 2  # a last odd one has no neighbour to be mixed with
    values = fingerprint(recipe, loader, precision)
    cache = open_target_cache(recipe.distill, values, even, run.batch, world)
    stream = teacher_stream(recipe, loader, device, precision)
    if world.main:
        what = f"{quantity(even, 'image')} in {'each of ' * (epochs > 1)}{quantity(epochs, 'epoch')}"
        log.info("%s: the teachers run on %s, also where run.length ends within the last", cache.folder, what)
    bar = Progress("epoch", epochs, "", quiet or not world.main)
    began, images, steps = time.perf_counter(), 0, loader.steps_per_epoch
    warm: tuple[float, int] | None = None  # when the first batch, which is slower, was done, and its images
    ranks = RankSync(world)
    try:
        for epoch in range(epochs):
            check_signals(ranks, signals, epoch, cache)
            if world.broadcast(world.main and is_complete(cache, epoch)):
                bar.note(epoch + 1, "is there")
                continue
            writer = cache.writer(epoch)
            first = world.broadcast(writer.filled()) // run.batch
            stream.seek(epoch * steps + first)
            later = even * sum(e > epoch for e in cache.missing(epochs))
            for step in range(first, steps):
                check_signals(ranks, signals, epoch, cache)
                batch = next(stream)
                writer.add(step, pack(batch.targets))
                images += min(run.batch, even - step * run.batch)
                warm = warm or (time.perf_counter(), images)
                left = later + max(0, even - (step + 1) * run.batch)
                bar.note(epoch + (step + 1) / steps, rate_in_words(images - warm[1], warm[0], left))
            writer.end()
    finally:
        stream.close()
        cache.close()
        bar.close()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return images, time.perf_counter() - began


def rate_in_words(images: int, since: float, left: int) -> str:
    """`41.2 images/s, about 3 minutes left`, from the images that were done `since`; empty where there are none."""
    if images <= 0:
        return ""
    rate = images / (time.perf_counter() - since)
    return f"{three_digits(rate)} images/s, about {duration_in_words(left / rate)} left"


def teacher_stream(recipe: Recipe, loader: Loader, device: torch.device, precision: str) -> BatchStream:
    """Augmented batches with the targets of the recipe's teachers."""
    teachers = build_teachers(recipe, loader.num_classes, device, loader.source.class_names)
    assert teachers is not None
    augment = Augment(recipe.augment, recipe.run.seed).to(device)
    make_fast(recipe.run.compile, device, augment, teachers)
    return BatchStream(loader, augment, TeacherSource(teachers, functools.partial(autocast, device, precision)))


def check_signals(ranks: RankSync, signals: Sequence[int], epoch: int, cache: TargetCache) -> None:
    """Raises Stopped, on all ranks alike, where one of them has got a signal."""
    (stop,) = ranks(bool(signals))
    if stop:
        raise Stopped(f"stopped in epoch {epoch + 1}; the same command continues {cache.folder}")


def is_complete(cache: TargetCache, epoch: int) -> bool:
    """Whether the epoch is stored and undamaged; a damaged one is named in the log."""
    if not cache.stored(epoch):
        return False
    try:
        cache.open(epoch)
    except UserError as error:
        log.warning("made again: %s", error)
        return False
    return True
