"""The study's data sets and the predictions of its runs; see evidence.py."""

from __future__ import annotations

import base64
import functools
import json
import zlib
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.augment.device import Augment
from pipelines.convert.job import convert
from pipelines.errors import UserError
from pipelines.files import write_atomic
from std_fast.method.student import predict
from std_fast.runtime.flops import count_macs
from std_fast.teachers.classes import DataClasses
from std_fast.teachers.classifiers import load_weights, read_run
from std_fast.teachers.teacher import autocast
from std_fast.training.build import build_student, open_val_loader, pick_device, precision_of

BETONS = ("train", "held-out", "val")
EVERY = 10  # each tenth training image of a class is held out, by its name
HEADS = ("class", "distill", "mean")


def prepare(source: Path, folder: Path) -> None:
    """Converts SOURCE/train, without and with only its images held out, and SOURCE/val, unless that is done.

    Raises:
        UserError: SOURCE holds no such folders.
    """
    if all((folder / f"{name}.beton").is_file() for name in BETONS):
        return
    for part in ("train", "val"):
        if not (source / part).is_dir():
            raise UserError(f"--data: {source} has no folder {part}; give the folder of Imagenette")
    for split in ("train", "held-out"):
        for category in sorted((source / "train").iterdir()):
            (folder / split / category.name).mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(sorted(category.iterdir())):
                link = folder / split / category.name / image.name
                if (i % EVERY == 0) == (split == "held-out") and not link.is_symlink():
                    link.symlink_to(image.resolve())
    for name in BETONS:
        if not (folder / f"{name}.beton").is_file():
            convert(str(source / "val" if name == "val" else folder / name), str(folder / f"{name}.beton"))


@torch.no_grad()
def store_predictions(run: Path, beton: Path) -> None:
    """Writes predictions.json into a run's folder: what each head predicts for each image of `beton`, in its order."""
    stored = read_run(run)
    recipe = stored.recipe
    device = pick_device(recipe.run.device)
    student = build_student(replace(recipe, student=replace(recipe.student, weights="")), stored.num_classes)
    load_weights(student, stored.state, str(run))
    macs = count_macs(student, recipe.data.image_size)
    student.to(device).eval()
    augment = Augment(recipe.augment, recipe.run.seed).to(device)
    cast = functools.partial(autocast, device, precision_of(recipe.run.precision, device))
    loader = open_val_loader(
        recipe, device, str(beton), classes=DataClasses.named(stored.num_classes, stored.class_names)
    )
    assert loader is not None
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("labels", *HEADS)}
    with loader, closing(loader.epoch(0)) as batches:
        for batch in batches:
            with cast():
                out = student.outputs(augment.normalise_only(batch.images))
            valid = batch.labels >= 0
            columns = {head: predict(out, head).argmax(-1) for head in HEADS} | {"labels": batch.labels}  # type: ignore[arg-type]
            for name, column in columns.items():
                found[name].append(column[valid].cpu().numpy().astype(np.uint8))
        if sum(map(len, found["labels"])) != loader.source.num_samples:
            raise RuntimeError(f"{beton}: predictions of {sum(map(len, found['labels']))} images")
    heads = found if student.head_teacher else {name: found[name] for name in ("labels", "class")}
    text: dict[str, Any] = {name: pack(np.concatenate(parts)) for name, parts in heads.items()}
    write_atomic(run / "predictions.json", json.dumps(text | {"macs": macs}))


def pack(values: np.ndarray) -> str:
    """Bytes as text: deflate, then base64."""
    return base64.b64encode(zlib.compress(values.astype(np.uint8).tobytes(), 9)).decode("ascii")


def unpack(text: str) -> np.ndarray:
    """The inverse of `pack`."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
