"""Names that earlier versions wrote into files, and what they are called now; the only module that knows them.

Version 0.1.0: recipe fields, checkpoint metadata and tensors, the files of a target cache.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

from pipelines.errors import UserError
from std_fast.config.schema import plain_value

T = TypeVar("T")

FIELDS = {"distill.answers": "distill.target_cache"}
"""dotted names of recipe fields"""
OLDER = ", or use std-fast 0.1.0"
REMOVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "run.cuda_graphs": (("off", False), OLDER),
    "run.compress_gradients": ((False,), OLDER),
    "augment.erase_scale": (([0.02, 1 / 3],), OLDER),
    "distill.loss": (("kl",), ": KL (distill.labels: soft) and hard labels remain"),
}
"""dotted names of recipe fields that are gone, each with the values that change nothing, and what there is instead"""
META = {"owes_evaluation": "evaluation_pending", "aside_step": "snapshot_step"}
"""keys of a checkpoint's metadata"""
CACHE_HEADER, CACHE_SUFFIX = "answers.json", ".answers"
"""a target cache's header, and the suffix of its epochs"""
CACHE_DEFAULTS = {
    "precision": "auto", "classes": "", "policy": "randaugment", "aug_repeats": 1, "erase_scale": [0.02, 1 / 3],
}  # fmt: skip
"""fields that the headers of target caches lacked, or alone had, as they were then"""


def upgrade_recipe(data: dict[str, Any]) -> dict[str, Any]:
    """A recipe's plain values with today's field names; where a recipe has both names, today's counts.

    With teachers but neither a base nor a mode, distill.mode is std, as it was by default.

    Raises:
        UserError: a field that is gone has another value.
    """
    for old, new in FIELDS.items():
        section, _, key = old.partition(".")
        values = data.get(section)
        if isinstance(values, dict) and key in values:
            values = dict(values)
            values.setdefault(new.partition(".")[2], values.pop(key))
            data = {**data, section: values}
    data = without_removed(data)
    distill = data.get("distill")
    if "base" not in data and isinstance(distill, dict) and distill.get("teachers"):
        data = {**data, "distill": {"mode": "std", **distill}}
    return data


def without_removed(data: dict[str, Any]) -> dict[str, Any]:
    """A recipe's plain values without the fields that are gone. UserError where one would change something."""
    for old, (defaults, instead) in REMOVED.items():
        section, _, key = old.partition(".")
        values = data.get(section)
        if isinstance(values, dict) and key in values:
            if plain_value(values[key]) not in defaults:
                raise UserError(f"{old}: {values[key]!r} was removed; leave {old} out{instead}")
            data = {**data, section: {name: value for name, value in values.items() if name != key}}
    return data


def upgrade_meta(meta: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's metadata with today's keys."""
    return {META.get(key, key): value for key, value in meta.items()}


def upgrade_tensors(tensors: dict[str, T]) -> dict[str, T]:
    """A checkpoint's tensors under today's names."""
    return {re.sub(r"^aside\.", "snapshot.", name): tensor for name, tensor in tensors.items()}


def cache_file(path: Path) -> Path:
    """`path`, or the file of an earlier version's target cache that stands in its place."""
    old = path.with_name(CACHE_HEADER) if path.suffix == ".json" else path.with_suffix(CACHE_SUFFIX)
    return old if old.is_file() and not path.is_file() else path
