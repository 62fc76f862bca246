"""Out of memory: which errors mean it, and the largest batch that fits."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from pipelines.errors import UserError

if TYPE_CHECKING:
    from std_fast.build import Parts
    from std_fast.recipe import Recipe

_SHORT = re.compile(
    r"out of memory|(can't|cannot|not enough|unable to) allocate|not enough memory|bad_alloc|ALLOC_FAILED"
)
UNIT = 4  # images: a batch is so many, or a multiple, on each process


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory was short, the host's or a device's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and bool(_SHORT.search(str(error)))


def of_the_device(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError"  # torch's; of the host torch says RuntimeError


def explained(recipe: Recipe, of_device: bool, text: str, processes: int) -> UserError:
    """What to say to the user whose training ran out of memory; call it when all that it held has been let go.

    On a device it tries which batch fits. On the host it does not: the next process to be killed may be another one.
    """
    batch, reason = recipe.run.batch, " ".join(text.split())[:200]
    if not of_device:
        return UserError(
            f"run.batch: memory was short with {batch} images a step ({reason}); lower it, or data.ahead, data.threads"
        )
    fits = largest(trial(recipe), batch // processes) * processes
    if not fits:
        return UserError(
            f"run.batch: {batch} does not fit in the device's memory, nor does {UNIT * processes} ({reason}); take a "
            "smaller student, teacher or data.image_size, or end what else uses the device"
        )
    return UserError(
        f"run.batch: {batch} does not fit in the device's memory ({reason}); the largest that fits is {fits}, found by "
        f"trial: --run.batch {fits}"
    )


def largest(fits: Callable[[int], bool], failed: int) -> int:
    """The largest multiple of UNIT below `failed` for which `fits`, by bisection; 0 if there is none."""
    good, bad = 0, -(-failed // UNIT)
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(UNIT * middle):
            good = middle
        else:
            bad = middle
    return UNIT * good


def trial(recipe: Recipe) -> Callable[[int], bool]:
    """A function that says whether the device has the memory for two training steps of so many images on this process.

    On gray images, with all that is on the device in a real step: the batches ahead, the next one prepared. Nothing is
    compiled, which takes rather more memory than less.
    """
    from std_fast.build import build

    data = replace(recipe.data, val="", backend="torch", threads=1, resample="auto")
    run = replace(recipe.run, batch=UNIT, compile="off", cuda_graphs="off", overlap="off")
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
            let_go()
        return False

    return fits


def two_steps(parts: Parts, batch: int) -> None:
    """Trains for two steps of `batch` images, the first of which makes the optimizer's state."""
    import numpy as np
    import torch

    from pipelines.batch import Batch
    from std_fast.label_cache import unpack

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
                mixed, answers = parts.augment(raw), None
                if parts.teachers is not None:
                    with trainer.autocast():
                        answers = parts.teachers(mixed.images)
                elif distill.mode == "std":  # stored ones
                    shape = (batch, len(distill.teachers), 2 + 2 * distill.top_k)
                    answers = unpack(torch.ones(shape, dtype=torch.int16, device=device), distill.labels == "soft")
                prepared.append((mixed, answers))
        for step, (mixed, answers) in enumerate(prepared, 1):
            trainer.step(mixed, answers, step, 0.0, 0.0, distill.uses_mine)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    finally:
        trainer.optimizer.zero_grad(set_to_none=True)


def let_go() -> None:
    """Gives the memory of what is gone back to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
