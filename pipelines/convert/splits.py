"""Splits of a data set (train, val, test) in one source: by the names of its files and folders, or by a column.

Files of several splits are never converted together: one is chosen, or the source is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import replace

from pipelines.convert.trees import Entry, Tree
from pipelines.errors import UserError, printable
from pipelines.read.image_prep import ConvertSettings

SPLIT_NAMES = (
    "train", "training", "trainset", "val", "valid", "validation", "valset", "dev", "eval", "evaluation", "holdout",
    "test", "testing", "testset",
)  # fmt: skip
SPLIT_COLUMNS = ("split", "subset")
"""column of a label file or of parquet that holds the split of each image"""
OR_CLASSES = ", or --label-from tar if each tar is a class"
CONTAINERS = ("data", "default")
"""folders of the Hugging Face hub that are no splits: a repository's files, and a configuration's"""


def is_split(name: str) -> bool:
    return name.lower().removeprefix("partial-") in SPLIT_NAMES  # the hub's name for the first part of a large split


def split_of(path: str, anywhere: bool = False) -> str:
    """Split of a parquet file or tar: its folder, else the words before the number of a parquet file
    (train-00000-of-00014.parquet), and the one word of SPLIT_NAMES in the name of a tar if it comes last or a number
    ends the name (imagenet1k-train-0000.tar, but not test-tube.tar); "" where these do not tell.

    Args:
        anywhere: of tars that are no classes, the one word anywhere in the name (train_images.tar).
    """
    folder, _, name = path.rpartition("/")
    folder = folder.rpartition("/")[2]
    if folder and folder not in CONTAINERS:
        return folder
    stem, ending = os.path.splitext(name.lower())
    words = [word for word in re.split(r"[-_.\s\d]+", stem) if word]
    found = {word for word in words if word in SPLIT_NAMES}
    if ending == ".parquet":
        first = re.split(r"^\d+|[-_.]\d|\.parquet$", name)[0]
        return first if is_split(first) or len(found) != 1 else found.pop()
    certain = len(found) == 1 and (anywhere or stem[-1].isdigit() or words[-1] in found)
    return found.pop() if certain else ""


def choose_split(where: str, entries: list[Entry], settings: ConvertSettings) -> tuple[list[Entry], ConvertSettings]:
    """Files of the wanted split, all of them tars or parquet. For tars, the settings' `split` is None where names have
    decided it. Raises UserError where there are several and none is chosen, or not the one asked for. Tars of which
    some are called by a split may all be classes, which their contents show: see `refuse_mixed`."""
    are_tars, asked = entries[0].name.lower().endswith(".tar"), settings.split
    splits = {entry.name: split_of(entry.name) for entry in entries}
    loosely = {entry.name: split_of(entry.name, anywhere=True) for entry in entries}
    if asked is not None and all(loosely.values()):  # so none is a class
        splits = loosely
    chosen = [entry for entry in entries if splits[entry.name] == asked]
    if chosen:
        return chosen, replace(settings, split=None) if are_tars else settings
    found = {split for split in splits.values() if split or not are_tars}
    are_classes = are_tars and asked is None and settings.label_from == "tar"
    names_decide = are_tars and asked is not None and settings.labels is None
    if (len(found) > 1 and not are_classes) or (found and names_decide):
        raise _several_splits(where, splits, asked, OR_CLASSES if are_tars else "")
    if names_decide:
        raise UserError(f"--split {asked!r}: no tar in {where} is called so; leave it out")
    return entries, settings


def refuse_mixed(where: str, tars: list[Entry]) -> None:
    """Raises UserError where some tars that are no classes are called by a split and others are not."""
    splits = {entry.name: split_of(entry.name, anywhere=True) for entry in tars}
    if len(set(splits.values())) > 1:
        raise _several_splits(where, splits, None, OR_CLASSES)


def _several_splits(where: str, splits: dict[str, str], asked: str | None, otherwise: str) -> UserError:
    """The error for files of several splits, or of another than asked; splits: by the file's name."""
    example = {split: printable(name) for name, split in splits.items()}
    rest = example.pop("", None)
    if rest is None:
        return wrong_split(where, example, asked, otherwise)
    choices = " or ".join(map(printable, sorted(example)))
    given = "" if asked is None else f"--split {asked!r}: "
    named = ", ".join(f"{printable(split)} ({example[split]})" for split in sorted(example))
    return UserError(
        f"{given}{where}: holds {named} and files without a split in their names ({rest}); choose {choices} with "
        f"--split, or move the files of each split to a folder of their own{otherwise}"
    )


def are_several(splits: Collection[str]) -> bool:
    """Whether the values of a column are splits, and more than one."""
    return len(splits) > 1 and any(map(is_split, splits))


def wrong_split(where: str, found: Collection[str], asked: str | None, otherwise: str = "") -> UserError:
    names = ", ".join(map(printable, sorted(found)))
    if asked is not None:
        return UserError(f"--split {asked!r}: {where} holds {names}; choose one of them")
    return UserError(f"{where}: holds {names}; choose one with --split{otherwise}")


def split_column(columns: Sequence[str], label: str) -> str | None:
    """The column that holds the splits, if there is one; label: the one that holds the labels."""
    return next((name for name in columns if name.lower() in SPLIT_COLUMNS and name != label), None)


def in_split_folders(tree: Tree, entries: list[Entry], prefix: str = "") -> list[Entry]:
    """Files that lie in folders as the Hugging Face hub has them: data/, SPLIT/, default/SPLIT/; under their paths from
    the root. entries: of the folder `prefix`."""
    names = [entry.name for entry in entries if entry.is_folder and not entry.name.startswith(".")]
    if not any(map(is_split, names)):
        names = [name for name in names if name == "data" or names == ["default"]]
    found: list[Entry] = []
    for name in names:
        inner = tree.children(prefix + name)
        visible = [entry for entry in inner if not (entry.is_folder or entry.name.startswith("."))]
        found += [entry._replace(name=f"{prefix}{name}/{entry.name}") for entry in visible]
        if name in CONTAINERS and not prefix:
            found += in_split_folders(tree, inner, f"{name}/")
    return found
