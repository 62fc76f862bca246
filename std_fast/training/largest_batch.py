"""The largest batch that fits in a device's memory, found by trial once one did not."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from pipelines.errors import UserError
from pipelines.read.batch import Batch
from std_fast.config.recipe import Recipe
from std_fast.runtime.memory import ran_out
from std_fast.teachers.target_cache import unpack
from std_fast.training.build import Parts, build
from std_fast.training.step import GROUP


def explained(recipe: Recipe, of_device: bool, text: str, processes: int) -> UserError:
    """What to say to the user whose training ran out of memory; call it when all that it held has been let go.

    On a device it tries which batch fits. On the host it does not: the next process to be killed may be another one.
    """
    batch, reason = recipe.run.batch, " ".join(text.split())[:200]
    if not of_device:
        return UserError(
            f"run.batch: memory was short with {batch} images a step ({reason}); lower it, or data.ahead, data.threads"
        )
    unit = unit_of(recipe)
    fits = largest(trial(recipe), batch // processes, unit) * processes
    if not fits:
        return UserError(
            f"run.batch: {batch} does not fit in the device's memory, nor does {unit * processes} ({reason}); take a "
            "smaller student, teacher or data.image_size, or end what else uses the device"
        )
    return UserError(
        f"run.batch: {batch} does not fit in the device's memory ({reason}); the largest that fits is {fits}, found by "
        f"trial: --run.batch {fits}"
    )


def unit_of(recipe: Recipe) -> int:
    """Images: a batch is so many, or a multiple, on each process."""
    return GROUP if recipe.student.drop_path_mode == "subset" else 4


def largest(fits: Callable[[int], bool], failed: int, unit: int) -> int:
    """The largest multiple of `unit` below `failed` for which `fits`, by bisection; 0 if there is none."""
    good, bad = 0, -(-failed // unit)
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(unit * middle):
            good = middle
        else:
            bad = middle
    return unit * good


def trial(recipe: Recipe) -> Callable[[int], bool]:
    """A function that says whether the device has the memory for two training steps of so many images on this process.

    On gray images, with all that is on the device in a real step: the batches ahead, the next one prepared. Nothing is
    compiled, which takes rather more memory than less.
    """
    data = replace(recipe.data, val="", backend="torch", threads=1, resample="auto")
    run = replace(recipe.run, compile="off", overlap="off")
    parts: list[Parts] = []

    def fits(batch: int) -> bool:
        try:
            if not parts:
                parts.append(build(replace(recipe, data=data, run=run)))
            two_steps(parts[0], batch)
            return True
        except Exception as error:
            if not ran_out(error):
                raise
        finally:
            free_memory()
        return False

    return fits


def two_steps(parts: Parts, batch: int) -> None:
    """Trains for two steps of `batch` images, the first of which makes the optimizer's state."""
    device, recipe, trainer = parts.device, parts.recipe, parts.trainer
    size, distill = recipe.data.image_size, recipe.distill
    try:
        held = []
        for _ in range(recipe.data.ahead + 1):
            images = torch.full((batch, size, size, 3), 128, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
            places = torch.arange(batch, device=device)
            held.append(Batch(images, torch.zeros_like(places), places, np.arange(batch), 0, 0))
        prepared = []
        with torch.no_grad():
            for raw in held[:2]:
                mixed, targets = parts.augment(raw), None
                if parts.teachers is not None:
                    with trainer.autocast():
                        targets = parts.teachers(mixed.images)
                elif distill.mode == "std":  # stored ones
                    shape = (batch, len(distill.teachers), 2 + 2 * distill.top_k)
                    targets = unpack(torch.ones(shape, dtype=torch.int16, device=device), distill.labels == "soft")
                prepared.append((mixed, targets))
        for step, (mixed, targets) in enumerate(prepared, 1):
            trainer.step(mixed, targets, step, 0.0, 0.0, distill.uses_mine)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    finally:
        trainer.optimizer.zero_grad(set_to_none=True)


def free_memory() -> None:
    """Gives the memory of what is gone back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
