"""Which classes of a model are those of the data: matched by name, or by WordNet id for ImageNet's classes.

A teacher of 1,000 classes can so teach any subset of them: its other logits are dropped before softmax and argmax. A
student is evaluated on any subset: the data's labels become the student's, which keeps all its logits.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipelines.convert.labels import read_classes
from pipelines.errors import UserError
from pipelines.read.base import Source
from pipelines.read.manifest import normal

IMAGENET = "imagenet-1k"
SUBSET_OF = {1000: IMAGENET, 11221: "imagenet-21k-miil", 11821: "imagenet-12k", 21841: "imagenet-22k"}
"""timm's lists of ImageNet classes, by their number of classes; those of other orders have to be asked for by name"""
WORDNET_ID = re.compile(r"n\d{8}(?!\d)")
log = logging.getLogger("std_fast")


class DataClasses(NamedTuple):
    """The classes of a data set, in the order of its labels."""

    number: int
    names: tuple[str, ...] | None = None

    @classmethod
    def named(cls, count: int, names: Sequence[str] | None) -> DataClasses:
        """With whatever names there are."""
        return cls(count, None if names is None or len(names) != count else tuple(names))


class Side(NamedTuple):
    """Whose classes are matched with the data's: what messages say of them."""

    where: str
    """the field or file"""
    who: str
    fix: str
    """what to do where a class is lacking"""
    decides: str
    """what to do where numbers are ambiguous"""


def select_classes(
    asked: str, count: int, own: Sequence[str] | None, data: DataClasses, where: str
) -> tuple[int, ...] | None:
    """For each class of the data the teacher's class; None where the two are the same.

    Args:
        asked: the recipe's `classes`: a list of timm's such as `imagenet-1k`, a file of names, or empty. Empty means
            `own`, or ImageNet's classes where all of the data's names are WordNet ids of ImageNet-1k and the teacher
            has as many classes as one of timm's lists.
        count: classes of the teacher.
        own: their names, where its weights come with them.
        where: the recipe's name of the teacher, for messages.

    Raises:
        UserError: names of another number of classes, a class that the teacher lacks, or another number of classes
            where there are no names to match.
    """
    names = class_names(asked, where) if asked else own
    if asked and names is not None and len(names) != count:
        raise UserError(f"{where}: classes: {asked} names {len(names)} classes, but the teacher has {count}")
    theirs = known_classes(count, names, data)
    if count != data.number and (theirs.names is None or data.names is None or counts(data.names)):
        raise UserError(wrong_classes(where, count, data.number))
    decides = "name those of the teacher in their order (classes: FILE)"
    found = places(theirs, data, Side(where, "the teacher", "take a teacher of these classes", decides))
    return None if found == tuple(range(count)) else found


def known_classes(count: int, own: Sequence[str] | None, data: DataClasses) -> DataClasses:
    """Classes of a model with these names; without any, ImageNet's where the model has as many as a list of timm's and
    all names of the data are WordNet ids of ImageNet-1k."""
    if own is None and data.names is not None and count in SUBSET_OF and set(data.names) <= set(imagenet(IMAGENET)):
        own = imagenet(SUBSET_OF[count])
    return DataClasses.named(count, own)


def wrong_classes(where: str, found: int, needed: int) -> str:
    return (
        f"{where}: a teacher of {found} classes, but the data has {needed}; take one that was trained on this data, or "
        "name its classes (classes: imagenet-1k, or a file) and convert the data with its class names"
    )


def match(theirs: Sequence[str], ours: Sequence[str], side: Side) -> tuple[int, ...]:
    """The place of each of our names among theirs: equal names first, then names that mean the same WordNet id.

    Names are equal in any Unicode normal form.

    Raises:
        UserError: the side whose names `theirs` are lacks one of ours, or has one class for two of ours.
    """
    where, who, fix, _ = side
    theirs, ours = normal(theirs), normal(ours)
    place = {name: i for i, name in enumerate(theirs)}
    by_id = {key: i for i, name in enumerate(theirs) if (key := wordnet_id(name))} if set(ours) - set(place) else {}
    found = [place[name] if name in place else by_id.get(wordnet_id(name) or "") for name in ours]
    if None in found:
        missing = [name for name, at in zip(ours, found, strict=True) if at is None]
        raise UserError(
            f"{where}: {who} lacks the class {missing[0]!r} of the data ({len(missing)} of {len(ours)} "
            f"such), it has {', '.join(map(repr, theirs[:3]))} ...; {fix}"
        )
    if len(set(found)) < len(found):
        twice = next(name for name, at in zip(ours, found, strict=True) if found.count(at) > 1)
        raise UserError(f"{where}: {twice!r} and another class of the data mean one class of {who}")
    return tuple(at for at in found if at is not None)


def places(
    theirs: DataClasses, ours: DataClasses, side: Side, present: Sequence[int] | None = None
) -> tuple[int, ...] | None:
    """For each of our classes the place of the same one among `theirs`; None where there are no names to match.

    Names are matched (`match`), numbers by their value: 01 is 1. Where one side has numbers and the other words or no
    names, number n means class n of the other, and the log says so. But folders 0, 1, 10, 2 are numbered in the order
    of text, in which 10 is class 2: where that gives another class, and the names do not count from 0, it is an error.

    Args:
        present: labels of our classes that have images, if only these are wanted.

    Raises:
        UserError: a class that `theirs` lacks, or a number that may mean two.
    """
    labels = list(range(ours.number) if present is None else present)
    names = None if ours.names is None else [ours.names[label] for label in labels]
    their_numbers, our_numbers = class_numbers(theirs.names or ()), class_numbers(names or ())
    if their_numbers and our_numbers:
        return match(_texts(their_numbers), _texts(our_numbers), side)
    if our_numbers and ours.names is not None and not set(names or ()) & set(theirs.names or ()):
        found = match(_texts(range(theirs.number)), _texts(our_numbers), side)
        _check_certain(our_numbers, ours.names, theirs, f"{side.where}: the data's classes", side.who, side.decides)
        return found
    if their_numbers and theirs.names is not None and names is not None and theirs.number == ours.number:
        found = match(_texts(their_numbers), _texts(labels), side)
        what = f"{side.where}: the classes of {side.who}"
        _check_certain(their_numbers, theirs.names, ours, what, "the data", side.decides)
        return found
    if theirs.names is not None and names is not None:
        return match(theirs.names, names, side)
    if names is not None and theirs.number == ours.number:
        said = _listed(labels, names)
        log.info("%s: %s has no class names; its number n means class n of the data: %s", *side[:2], said)
    return None


def _check_certain(
    numbers: list[int], names: Sequence[str], other: DataClasses, what: str, who: str, decides: str
) -> None:
    """Logs which classes of `other`, those of `who`, the numbers mean. UserError where one may mean two of them."""
    by_text = sorted(_texts(range(other.number)))
    unsure = next((n for n in numbers if by_text[n] != str(n)), None)
    if unsure is not None and class_numbers(names) != list(range(len(names))):  # 0000, 0001 ... count from 0 too
        raise UserError(
            f"{what} are numbers: {unsure} may be number {unsure} of {who}, or number {by_text.index(str(unsure))}, as "
            f"in the order of text; {decides}"
        )
    if other.names is not None:
        named = [(n, other.names[n]) for n in sorted(numbers)]
        log.info("%s are numbers, taken as those of %s: %s", what, who, _listed(*zip(*named, strict=True)))


def _listed(numbers: Sequence[int], names: Sequence[str]) -> str:
    """For messages: `0 'ant', 1 'bee'`, and so on."""
    pairs = [f"{number} {name!r}" for number, name in zip(numbers, names, strict=True)]
    return ", ".join(pairs[:10]) + " ..." * (len(pairs) > 10)


def counts(names: Sequence[str]) -> bool:
    """Whether the names only repeat the labels: 0, 1, 2 ..."""
    return list(names) == _texts(range(len(names)))


def _texts(numbers: Iterable[int]) -> list[str]:
    return [str(n) for n in numbers]


def relabel(source: Source, model: DataClasses, where: str, who: str) -> None:
    """Gives the images of `source`, in place, the labels of the model's classes, matched by name or WordNet id.

    See `places`. Labels without names are the model's already, and so are those of as many classes as a model without
    names has. A class without images need not be one of the model's.

    Args:
        who: whose classes `model` are, for messages.

    Raises:
        UserError: names a class that the model lacks, or says that one of the two has no names and another number.
    """
    number, theirs = model
    fix = "use data of its classes"
    decides = f"convert it with --classes FILE, in which the classes of {who} stand in their order"
    present = np.unique(source.labels).tolist()
    ours = DataClasses(source.num_classes, tuple(source.class_names) if source.class_names else None)
    found = places(model, ours, Side(where, who, fix, decides), present)
    if found is None:
        if ours.number == number or (ours.names is None and ours.number < number):
            return
        lacking = where if ours.names is None else who
        raise UserError(
            f"{where}: has {ours.number} classes, {who} {number}, and {lacking} has no class names by which to "
            f"match them; {fix}, or convert with class names"
        )
    table = np.zeros(ours.number, np.int64)
    table[present] = found
    if list(found) != present:
        log.info("%s: its classes are matched by name with those of %s", where, who)
    source.labels = table[source.labels]
    source.num_classes, source.class_names = number, list(theirs) if theirs is not None else None


def class_numbers(names: Sequence[str]) -> list[int] | None:
    """The numbers that all names are, each another; None where they are names."""
    if not names or not all(name.isascii() and name.isdecimal() for name in names):
        return None
    numbers = [int(name) for name in names]
    return numbers if len(set(numbers)) == len(numbers) else None


def class_names(asked: str, where: str) -> tuple[str, ...]:
    """Names of a recipe's `classes`. UserError when it is neither a list of timm's nor a file of names."""
    if Path(asked).is_file():
        return tuple(read_classes(asked))
    names = imagenet(asked)
    if not names:
        lists = ", ".join(sorted({*SUBSET_OF.values(), "imagenet-21k-goog", "imagenet-22k-ms"}))
        raise UserError(f"{where}: classes: {asked!r} is neither a file of class names nor one of {lists}")
    return names


@functools.cache
def imagenet(subset: str) -> tuple[str, ...]:
    """WordNet ids of one of timm's lists in the order of its classes; empty for a name that timm does not have."""
    from timm.data import ImageNetInfo

    try:
        return tuple(ImageNetInfo(subset).label_names())
    except (AssertionError, KeyError):  # the latter under python -O
        return ()


def wordnet_id(name: str) -> str | None:
    """`n01440764`, `n01440764_tench` and, if only one class of ImageNet-1k is called so, `tench` -> `n01440764`."""
    found = WORDNET_ID.match(name)
    return found[0] if found else _ids_of_words().get(_words(name.split(",")[0]))


@functools.cache
def _imagenet_info() -> Any:
    """timm's words of all WordNet ids, and the classes of ImageNet-1k."""
    from timm.data import ImageNetInfo

    return ImageNetInfo(IMAGENET)


def wordnet_words(name: str) -> str:
    """`n01440764` -> `tench, Tinca tinca`; empty for a name that is no WordNet id of ImageNet's."""
    if not WORDNET_ID.fullmatch(name):
        return ""
    try:
        return _imagenet_info().label_name_to_description(name)
    except KeyError:
        return ""


def class_in_words(name: str) -> str:
    """`n01440764` -> `tench`: the first words of a WordNet id; any other name as it is."""
    return wordnet_words(name).partition(",")[0] or name


@functools.cache
def _ids_of_words() -> dict[str, str]:
    """WordNet ids of ImageNet-1k by each of their words, without the words that several have (crane, maillot)."""
    ids: dict[str, str] = {}
    several: set[str] = set()
    descriptions: Any = _imagenet_info().label_descriptions(as_dict=True)
    for wordnet, words in descriptions.items():
        for word in map(_words, words.split(",")):
            several |= {word} & ids.keys()
            ids[word] = wordnet
    return {word: wordnet for word, wordnet in ids.items() if word not in several}


def _words(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())
