"""The manifest PATH.json that a conversion writes beside its beton: the parts of it that reading needs."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from typing import Any, NamedTuple

from pipelines.errors import UserError, printable
from pipelines.untrusted import read_json

CONVERT_AGAIN = "convert it again with `std-fast convert`"


class Manifest(NamedTuple):
    """What a beton's manifest says of its data."""

    classes: list[str]
    shard: tuple[int, int] | None
    """(i, n): the beton is part i of n, 0 <= i < n; None where the manifest lacks it"""
    conversion: Any
    """equal in all parts of one conversion: its id; where the manifest lacks it (version 0.1.0), its settings"""


def read_manifest(path: str) -> Manifest | None:
    """The manifest of the beton `path`, None where there is none. Raises UserError when it cannot be used."""
    file = path + ".json"
    if not os.path.exists(file):
        return None
    try:
        content = read_json(file)
        classes, shard = content["classes"], content.get("shard")
        conversion = content.get("conversion", {}).get("id") or content.get("settings")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"not a manifest ({type(error).__name__}: {error})"
        raise UserError(f"{printable(file)}: {what}; delete it, or {CONVERT_AGAIN}") from error
    names = printable_names(classes)
    if names is None:
        raise UserError(
            f"{printable(file)}: `classes` must be a list of different names; delete it, or {CONVERT_AGAIN}"
        )
    if shard is not None and not _is_shard(shard):
        raise UserError(f"{printable(file)}: `shard` must be [i, n], 0 <= i < n; delete it, or {CONVERT_AGAIN}")
    return Manifest(names, None if shard is None else tuple(shard), conversion)


def _is_shard(value: Any) -> bool:
    numbers = isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value)
    return numbers and 0 <= value[0] < value[1]


def normal(names: Iterable[str]) -> list[str]:
    """Names in the form in which they are compared: macOS stores an accent as a character of its own."""
    return [unicodedata.normalize("NFC", name) for name in names]


def printable_names(names: Any) -> list[str] | None:
    """Class names from elsewhere as text that can be shown; None unless it is a list of different names."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    shown = [printable(name) for name in names]
    return shown if len(set(shown)) == len(shown) else None
