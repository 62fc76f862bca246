"""`std-fast teach`: asks the teachers about every view that a recipe shows, and stores what they say."""

from __future__ import annotations

import functools
import logging
import time
from pathlib import Path

import torch

from pipelines.augment.device import Augment
from pipelines.errors import UserError
from std_fast.config.recipe import Recipe, parse_seconds
from std_fast.runtime.distributed import init_distributed
from std_fast.runtime.metrics import Progress
from std_fast.teachers.overlap import taught
from std_fast.teachers.target_cache import TargetCache, epochs_needed, open_target_cache, pack
from std_fast.teachers.teacher import autocast
from std_fast.training.build import build_teachers, make_fast, open_train_loader, pick_device, precision_of, uses_gpu

log = logging.getLogger("std_fast")


def teach(recipe: Recipe, quiet: bool = False) -> dict:
    """Stores the targets of all epochs of `run.length`, or of `distill.views` views; returns what was done.

    Epochs that are there and whole are left as they are, damaged ones are made again, one that was interrupted goes on
    where it was. All positions are stored, those too that training with this batch drops, so that any batch can read
    them. Started by torchrun, the processes share the work.

    Raises:
        UserError: the recipe names no teachers, no folder or no length in epochs; whatever else the user can mend.
    """
    d = recipe.distill
    if not d.target_cache:
        raise UserError(
            "distill.target_cache: is empty; name the folder to be made, e.g. --distill.target-cache targets/run1"
        )
    with init_distributed(uses_gpu(recipe), parse_seconds(recipe.run.timeout, "run.timeout")) as world:
        device = pick_device(recipe)
        precision = precision_of(recipe, device)
        with open_train_loader(recipe, device, world, drop_last=False) as loader:
            epochs = epochs_needed(recipe, loader.source.num_samples // recipe.run.batch)
            if epochs is None:
                raise UserError("run.length: gpu-hours have no number of epochs; give it in epochs, or give --views")
            even = loader.source.num_samples // 2 * 2  # a last odd one has no neighbour to be mixed with
            store = open_target_cache(recipe, loader, precision, even, world)
            assert store is not None
            teachers = build_teachers(recipe, loader.num_classes, device, loader.source.class_names)
            assert teachers is not None
            augment = Augment(recipe.augment, recipe.run.seed).to(device)
            make_fast(recipe, device, augment, teachers)
            cast = functools.partial(autocast, device, precision)
            bar = Progress("epoch", epochs, "epochs", quiet or not world.main)
            began, asked = time.perf_counter(), 0
            try:
                for epoch in range(epochs):
                    if world.broadcast(world.main and whole(store, epoch)):
                        bar.note(epoch + 1, "is there")
                        continue
                    writer = store.writer(epoch)
                    first = world.broadcast(writer.filled()) // recipe.run.batch
                    steps = loader.steps_per_epoch
                    for mixed, targets in taught(loader.epoch(epoch, first), augment, teachers, cast):
                        assert targets is not None
                        writer.add(mixed.step, pack(targets))
                        asked += min(recipe.run.batch, even - mixed.step * recipe.run.batch)
                        bar.update(epoch + (mixed.step + 1) / steps)
                    writer.end()
                    bar.note(epoch + 1, f"{asked / (time.perf_counter() - began):.0f} images/s")
            finally:
                store.close()
                bar.close()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            world.wait_for_all()
    seconds = time.perf_counter() - began
    return {
        "targets": d.target_cache,
        "epochs": epochs,
        "views": d.views,
        "asked": asked,
        "images_per_second": round(asked / seconds, 1),
        "bytes": sum(file.stat().st_size for file in Path(d.target_cache).glob("epoch-*") if file.suffix != ".partial"),
    }


def whole(store: TargetCache, epoch: int) -> bool:
    """Whether the epoch is stored and undamaged; a damaged one is said to be so."""
    if not store.stored(epoch):
        return False
    try:
        store.open(epoch)
    except UserError as error:
        log.warning("made again: %s", error)
        return False
    return True
