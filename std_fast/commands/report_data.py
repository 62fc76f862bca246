"""The data of a report: the records of runs, read from their folders, and their predictions."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from pipelines.augment.device import Augment
from pipelines.errors import UserError, printable
from pipelines.untrusted import read_json
from std_fast.config.recipe import Recipe, read_saved
from std_fast.method.student import predict
from std_fast.runtime.checkpoint import is_checkpoint
from std_fast.runtime.metrics import read_jsonl
from std_fast.teachers.classes import DataClasses, class_in_words
from std_fast.teachers.teacher import autocast
from std_fast.training.build import open_val_loader, pick_device, precision_of
from std_fast.training.evaluate import trained_student

Record = dict[str, Any]

# Okabe and Ito's colours, which most colour-blind people can distinguish
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")


@dataclass(frozen=True)
class RunData:
    """A run as the report shows it."""

    model: Path
    """its folder, or the checkpoint whose predictions are shown"""
    name: str
    colour: str
    recipe: Recipe
    lines: list[Record]
    """of the log"""
    evals: list[Record]
    summary: Record
    """empty of a run that is not finished"""

    def last(self, key: str) -> Any:
        """The last value of a metric; None if there is none."""
        return next((record[key] for record in reversed(self.lines + self.evals) if key in record), None)

    @property
    def seconds(self) -> dict[str, float]:
        """By part of the ledger."""
        found = self.summary.get("seconds") or self.last("seconds")
        return {k: float(v) for k, v in found.items() if number(v)} if isinstance(found, dict) else {}


def number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """Raises UserError for a folder that holds no run."""
    runs: list[RunData] = []
    for i, folder in enumerate(folders):
        model, folder = folder, folder.absolute().parents[1] if is_checkpoint(folder) else folder
        recipe, found = read_saved(folder), folder / "summary.json"
        try:
            summary = read_json(found) if found.is_file() else {}
        except (OSError, ValueError) as error:
            raise UserError(f"{found}: cannot be read ({error}); restore or remove it") from None
        records = [r for r in read_jsonl(folder / "metrics.jsonl") if isinstance(r, dict) and number(r.get("step"))]
        name = printable(folder.resolve().name)
        if name in (other.name for other in runs):
            name = printable(str(folder))
        kinds = {kind: [r for r in records if r.get("kind") == kind] for kind in ("train", "eval")}
        summary = summary if isinstance(summary, dict) else {}
        runs.append(RunData(model, name, COLOURS[i % len(COLOURS)], recipe, kinds["train"], kinds["eval"], summary))
    return runs


def points(records: list[Record], x: str, y: str) -> tuple[list[float], list[float]]:
    """Both values of the records that have both."""
    pairs = [(r[x], r[y]) for r in records if number(r.get(x)) and number(r.get(y))]
    return [a for a, _ in pairs], [b for _, b in pairs]


@dataclass(frozen=True)
class Sample:
    """A validation image and a run's prediction for it."""

    png: bytes
    truth: str
    guess: str
    confidence: float


@torch.no_grad()
def predictions(run: RunData, count: int) -> list[Sample]:
    """Predictions by the run's model for `count` images, spread evenly over its validation data.

    Raises:
        UserError: the run has no complete checkpoint, or its validation data is not there.
    """
    from PIL import Image

    recipe, student, _, class_names = trained_student(run.model)
    if not recipe.data.val:
        raise UserError("its recipe names no data.val")
    data = replace(recipe.data, threads=1)
    recipe = replace(recipe, data=data, run=replace(recipe.run, eval_batch=max(4, min(64, recipe.run.batch))))
    device = pick_device(recipe.run.device)
    loader = open_val_loader(recipe, device, classes=DataClasses.named(student.num_classes, class_names))
    assert loader is not None
    with loader:
        student.to(device)
        normalise = Augment(recipe.augment, recipe.run.seed).to(device).normalise_only
        cast = functools.partial(autocast, device, precision_of(recipe.run.precision, device))
        known = loader.source.class_names or [str(i) for i in range(student.num_classes)]
        names = [class_in_words(name) for name in known]
        total, batch = loader.source.num_samples, loader.spec.global_batch
        wanted = sorted({i * total // count for i in range(min(count, total))})
        samples = []
        for step in sorted({place // batch for place in wanted}):
            batches = loader.epoch(0, step)
            one = next(batches)
            batches.close()
            with cast():
                shares = predict(student.outputs(normalise(one.images)), recipe.distill.predict).float().softmax(-1)
            best, guesses = (values.cpu() for values in shares.max(-1))
            for row in (place - step * batch for place in wanted if place // batch == step):
                if one.labels[row] < 0:  # a corrupt image
                    continue
                buffer = BytesIO()
                Image.fromarray(one.images[row].permute(1, 2, 0).cpu().numpy()).save(buffer, format="png")
                truth, guess = int(one.labels[row]), int(guesses[row])
                samples.append(Sample(buffer.getvalue(), names[truth], names[guess], float(best[row])))
    return samples
