"""Class probabilities of image files, by a run or an exported model, prepared exactly as in its evaluation.

The images go through the loader of evaluation: the same decoder, crop, resizing and normalisation.
Shapes: B batch, K classes, S side of the images in pixels.
"""

from __future__ import annotations

import functools
import glob
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

import pipelines
from pipelines.augment.device import Augment
from pipelines.errors import DataError, UserError, printable
from pipelines.read.batch import Loader
from pipelines.read.folder import EXTENSIONS, NOT_CLASSES, FileSource
from pipelines.read.remote import is_url
from std_fast.config.recipe import Recipe, TeacherSpec
from std_fast.config.schema import from_dict
from std_fast.method.student import Student
from std_fast.runtime.checkpoint import is_checkpoint
from std_fast.teachers.classes import DataClasses, wordnet_words
from std_fast.teachers.hub_folder import is_hub_folder, read_hub_folder
from std_fast.teachers.teacher import autocast, from_folder
from std_fast.training.build import open_val_loader, pick_device, precision_of, val_spec
from std_fast.training.evaluate import evaluate_loader, for_evaluation, trained_student

log = logging.getLogger("std_fast")

BATCH = 64  # of an exported model, which does not say in which batches it was evaluated
RESAMPLE = {"bilinear": "bilinear", "bicubic": "bicubic", "box": "area"}
"""timm's interpolation -> data.eval_resample"""


class Classifier(NamedTuple):
    """A trained model, and how it was evaluated."""

    recipe: Recipe  # what decides how images are prepared: data, augment and run
    model: nn.Module  # normalised images [B, 3, S, S] -> logits [B, K]
    class_names: list[str] | None


class Guess(NamedTuple):
    """One class of one image."""

    label: int
    name: str
    words: str  # of a WordNet id, else empty
    probability: float


def predict_images(
    folder: Path, images: Sequence[str], top: int = 5, backend: Any = ""
) -> Iterator[tuple[str, list[Guess]]]:
    """The `top` most probable classes of each image, best first.

    Args:
        folder: of a run (its newest weights, the moving average where it has one), one of its checkpoints, or a folder
            with a config.json as `std-fast export`, timm and the Hugging Face hub write it.
        images: files, folders, which are searched for images, and patterns.
        backend: of the loader, instead of the run's.

    Yields:
        The path of an image and its classes; no class for a file that is no image, which the log names.

    Raises:
        UserError: `folder` holds no model, or `images` names none.
    """
    if top < 1:
        raise UserError(f"--top: {top} must be 1 or more")
    recipe, model, names = open_classifier(folder)
    good, bad = readable(list_images(images))
    yield from ((path, []) for path in bad)
    if not good:
        return
    device = pick_device(recipe.run.device)
    precision, model = precision_of(recipe.run.precision, device), model.to(device)
    normalise = Augment(recipe.augment, recipe.run.seed).to(device).normalise_only
    with open_files(good, recipe, str(device), backend) as loader:
        with closing(loader.epoch(0)) as batches:
            for batch in batches:
                with torch.no_grad(), autocast(device, precision):
                    logits = model(normalise(batch.images)).float()
                best = logits.softmax(-1).topk(min(top, logits.shape[1]), dim=-1)
                labels, values = best.indices.tolist(), best.values.tolist()
                for row in np.flatnonzero(batch.indices >= 0).tolist():
                    pairs = zip(labels[row], values[row], strict=True)
                    yield good[batch.indices[row]], [named(label, value, names) for label, value in pairs]
        yield from ((good[index], []) for index in sorted(loader.corrupt))


def open_files(paths: list[str], recipe: Recipe, device: str, backend: str) -> Loader:
    """The images by the recipe's loader of evaluation. One that cannot be decoded is left out, and the log names it."""
    source, images = FileSource(paths), len(paths)
    spec = val_spec(recipe, source.path, device)
    spec = replace(spec, global_batch=min(spec.global_batch, images), on_corrupt="skip", corrupt_limit=images)
    return pipelines.open_loader(spec, backend or recipe.data.backend, source)


def named(label: int, probability: float, names: list[str] | None) -> Guess:
    name = names[label] if names and label < len(names) else str(label)
    return Guess(label, name, wordnet_words(name), probability)


# -- the images -------------------------------------------------------------------------------------------------------


def list_images(given: Sequence[str]) -> list[str]:
    """The files, those in folders by their endings, and the matches of patterns; each once, in the given order.

    Raises:
        UserError: a folder or pattern without images.
    """
    files: list[str] = []
    for name in given:
        if is_url(name):
            raise UserError(f"{name}: a URL, and images are read from files alone; fetch it and name the file")
        matches = [name]
        if not os.path.lexists(name) and glob.has_magic(name):
            matches = sorted(glob.glob(name, recursive=True))
        found = [_in_folder(match) if os.path.isdir(match) else [match] for match in matches]
        if not found or [] in found:
            where = matches[found.index([])] if found else name
            raise UserError(f"{where}: no image is there ({' '.join(EXTENSIONS)}); name images, folders or a pattern")
        files += itertools.chain(*found)
    return list(dict.fromkeys(files))


def _in_folder(folder: str) -> list[str]:
    """Image files in a folder and below it, by name; hidden ones are passed over, links to folders not followed."""
    found: list[str] = []
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not (name.startswith(".") or name.lower() in NOT_CLASSES))
        images = [name for name in files if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
        found += [os.path.join(where, name) for name in sorted(images)]
    return found


def readable(paths: list[str]) -> tuple[list[str], list[str]]:
    """The files whose header is that of an image, and the others, each named in the log."""
    source, good, bad = FileSource(paths), [], []
    for index, path in enumerate(paths):
        try:
            source.sizes(np.array([index]))
            good.append(path)
        except DataError as error:
            log.warning("%s", error)
            bad.append(path)
    return good, bad


# -- the model --------------------------------------------------------------------------------------------------------


def open_classifier(folder: Path) -> Classifier:
    """The model of a run or of an exported folder. UserError where there is none."""
    if is_checkpoint(folder) or (folder / "recipe.yaml").is_file():
        recipe, student, _, names = trained_student(folder)
        if recipe.run.device == "cuda":  # images can be predicted on another machine
            recipe = replace(recipe, run=replace(recipe.run, device="auto"))
        return Classifier(recipe, student, names)
    if is_hub_folder(folder):
        return exported(folder)
    found = "holds no model" if folder.exists() else "does not exist"
    raise UserError(f"{printable(str(folder))}: {found}; give a run's folder (recipe.yaml) or an export (config.json)")


def evaluate_export(folder: Path, data: str, overrides: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Accuracy of an exported model on `data`, as `evaluate_run` of its run; `loss`, `top1`, `top5` and `images`.

    Raises:
        UserError: there is no `data`, it cannot be read, or has a class that the model lacks.
    """
    if not data:
        raise UserError(f"{folder}: an export names no data; name it: std-fast eval {folder} DATA")
    recipe, model, names = exported(folder)
    recipe = for_evaluation(recipe, overrides)
    device = pick_device(recipe.run.device)
    classes = DataClasses.named(read_hub_folder(folder).num_classes, names)
    loader = open_val_loader(recipe, device, data, classes=classes, who="the export")
    assert loader is not None
    cast = functools.partial(autocast, device, precision_of(recipe.run.precision, device))
    return evaluate_loader(Student(model, classes.number), loader, recipe.augment, cast, "class")


def exported(folder: Path) -> Classifier:
    """The model of a folder with a config.json, as timm builds it."""
    hub, where = read_hub_folder(folder), f"{folder}/config.json"
    if hub.interpolation not in RESAMPLE or hub.crop_mode not in ("center", "squash"):
        raise UserError(
            f"{where}: interpolation {hub.interpolation!r} with crop_mode {hub.crop_mode!r} is not known here; set "
            f"them to one of {', '.join(RESAMPLE)} and to center or squash"
        )
    center = {"kind": "center", "fraction": hub.crop_pct}
    data = {
        "image_size": hub.image_size or 224,
        "eval_crop": {"kind": "full"} if hub.crop_mode == "squash" else center,
        "eval_resample": RESAMPLE[hub.interpolation],
    }
    normalisation = {"mean": list(hub.mean or ()), "std": list(hub.std or ())} if hub.mean and hub.std else {}
    run = {"batch": BATCH, "precision": hub.precision}
    recipe = from_dict(Recipe, {"data": data, "augment": normalisation, "run": run})
    size = recipe.data.image_size
    found = from_folder(folder, TeacherSpec(weights=str(folder)), DataClasses(hub.num_classes), size, str(folder))
    return Classifier(recipe, found.model.eval().requires_grad_(False), hub.class_names)
