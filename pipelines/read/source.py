"""Opens datasets on disk: a beton, several betons of one conversion, or an image folder."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipelines.errors import UserError, printable
from pipelines.read.base import Bytes, Integers, Source
from pipelines.read.beton import BetonSource
from pipelines.read.folder import FolderSource
from pipelines.read.remote import cached, is_url

log = logging.getLogger("std_fast")


def open_source(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], one_part: bool = False) -> Source:
    """Opens a beton, an image folder (SRC/CLASS/*), or several betons as one dataset.

    With `one_part`, a beton may be one of several parts of a conversion, opened without the others.

    Several betons are a sequence of paths, or one path with *, ? or [] in it. They follow each other in the given
    order, the matches of a pattern in the order of their names. A URL is that of a beton which `std-fast warm` has
    copied into the cache; with {0..3} in it, of several.
    Raises UserError when nothing exists there, it is neither kind, a class is empty, a beton is malformed, or several
    betons are not all parts of one conversion.
    """
    if isinstance(path, (str, os.PathLike)):
        only = os.fspath(path)
        if is_url(only):
            return open_source(cached(only), one_part)
        if os.path.isdir(only):
            return FolderSource(only)
        if not os.path.exists(only) and os.path.exists(only.partition(",")[0]):
            raise UserError(f"{printable(only)}: no such file; name several betons by one pattern with *, ? or [ab]")
        if os.path.exists(only) or not glob.has_magic(only):
            return _complete(only, one_part)
        paths = sorted(p for p in glob.glob(only) if not p.endswith(".json"))
        folder = next(filter(os.path.isdir, paths), None)
        if folder is not None:
            raise UserError(
                f"{printable(only)}: matches the folder {printable(folder)}; a pattern names betons. Give one image "
                "folder (SRC/CLASS/*) by its own name"
            )
        if not paths:
            raise UserError(f"{printable(only)}: no file matches this pattern; give betons made by `std-fast convert`")
    else:
        given = [os.fspath(p) for p in path]
        paths = [file for p in given for file in (cached(p) if is_url(p) else [p])]
        if not paths:
            raise UserError("data: the list of betons is empty; give at least one path")
    if len(paths) > 1:
        return JoinedSource([BetonSource(p) for p in paths])
    return _complete(paths[0], one_part)


def _complete(path: str, one_part: bool) -> BetonSource:
    """A beton. UserError where it is one shard of several, unless it is asked for."""
    beton = BetonSource(path)
    if one_part or beton.shard is None or beton.shard[1] == 1:
        return beton
    i, n = beton.shard
    name = re.sub(r"\d+(?=\D*$)", "*", os.path.basename(path))
    pattern = os.path.join(os.path.dirname(path), name)
    found = [file for file in glob.glob(pattern) if not file.endswith(".json")]
    way = f"give all {n}: {pattern!r}" if len(found) == n else f"give all {n} by a pattern with *"
    raise UserError(
        f"{printable(path)}: shard {i}/{n} of its conversion, without the others; {printable(way)}, or set "
        "data.one_part true to use it alone"
    )


class JoinedSource:
    """All betons of one conversion, one after the other. Raises UserError unless they are its parts, each once."""

    kind = "beton"

    def __init__(self, parts: list[BetonSource]) -> None:
        _check_parts(parts)
        self.parts = parts
        self.path = f"{parts[0].path} and {len(parts) - 1} more"
        self._starts = np.cumsum([0] + [part.num_samples for part in parts])
        self.num_samples = int(self._starts[-1])
        self.labels = np.concatenate([part.labels for part in parts])
        self.class_names = parts[0].class_names
        self.num_classes = max(part.num_classes for part in parts)
        self.heights, self.widths, self.jpeg, self.byte_sizes = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("heights", "widths", "jpeg", "byte_sizes")
        )

    def _part(self, index: int) -> tuple[BetonSource, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[number], index - int(self._starts[number])

    def sizes(self, indices: npt.NDArray[np.integer]) -> tuple[Integers, Integers]:
        return self.heights[indices].astype(np.int64), self.widths[indices].astype(np.int64)

    def read(self, index: int) -> Bytes:
        part, local = self._part(index)
        return part.read(local)

    def is_jpeg(self, index: int) -> bool:
        return bool(self.jpeg[index])

    def name(self, index: int) -> str:
        part, local = self._part(index)
        return part.name(local)

    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join(part.fingerprint() for part in self.parts).encode()).hexdigest()


def _check_parts(parts: list[BetonSource]) -> None:
    """Raises UserError unless the betons are different files with the same classes and, where their manifests name
    their parts, all parts of one conversion, once each."""
    first, seen = parts[0], set()
    for part in parts:
        if part.class_names != first.class_names:
            raise UserError(
                f"{printable(part.path)}: other classes than {printable(first.path)}; convert both from one dataset "
                "with `std-fast convert --shard i/n`, and keep the manifests (.json) beside them"
            )
        if os.path.realpath(part.path) in seen:
            raise UserError(f"{printable(part.path)}: given twice; name each beton once")
        seen.add(os.path.realpath(part.path))
    shards = [part.shard for part in parts if part.shard is not None]
    if len(shards) == len(parts):
        _check_shards(parts, shards)
    elif shards:
        unknown = next(part for part in parts if part.shard is None)
        raise UserError(
            f"{printable(unknown.path)}: has no manifest (.json) that names its part of the conversion, as others "
            "have; put it beside the beton"
        )
    else:
        names = f"{printable(first.path)} and {len(parts) - 1} more"
        log.warning("%s: without manifests (.json), no check that every part of the dataset is given, once", names)


def _check_shards(parts: list[BetonSource], shards: list[tuple[int, int]]) -> None:
    """Raises UserError unless the betons are all shards (i, n) of one conversion, once each."""
    first, count = printable(parts[0].path), shards[0][1]
    owners: dict[int, str] = {}
    for part, (i, n) in zip(parts, shards, strict=True):
        path = printable(part.path)
        if n != count or part.conversion != parts[0].conversion:
            raise UserError(
                f"{path}: shard {i}/{n} of another conversion than {first} (shard {shards[0][0]}/{count}); give the "
                "shards of one conversion"
            )
        if i in owners:
            raise UserError(f"{path}: shard {i}/{n}, and so is {owners[i]}; give each shard once")
        owners[i] = path
    missing = [i for i in range(count) if i not in owners]
    if missing:
        raise UserError(f"{first}: shard {missing[0]}/{count} of its conversion is not given; give all {count} shards")
