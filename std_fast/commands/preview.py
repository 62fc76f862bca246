"""A contact sheet of a recipe's augmented images."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from pipelines.augment.device import Augment
from pipelines.augment.preview import contact_sheet
from pipelines.errors import UserError
from pipelines.read.source import open_source
from std_fast.config.recipe import Recipe
from std_fast.teachers.classes import class_in_words
from std_fast.training.build import open_train_loader, pick_device

log = logging.getLogger("std_fast")


def preview(recipe: Recipe, out: Path, images: int | None = None) -> None:
    """Draws the first images of the first epoch, augmented as the student will see them, as a PNG.

    Args:
        images: how many; by default 64, or all where there are fewer.

    Raises:
        UserError: data that cannot be read, fewer than four images, or a PNG that cannot be written.
    """
    if images is None:
        found = open_source(recipe.data.train, recipe.data.one_part).num_samples if recipe.data.train else 64
        images = max(4, min(64, found))
    images = images // 4 * 4
    if images < 4:
        raise UserError("--images: must be 4 or more")
    log.info("draws %d augmented images of %s", images, recipe.data.train)
    device = pick_device(recipe.run.device)
    try:
        opened = open_train_loader(replace(recipe, run=replace(recipe.run, batch=images)), device)
    except UserError as error:
        raise UserError(str(error).replace("run.batch:", "--images:", 1)) from None
    with opened as loader:
        mixed = Augment(recipe.augment, recipe.run.seed).to(device)(next(iter(loader.epoch(0))))
        contact_sheet(mixed, out, recipe.augment, [class_in_words(name) for name in loader.source.class_names or ()])
