"""What a training step on a CPU needs of the host's memory at least, counted before it begins.

The kernel ends a process that uses more memory than there is, without a message; a GPU's allocator raises an error.
Shapes: B images of a pass, S side in pixels.
"""

from __future__ import annotations

import copy
import logging

import torch
from torch import Tensor

from pipelines.errors import UserError
from pipelines.loaders.resident import free_memory
from std_fast.config.recipe import Recipe
from std_fast.method.student import Student
from std_fast.training.micro_batch import MicroBatch, sizes

COUNTED = 4  # images: batch norms want several
GIB = 2**30
log = logging.getLogger("std_fast")


def saved_bytes(student: Student, image_size: int) -> float:
    """Bytes that autograd keeps for the backward pass, for each image `[3, S, S]`, without MINE; counted by a forward
    pass on the meta device. What is the parameters' own is not counted."""
    meta = copy.deepcopy(student).to("meta").train()
    own = {t.untyped_storage()._cdata for t in (*meta.parameters(), *meta.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            kept[storage] = tensor  # it stays, so that no other storage gets its address
        return tensor

    images = torch.empty(COUNTED, 3, image_size, image_size, device="meta", dtype=next(student.parameters()).dtype)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        meta(images, with_mine=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / COUNTED


def check_host_memory(recipe: Recipe, student: Student, micro_batch: MicroBatch, precision: str) -> None:
    """UserError where a step on a CPU needs more memory than is free: for the images, and for the backward pass.

    It is a lower bound: teachers, optimizer and temporary tensors come on top.
    """
    try:
        of_an_image = saved_bytes(student, recipe.data.image_size) * (0.5 if precision == "bfloat16" else 1.0)
    except Exception as error:  # each family of models has its own way of refusing tensors without data
        log.debug("memory of a step is not known (%r)", error)
        return
    share, S = recipe.run.batch // micro_batch.world.size, recipe.data.image_size
    rows = micro_batch.unit if micro_batch.auto else micro_batch.size or share
    pixels = 3 * S * S * share * (recipe.data.ahead + 4)  # batches in uint8 ahead, one in float32
    needed, free = pixels + rows * of_an_image, free_memory(torch.device("cpu"))
    if needed <= free:
        return
    fitting = [n for n in sizes(share, micro_batch.unit) if n < rows and pixels + 2 * n * of_an_image <= free]
    way = f"set run.micro_batch to {max(fitting)}, " if fitting else ""
    raise UserError(
        f"run.batch: {share} images of {S} px need at least {needed / GIB:.1f} GiB in a step on a CPU, and "
        f"{free / GIB:.1f} GiB are free; {way}lower run.batch or data.image_size, or take a smaller student"
    )
