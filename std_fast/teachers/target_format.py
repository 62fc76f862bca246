"""The files of a target cache.

    targets.json          the format, the fingerprint of everything that the targets depend on, and their shape
    epoch-00003.targets   little-endian uint16 [N, M, W], then 16 bytes of BLAKE2b over header, epoch and content
    .epoch-00004.*.partial   an epoch that is being written; it gets its name when it is complete

W words of a teacher and a position: label + 1 (so that a place never written reads as 0), confidence (the bits of a
float16), and for soft labels k probabilities (float16) and their k classes. With hard labels that is 4 bytes.

Shapes: N positions of an epoch, B batch, M teachers, W words.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.errors import UserError
from pipelines.untrusted import read_json
from std_fast.config.legacy import cache_file
from std_fast.config.recipe import Distill
from std_fast.method.losses import TeacherTargets

FORMAT = 1
MOST_CLASSES = 65535  # label + 1 has 16 bits
DIGEST_BYTES = 16


def bytes_per_epoch(samples: int, teachers: int, top_k: int = 0) -> int:
    """Size of one epoch's file."""
    return samples * teachers * (2 + 2 * top_k) * 2 + DIGEST_BYTES


def pack(targets: TeacherTargets) -> Tensor:
    """Targets of a batch -> their words, uint16 in the bits of int16 `[B, M, W]`, on the same device."""
    assert targets.confidence is not None
    words = [(targets.labels + 1)[..., None].to(torch.int16), targets.confidence[..., None].view(torch.int16)]
    if targets.top_probs is not None and targets.top_classes is not None:
        words += [targets.top_probs.contiguous().view(torch.int16), targets.top_classes.to(torch.int16)]
    return torch.cat(words, -1)


def unpack(words_BMW: Tensor, soft: bool) -> TeacherTargets:
    """The inverse of `pack`; without `soft` the distribution is left out."""
    labels = (words_BMW[..., 0].long() & 0xFFFF) - 1
    confidence = words_BMW[..., 1].contiguous().view(torch.float16)
    if not soft:
        return TeacherTargets(labels, confidence)
    probs, classes = words_BMW[..., 2:].chunk(2, -1)
    return TeacherTargets(labels, confidence, None, probs.contiguous().view(torch.float16), classes.long() & 0xFFFF)


@dataclass(frozen=True)
class Header:
    """The content of `targets.json`."""

    fingerprint: dict[str, Any]
    classes: int
    teachers: int
    top_k: int
    """probabilities stored of each teacher; 0 for hard labels"""

    @property
    def words(self) -> int:
        return 2 + 2 * self.top_k

    @property
    def row_bytes(self) -> int:
        return 2 * self.teachers * self.words

    def digest(self, epoch: int) -> hashlib.blake2b:
        """Begun with all but the content, so that a file of another cache or epoch is noticed."""
        about = json.dumps([FORMAT, self.fingerprint, self.classes, self.teachers, self.top_k, epoch], sort_keys=True)
        return hashlib.blake2b(about.encode(), digest_size=DIGEST_BYTES)


def epoch_path(folder: Path, epoch: int) -> Path:
    """The file of an epoch in a cache's folder."""
    return cache_file(folder / f"epoch-{epoch:05d}.targets")


def header_for(distill: Distill, values: dict[str, Any]) -> Header:
    """The header of a new cache with the fingerprint `values`.

    Raises:
        UserError: too many classes, or weights of a teacher that are not there.
    """
    classes = values["classes"]
    if classes > MOST_CLASSES:
        raise UserError(
            f"distill.target_cache: the data has {classes} classes, stored targets hold {MOST_CLASSES}; leave it out"
        )
    for i, teacher in enumerate(distill.teachers):
        if values[f"distill.teachers.{i}.weights"] is None:
            raise UserError(
                f"distill.teachers.{i}.weights: {teacher.weights} is not there, and no targets are stored yet"
            )
    return Header(values, classes, len(distill.teachers), min(distill.top_k, classes - 1))


def read_header(folder: Path) -> Header:
    """UserError when it is missing, damaged, or of another format."""
    path = cache_file(folder / "targets.json")
    fix = "give another folder, or remove it and run `std-fast teach`"
    try:
        data = read_json(path)
        format_found = data["format"]
        header = Header(data["fingerprint"], data["classes"], data["teachers"], data["top_k"])
        numbers = (header.classes, header.teachers, header.top_k)
        sound = isinstance(header.fingerprint, dict) and all(type(n) is int and 0 <= n <= MOST_CLASSES for n in numbers)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no header of stored targets ({type(error).__name__}); {fix}") from None
    if format_found != FORMAT:
        raise UserError(f"{path}: format {format_found!r}, this version reads {FORMAT}; {fix}")
    if not (sound and header.teachers >= 1 and header.classes >= 1 and header.top_k < header.classes):
        raise UserError(f"{path}: is damaged: sizes that cannot be; {fix}")
    return header


def fault_of(words: np.ndarray, classes: int) -> str:
    """What a valid file never holds (an index out of range, a value that is not finite); empty if all is well."""
    labels, k = words[..., 0], (words.shape[2] - 2) // 2
    if not labels.all():
        return "positions without a target"
    numbers = np.concatenate([words[..., 1:2], words[..., 2 : 2 + k]], -1).astype(np.uint16).view(np.float16)
    if labels.max() > classes or (k and words[..., 2 + k :].max() >= classes):
        return f"classes beyond the {classes} of the data"
    return "" if np.isfinite(numbers).all() else "numbers that are not finite"
