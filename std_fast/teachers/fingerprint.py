"""What stored teacher targets depend on: the fingerprint in a cache's header, and the check against a run's own."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.read.base import sampled_digest
from pipelines.read.batch import Loader
from std_fast.config.legacy import CACHE_DEFAULTS
from std_fast.config.recipe import Recipe
from std_fast.config.schema import to_dict
from std_fast.runtime.checkpoint import digest
from std_fast.teachers.classes import class_names
from std_fast.teachers.classifiers import read_run, timm_config
from std_fast.teachers.target_format import DIGEST_BYTES


def fingerprint(recipe: Recipe, loader: Loader, precision: str) -> dict[str, Any]:
    """Everything that decides a target, under the names of the recipe's fields; plain JSON values.

    Not among them: the batch (targets are the same in every batch, up to rounding where kernels depend on its size),
    how many epochs there are and how they are cycled (`distill.views`: an epoch shows what it shows), the number of
    processes, torch.compile (rounding again), and what only the student and its training use.

    Args:
        recipe: all of it, since most sections decide something of a target.
        precision: the teachers' precision, resolved.
    """
    d, spec = recipe.distill, loader.spec
    values: dict[str, Any] = {
        "data.train": loader.source.fingerprint(),
        "data.train.images": sampled_digest(loader.source),
        "data.image_size": spec.image_size,
        "data.backend": loader.backend,  # each has pixels of its own
        "data.resample": spec.resample,
        "data.aug_repeats": spec.aug_repeats,
        **_flat("data.crop", to_dict(spec.crop)),
        **_flat("augment", to_dict(recipe.augment)),
        "run.seed": recipe.run.seed,
        "run.device": spec.device.partition(":")[0],  # which decodes, augments and rounds in its own way
        "run.precision": precision,
        "distill.labels": d.labels,
        "distill.temperature": d.temperature,
        "distill.top_k": d.top_k,
        "classes": loader.num_classes,
        "distill.teachers": len(d.teachers),
    }
    for i, teacher in enumerate(d.teachers):
        digest = weights_digest(teacher.weights, teacher.name)
        names = names_digest(teacher.classes)
        values |= _flat(f"distill.teachers.{i}", to_dict(teacher) | {"weights": digest, "classes": names})
    return values


def names_digest(classes: str) -> str:
    """Identity of a teacher's `classes`: digest of the names in a file, or the name of a list as it is."""
    if not Path(classes).is_file():
        return classes
    return hashlib.blake2b("\n".join(class_names(classes, "")).encode(), digest_size=DIGEST_BYTES).hexdigest()


def _flat(prefix: str, values: dict) -> dict[str, Any]:
    return {f"{prefix}.{name}": value for name, value in values.items()}


def weights_digest(weights: str, name: str) -> str | None:
    """Identity of a teacher's weights: digest of the file, of a Hugging Face folder's files, or of a run's newest
    weights and what belongs to them; for timm's downloads the name of the source. None where they are not there.
    """
    if not weights or (weights == "pretrained" and not name):  # a mistake that building the model reports
        return None
    if weights == "pretrained":
        config = timm_config(name)
        return f"timm {config.hf_hub_id or config.url}"
    path = Path(weights.removeprefix("local-dir:"))
    if (path / "recipe.yaml").is_file():
        run = read_run(path)
        r = run.recipe
        about = [to_dict(r.student), list(r.augment.mean), list(r.augment.std), r.data.image_size]
        return digest(run.state, about)
    h = hashlib.blake2b(digest_size=DIGEST_BYTES)
    kinds = (".json", ".safetensors", ".bin", ".pth", ".pt")
    files = [path] if path.is_file() else sorted(f for f in path.glob("*") if f.suffix in kinds and f.is_file())
    for file in files:
        try:
            with open(file, "rb") as stream:
                while chunk := stream.read(1 << 24):
                    h.update(chunk)
        except OSError as error:
            raise UserError(
                f"{file}: cannot be read ({error.strerror}); restore it or change its permissions"
            ) from None
    return h.hexdigest() if files else None


def check_same(folder: Path, stored: dict[str, Any], ours: dict[str, Any]) -> None:
    """UserError naming the first field in which this run differs from the one that stored the targets."""
    hard = ours["distill.labels"] == "hard"  # which a cache of soft labels has too
    soft_only = {"distill.labels", "distill.temperature", "distill.top_k"} if hard else set()
    for name in sorted({*stored, *ours} - soft_only - {"distill.views"}):  # earlier versions had the last one
        default = CACHE_DEFAULTS.get(name.rpartition(".")[2])
        there, here = stored.get(name, default), ours.get(name, default)
        unknown = {"weights": here, "images": there}.get(name.rpartition(".")[2], "") is None
        if there == here or unknown:  # weights that are not on this machine; caches of earlier versions have no images
            continue
        name = name.removesuffix(".images")
        what = {"data.train": "other data", "classes": "other classes"}.get(name)
        if name.endswith(".weights"):
            what = "other weights"
        was, now = (what, "those") if what else (repr(there), repr(here))
        raise UserError(
            f"{name}: the targets in {folder} are of {was}, this run has {now}; set it back, or give "
            "distill.target_cache another folder"
        )
