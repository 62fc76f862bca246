"""Labels and class names that lie in files of their own, and what a label is that is stored as text.

A label stored as text is a number where all labels of the source are numbers (`3` and `3.0` are the same), else all are
class names, numbered in the order of `classes` or, without it, in alphabetical order. A mixture is refused.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence

from pipelines.convert.devkit import devkit_labels, is_devkit
from pipelines.convert.listing import SOURCES, Builder, has_image_ending, in_order, read_text, refuse_without_zero
from pipelines.convert.splits import SPLIT_COLUMNS, are_several, split_column, wrong_split
from pipelines.errors import UserError, printable
from pipelines.read.image_prep import ConvertSettings
from pipelines.read.manifest import normal, printable_names

log = logging.getLogger("std_fast")

LABEL_COLUMNS = ("label", "labels", "cls", "class", "class_id", "class_name", "category", "target", "fine_label")
"""column of a label file or of parquet, or key of a JSON object, that holds the label"""
DELIMITERS = "\t,;"
_NUMBER = re.compile(r"[+-]?\d{1,15}(\.\d*)?([eE][+-]?\d{1,2})?")
_OTHER_BASE = re.compile(r"[+-]?0[xXoObB][\da-fA-F]+")
_BOXES = re.compile(r"(\S+)(\s+-?\d+(\.\d+)?){4}(\s+\S+(\s+-?\d+(\.\d+)?){4})*")
"""a label, four coordinates, and so on: Kaggle's ImageNet and Tiny ImageNet"""


def fixed_classes(settings: ConvertSettings) -> list[str] | None:
    """The class names that the user gave, if any."""
    return None if settings.classes is None else read_classes(settings.classes)


def read_classes(path: str) -> list[str]:
    """Class names from a manifest (JSON with `classes`), a JSON list, or lines of text. Raises UserError."""
    text = read_text(path)
    try:
        if text.lstrip().startswith("{"):
            found = json.loads(text)["classes"]
        elif text.lstrip().startswith("["):
            found = json.loads(text)
        else:
            lines = text.rstrip().splitlines()
            found = [line for line in lines if line.split()[:1] != ["#"]]  # `#1` may be a class
            if "" in map(str.strip, found):
                number = next(i for i, line in enumerate(lines, 1) if not line.strip())
                raise UserError(f"--classes {printable(path)}: line {number} is empty; name a class there or remove it")
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(
            f"--classes {printable(path)}: JSON without a list `classes`; give a beton's manifest"
        ) from None
    is_list = isinstance(found, list) and all(isinstance(name, str) for name in found)
    names = printable_names([name.strip() for name in found]) if is_list else None
    if not names or "" in names:
        raise UserError(f"--classes {printable(path)}: must hold different, non-empty names, one on each line")
    return names


def file_labels(
    names: list[str], settings: ConvertSettings, builder: Builder
) -> tuple[dict[str, int | str], list[str] | None]:
    """What `read_labels` finds in the settings' label file; images without a label become faults, those of another
    split are ignored. Raises UserError."""
    assert settings.labels is not None
    label_of, classes = read_labels(settings.labels, names, builder.fixed_classes, settings.label_key, settings.split)
    for name in names:
        if name not in label_of:
            builder.fault(name, f"has no label in {printable(settings.labels)}")
        elif label_of[name] is None:
            builder.listing.ignored.append(printable(name))
    return {name: label for name, label in label_of.items() if label is not None}, classes


def is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text.strip()) is not None


def parse_labels(texts: Sequence[str], classes: list[str] | None, where: str) -> list[int] | list[str]:
    """Labels that are stored as text, as class numbers or as class names; classes: the names that the user gave.

    Raises UserError, which begins with `where`, when some are numbers and others names, when a number is no integer, or
    when it is not certain whether they are numbers or names.
    """
    texts = [text.strip() for text in texts]
    numeric = [is_number(text) for text in texts]
    are_given = set(normal(classes or ())).issuperset(normal(texts))
    if texts and all(map(_OTHER_BASE.fullmatch, texts)) and not are_given:
        raise UserError(
            f"{where}: labels such as {printable(texts[0])} may be numbers or names; write decimal numbers, or give "
            "--classes that names all of them"
        )
    if not all(numeric):
        if any(numeric) and not are_given:
            number, name = texts[numeric.index(True)], texts[numeric.index(False)]
            raise UserError(
                f"{where}: some labels are numbers ({printable(number)}) and others names ({printable(name)}); write "
                "one kind, or give --classes that names all of them"
            )
        return texts
    broken = next((text for text in texts if not float(text).is_integer()), None)
    if broken is not None:
        raise UserError(f"{where}: label {printable(broken)} is no class number and no name; number classes from 0")
    numbers = [int(float(text)) for text in texts]
    if classes is not None and are_given:
        index = {name: i for i, name in enumerate(classes)}
        differs = next((text for text, number in zip(texts, numbers, strict=True) if index[text] != number), None)
        if differs is not None:
            raise UserError(
                f"{where}: label {printable(differs)} may be class number {int(float(differs))} or the class named "
                f"{printable(differs)!r}, number {index[differs]} of --classes; put its names in the order of numbers"
            )
    return numbers


class ImageNames:
    """Finds the image that a line of a label file means."""

    def __init__(self, names: Iterable[str]) -> None:
        """names: paths from the source's root."""
        self._by_base: dict[str, list[str]] = {}
        names = list(names)
        self._own = dict(zip(names, normal(names), strict=True))
        for name, compared in self._own.items():
            base = compared.rpartition("/")[2]
            for key in {base, os.path.splitext(base)[0]}:
                self._by_base.setdefault(key, []).append(name)

    def find(self, key: str) -> list[str]:
        """Images called so: by their path or the end of it, with or without ending. An exact name excludes others."""
        key = normal([key])[0].strip().replace("\\", "/").removeprefix("./")
        found = self._by_base.get(key.rpartition("/")[2], ())
        for shorten in (str, lambda name: os.path.splitext(name)[0]):
            ends = {name: f"/{shorten(self._own[name])}" for name in found}
            fitting = [name for name in found if ends[name].endswith(f"/{key}") or f"/{key}".endswith(ends[name])]
            exact = [name for name in fitting if ends[name] == f"/{key}"]
            if exact or fitting:
                return exact or fitting
        return []


def read_labels(
    path: str,
    names: list[str],
    classes: list[str] | None = None,
    key: str | None = None,
    split: str | None = None,
) -> tuple[dict[str, int | str | None], list[str] | None]:
    """Label of each image by its name, and the class names where the file holds them; names: paths of the images.

    Known: lines of LABEL in the order of the images' names; lines of NAME and LABEL, separated by a tab, comma,
    semicolon or white space, with or without a header; tables with a header, whose column `key` or one of LABEL_COLUMNS
    is the label; Kaggle's LOC_val_solution.csv and Tiny ImageNet's val_annotations.txt, with boxes behind the label;
    ImageNet's devkit, as its .tar.gz or unpacked. NAME may be a path, and may lack its ending.
    classes: the names that the user gave. What labels are: see `parse_labels`. Images without a label are left out.
    split: the one that is wanted of those in the table's column; images of others have None.
    Raises UserError.
    """
    where = f"--labels {printable(path)}"
    if not names:
        raise UserError(f"{where}: the source holds no image that it could label; give {SOURCES}")
    if is_devkit(path):
        _refuse_columns(f"{where}: the devkit has no columns", key, split)
        by_name, wnids = devkit_labels(path, names)
        return {**by_name}, wnids
    lines = [line for line in read_text(path).splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise UserError(f"{where}: is empty; give a line for each image")
    pairs = _LabelFile(ImageNames(names), where, key, split).labels(lines)
    if pairs is None:
        pairs = dict(_labels_in_order(lines, names, where))
    used = {name: text for name, text in pairs.items() if text}
    if pairs and not used:
        raise UserError(f"{where}: its lines name images, and no labels; write NAME and LABEL on each")
    parsed = parse_labels(list(used.values()), classes, where)
    if classes is None:
        refuse_without_zero([label for label in parsed if isinstance(label, int)], where)
    others = {name: None for name, text in pairs.items() if text is None}
    return {**dict(zip(used, parsed, strict=True)), **others}, None


class _LabelFile:
    """The lines of a label file that names its images. key, split: see `read_labels`. Methods raise UserError."""

    def __init__(self, images: ImageNames, where: str, key: str | None, split: str | None) -> None:
        self.images, self.where, self.key, self.split = images, where, key, split

    def labels(self, lines: list[str]) -> Mapping[str, str | None] | None:
        """Text of the label by image, None for one of another split; None when no line names an image."""
        for delimiter in DELIMITERS:
            if all(delimiter in line for line in lines):
                try:
                    rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter)]
                except csv.Error as error:
                    raise UserError(f"{self.where}: cannot be read as a table ({error}); fix it") from None
                if (found := self._from_table(rows)) is not None:
                    return found
        _refuse_columns(f"{self.where}: no table with a header and the names of images", self.key, self.split)
        return self._from_words(lines)

    def _from_table(self, rows: list[list[str]]) -> Mapping[str, str | None] | None:
        width = max(map(len, rows))
        cells = [[row[column] for row in rows if column < len(row)] for column in range(width)]
        named = [[cell for cell in column if self.images.find(cell)] for column in cells]
        if not any(named):
            return None
        # a label such as 7 may look like the name of 7.jpg: full names come first, then the column that comes first
        scores = [(sum(map(has_image_ending, column)), len(column)) for column in named]
        name = scores.index(max(scores))
        header = rows[0] if self._is_header(rows[0][name : name + 1]) else []
        body = rows[1:] if header else rows
        label = self._label_column(header, body, name)
        if any(len(row) <= max(name, label) for row in body):
            raise UserError(f"{self.where}: some lines hold a name and a label, others do not; fix it")
        body, others = self._of_split(header, body, name, label)
        collected = self._collected((row[name], _before_boxes(" ".join(row[label:])) or row[label]) for row in body)
        return {**dict.fromkeys(others), **collected}

    def _of_split(
        self, header: list[str], body: list[list[str]], name: int, label: int
    ) -> tuple[list[list[str]], list[str]]:
        """Rows of the wanted split, and the images of others."""
        found = split_column(header, header[label]) if len(header) > label else None
        if found is None:
            if self.split is not None:
                raise UserError(f"{self.where}: no column split or subset; leave --split out")
            return body, []
        at = header.index(found)
        named = [row for row in body if len(row) > at and self.images.find(row[name])]
        splits = {row[at] for row in named}
        wrong = are_several(splits) if self.split is None else self.split not in splits
        if wrong:
            raise wrong_split(self.where, splits, self.split)
        if self.split is None:
            return body, []
        others = [image for row in named if row[at] != self.split for image in self.images.find(row[name])]
        return [row for row in body if row[at : at + 1] == [self.split]], others

    def _label_column(self, header: list[str], body: list[list[str]], name: int) -> int:
        """Number of the column with the label. Raises UserError where that is not certain."""
        where, columns = self.where, ", ".join(map(printable, header))
        if self.key is not None:
            if header.count(self.key) != 1:
                key = printable(self.key)
                raise UserError(f"{where}: no column {key!r} (--label-key) among {columns or 'unnamed ones'}")
            return header.index(self.key)
        others = [i for i in range(max(map(len, [header, *body]))) if i != name]
        others = [i for i in others if i >= len(header) or header[i].lower() not in SPLIT_COLUMNS] or others
        if len(others) == 1:
            return others[0]
        if name == 0 and body and all(_before_boxes(" ".join(row[1:])) for row in body):
            return 1
        known = [i for i in others if i < len(header) and header[i].lower() in LABEL_COLUMNS]
        if len(known) == 1:
            return known[0]
        if not header:
            raise UserError(f"{where}: {len(others) + 1} columns without a header; keep name and label of each image")
        raise UserError(f"{where}: which of the columns {columns} is the label is not certain; name it by --label-key")

    def _from_words(self, lines: list[str]) -> dict[str, str] | None:
        """NAME LABEL with white space between; both may hold spaces, so that the name is what an image is called."""
        pairs = []
        for number, line in enumerate(map(str.strip, lines)):
            if line.startswith('"') and '"' in line[1:]:
                name, _, rest = line[1:].partition('"')
                splits = [(name, rest.strip())]
            else:
                splits = [(line[: gap.start()], line[gap.end() :]) for gap in re.finditer(r"\s+", line)]
            known = [split for split in splits if self.images.find(split[0])]
            known = [split for split in known if has_image_ending(split[0])] or known
            if len(known) > 1:
                raise UserError(
                    f"{self.where}: {printable(line)!r} may mean {printable(known[0][0])!r} or "
                    f"{printable(known[1][0])!r}; put a tab between name and label"
                )
            name, label = known[0] if known else splits[0] if splits else (line, "")
            if number or is_number(label) or not self._is_header([name]):
                pairs.append((name, _before_boxes(label) or label.strip('"')))
        return self._collected(pairs) or None

    def _is_header(self, names: list[str]) -> bool:
        """Whether the first line is a header: its cell in the column of names is no image's, present or missing."""
        return not any(self.images.find(name) or has_image_ending(name) for name in names)

    def _collected(self, pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
        """Labels of images, each said once; pairs: name and label on each line."""
        labels: dict[str, str] = {}
        unknown = []
        for name, label in pairs:
            found = self.images.find(name)
            if len(found) > 1:
                raise UserError(
                    f"{self.where}: {printable(name)!r} may mean {printable(found[0])} or {printable(found[1])}; write "
                    "names with their folders and endings"
                )
            if not found:
                unknown.append(name)
            elif labels.setdefault(found[0], label) != label:
                raise UserError(
                    f"{self.where}: {printable(found[0])} has two labels, {printable(labels[found[0]])} and "
                    f"{printable(label)}; keep one"
                )
        if labels and unknown:
            shown = printable(unknown[0])
            log.warning("%s: lines that name no image of the source: %d, e.g. %s", self.where, len(unknown), shown)
        return labels


def _before_boxes(text: str) -> str | None:
    """The label before boxes; None where there are none."""
    found = _BOXES.fullmatch(text)
    return found and found[1]


def _refuse_columns(what: str, key: str | None, split: str | None) -> None:
    """Raises UserError where a column is asked for that there cannot be."""
    if key is not None or split is not None:
        raise UserError(f"{what}; leave {'--split' if key is None else '--label-key'} out")


def _are_more_than_labels(lines: list[str], names: list[str]) -> bool:
    """Whether a line holds several columns or a file's name, or each an image's name, or a number behind words."""
    stems = {os.path.splitext(name.rpartition("/")[2])[0] for name in names}
    rows = [re.split(r"[\s:|]+", line) for line in lines]
    return (
        any(mark in line for line in lines for mark in DELIMITERS)
        or any(has_image_ending(word) for row in rows for word in row)
        or all(len(row) > 1 and not stems.isdisjoint(row) for row in rows)
        or all(len(row) > 1 and is_number(row[-1]) for row in rows)
    )


def _labels_in_order(lines: list[str], names: list[str], where: str) -> list[tuple[str, str]]:
    """One label on each line, in the order of the images' names. Raises UserError where the lines may be something else
    or are not as many as the images."""
    lines = [line.strip() for line in lines]
    if len(lines) == len(names) + 1 and (lines[0].lower() in LABEL_COLUMNS):
        lines = lines[1:]
    if _are_more_than_labels(lines, names):
        raise UserError(
            f"{where}: no line is an image's name and its label: its first is {printable(lines[0])!r}, an image is "
            f"called {printable(names[0])!r}; write NAME and LABEL with a tab between them, or "
            "one label a line"
        )
    images = [name for name in names if has_image_ending(name)]
    for candidates in (names, images):
        if len(lines) == len(candidates):
            return list(zip(in_order(candidates, where), lines, strict=True))
    raise UserError(f"{where}: {len(lines)} lines for {len(images) or len(names)} images; give one each")
