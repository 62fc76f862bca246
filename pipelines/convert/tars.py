"""Images in tars: ImageNet's tar of class tars, class tars, shards as WebDataset writes them, and flat tars.

Where the label of an image is, by `label_from` ("auto": the one that the tars hold; refused where they hold several):
    cls     KEY.cls beside KEY.jpg, a class number or name. As in WebDataset, KEY is the path up to the first dot of the
            file's name, and what follows is the field; where the name of a .cls holds more dots than that
            (2021.05.01.cls), KEY is the path up to the last dot in all tars of the source.
    json    KEY.json beside KEY.jpg, an object with the label under `label_key` or one of LABEL_COLUMNS
    folder  the folder within the tar that the image lies in
    tar     the tar's name without .tar: class tars, also those that lie in an outer tar
A label file (`labels`) comes before all of these.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from pipelines.convert.labels import LABEL_COLUMNS, file_labels, is_number, parse_labels
from pipelines.convert.listing import IMAGE_ENDINGS, Builder, Listing, has_image_ending, is_clutter
from pipelines.convert.splits import is_split, refuse_mixed
from pipelines.convert.tar_index import Member, Reader, TarDamaged, members
from pipelines.convert.trees import Entry, Tree, add_missing_parts
from pipelines.errors import UserError, printable
from pipelines.read.folder import NOT_CLASSES
from pipelines.read.image_prep import ConvertSettings
from pipelines.read.manifest import normal

LISTED_AT_ONCE = 8
MAX_CLS, MAX_JSON = 4096, 1 << 20  # bytes
SIDECARS = ("cls", "json", "txt", "xml", "csv")
"""endings of what lies beside an image"""


@dataclass
class Tar:
    name: str
    stem: str
    stamp: int
    number: int = -1
    """in Listing.files"""
    faults: list[tuple[str, str]] = field(default_factory=list)
    clutter: list[str] = field(default_factory=list)
    inner: list[tuple[str, list[Member]]] = field(default_factory=list)
    """tars that lie in it: name without .tar, and what they hold, under full names"""
    files: list[Member] = field(default_factory=list)
    """what else it holds, in its order, under names within it"""
    cls: dict[int, str] = field(default_factory=dict)
    """labels in .cls files, by the file's offset"""
    json: dict[int, dict[str, str]] = field(default_factory=dict)
    """labels by their keys in .json files, by the file's offset"""


def list_tars(tree: Tree, entries: list[Entry], settings: ConvertSettings, builder: Builder, work: str) -> Listing:
    """Lists tars. Raises UserError where they cannot be read, and where it is not certain what the labels are."""
    add_missing_parts(tree, entries, builder)
    tars = []
    with ThreadPoolExecutor(LISTED_AT_ONCE) as pool:
        for tar in pool.map(lambda entry: _read_tar(tree, entry, settings.label_key), entries):
            tar.number = builder.file(tree.place(tar.name))
            for name, reason in tar.faults:
                builder.fault(name, reason)
            builder.listing.ignored += map(printable, tar.clutter)
            tars.append(tar)
    nested = any(tar.inner for tar in tars)
    flat = [(tar, member) for tar in tars for member in tar.files]
    if not nested and not flat:
        return builder.done(tree.place(entries[0].name))
    images = _Images(flat, builder)
    if settings.labels is not None:
        if nested or settings.label_from != "auto":
            what = f"--label-from {settings.label_from!r}" if settings.label_from != "auto" else "the class tars within"
            raise UserError(f"--labels: {printable(tree.source)} has its labels from {what}; leave one of them out")
        if settings.split is None:
            refuse_mixed(printable(tree.source), entries)
        return _from_file(images, tree, settings, builder)
    choice = _label_source(tars, images, settings, tree)
    classes = settings.label_from == "tar" or (choice == "tar" and not nested)
    if not classes and not (choice == "folder" and _are_folders(_folders(tars, images), tars)):
        refuse_mixed(printable(tree.source), entries)
    if settings.label_key is not None and choice != "json":
        raise UserError(
            f"--label-key: names a key of .json files, but the labels of {printable(tree.source)} are from {choice}; "
            "leave it out, or choose with --label-from json"
        )
    for tar in tars:
        for stem, found in tar.inner:
            for member in found:
                builder.add(member.name, stem, tar.number, member.offset, member.size, tar.stamp)
    if not flat:
        return builder.done(tree.source)
    labelled = _labels(images, choice, settings, builder)
    if choice == "cls":
        labelled = _without_names(labelled, builder)
    texts = [text for _, _, text in labelled]
    labels: Sequence[int | str] = texts
    if choice in ("cls", "json"):
        labels = parse_labels(texts, builder.fixed_classes, f"{printable(tree.source)} ({choice})")
    for (tar, member, _), label in zip(labelled, labels, strict=True):
        builder.add(f"{tar.name}/{member.name}", label, tar.number, member.offset, member.size, tar.stamp)
    return builder.done(tree.source)


def _read_tar(tree: Tree, entry: Entry, label_key: str | None) -> Tar:
    if entry.fault:
        raise UserError(f"{printable(tree.place(entry.name))}: {entry.fault}; fix or remove it")
    tar = Tar(entry.name, entry.name[:-4].rpartition("/")[2], entry.stamp)
    with tree.open(entry.name) as reader:

        def walk(prefix: str, start: int, size: int | None) -> Iterator[Member]:
            try:
                for member in members(reader, start, size):
                    base = member.name.rpartition("/")[2]
                    if member.fault:
                        tar.faults.append((prefix + member.name, member.fault))
                    elif is_clutter(base) or _is_tools(member.name):
                        tar.clutter.append(prefix + member.name)
                    else:
                        yield member
            except (TarDamaged, OSError) as error:
                tar.faults.append((prefix.removesuffix("/"), str(error)))

        for member in walk(f"{tar.name}/", 0, None):
            base = member.name.rpartition("/")[2]
            if base.lower().endswith(".tar"):
                full = f"{tar.name}/{member.name}/"
                inside = walk(full, member.offset, member.size)
                tar.inner.append((base[:-4], [image._replace(name=full + image.name) for image in inside]))
            else:
                tar.files.append(member._replace(name=member.name.removeprefix("./")))
                _keep_text(reader, member, tar, label_key)
    return tar


def _is_tools(path: str) -> bool:
    """Whether a file lies in a folder that tools leave."""
    return not {part.lower() for part in path.split("/")[:-1]}.isdisjoint(NOT_CLASSES)


def _keep_text(reader: Reader, member: Member, tar: Tar, label_key: str | None) -> None:
    name = member.name.lower()
    if name.endswith(".cls") and member.size <= MAX_CLS:
        tar.cls[member.offset] = reader.pread(member.size, member.offset).decode("utf-8-sig", "replace").strip()
    elif name.endswith(".json") and member.size <= MAX_JSON:
        tar.json[member.offset] = _json_labels(reader.pread(member.size, member.offset), label_key)


def _split(path: str, at_last_dot: bool) -> tuple[str, str]:
    """Key and field of a shard's member."""
    folder, slash, base = path.rpartition("/")
    stem, _, ending = base.rpartition(".") if at_last_dot and "." in base else base.partition(".")
    return f"{folder}{slash}{stem}", ending.lower()


class _Images:
    """The images that lie in tars without an inner tar, and what lies beside them under the same key."""

    def __init__(self, flat: list[tuple[Tar, Member]], builder: Builder) -> None:
        cls = [member.name.rpartition("/")[2] for _, member in flat if member.name.lower().endswith(".cls")]
        self.has_cls = bool(cls)
        at_last_dot = any(name.count(".") > 1 for name in cls) or not cls
        self.beside: dict[tuple[int, str, str], int] = {}  # offsets by tar, key and ending, that of an image as "image"
        self.found: list[tuple[Tar, Member, str]] = []  # with the key
        self.json: list[str] = []  # beside images
        rest = []
        for tar, member in flat:
            key, ending = _split(member.name, at_last_dot)
            if ending in IMAGE_ENDINGS:
                if (tar.number, key, "image") in self.beside and self.has_cls:
                    builder.fault(f"{tar.name}/{member.name}", "a second image of the same key: not read")
                    continue
                self.found.append((tar, member, key))
                self.beside[tar.number, key, "image"] = member.offset
            else:
                self.beside[tar.number, key, ending] = member.offset
                rest.append((tar, member, key, ending))
        for tar, member, key, ending in rest:
            self._other(tar, member, key, ending, builder)
        self.found.sort(key=lambda image: (image[0].number, image[1].offset))

    def _other(self, tar: Tar, member: Member, key: str, ending: str, builder: Builder) -> None:
        """A file without an image's ending: beside an image it belongs to it, else it is one or must be known."""
        name = f"{tar.name}/{member.name}"
        if (tar.number, key, "image") in self.beside:
            if ending == "json":
                self.json.append(name)
            elif ending != "cls":
                builder.listing.ignored.append(printable(name))
        elif ending == "cls":
            builder.fault(name, "has no image of the same key")
        elif self.has_cls and has_image_ending(ending):
            first, last = key, _split(member.name, True)[0]
            builder.fault(name, f"is field {ending!r} of key {first!r}, not image {last!r}: leave one dot in its name")
        elif self.has_cls or ending in SIDECARS:
            builder.listing.ignored.append(printable(name))
        else:  # as in a folder of a class, whatever it is called: the decoder decides
            self.found.append((tar, member, key))

    def label(self, tar: Tar, key: str, ending: str) -> str | None:
        """Label in the file with this ending beside an image; None where there is no such file, "" where no label.
        Raises UserError where it holds several."""
        offset = self.beside.get((tar.number, key, ending))
        if offset is None or ending == "cls":
            return None if offset is None else tar.cls.get(offset, "")
        labels = tar.json.get(offset, {})
        if len(labels) > 1:
            raise UserError(
                f"{printable(f'{tar.name}/{key}')}: its .{ending} holds {' and '.join(labels)}; choose with "
                "--label-key, or with --label-from where the label is elsewhere"
            )
        return next(iter(labels.values()), "")

    def conflict(self, tar: Tar, key: str, cls: str) -> str | None:
        """A label in the .json that conflicts with that of the .cls; a number and a name may both be right."""
        held = tar.json.get(self.beside.get((tar.number, key, "json"), -1), {}).values()
        labels = [label.strip() for label in held if label and is_number(label) == is_number(cls)]
        same = cls in labels or (is_number(cls) and float(cls) in map(float, labels))
        return labels[0] if labels and not same else None


def _from_file(images: _Images, tree: Tree, settings: ConvertSettings, builder: Builder) -> Listing:
    named = {f"{tar.name}/{member.name}": (tar, member) for tar, member, _ in images.found}
    label_of, classes = file_labels(list(named), settings, builder)
    for name, (tar, member) in named.items():
        if name in label_of:
            builder.add(name, label_of[name], tar.number, member.offset, member.size, tar.stamp)
    return builder.done(tree.source, classes)


def _label_source(tars: list[Tar], images: _Images, settings: ConvertSettings, tree: Tree) -> str:
    """Where the labels are, one of LABEL_FROM but "auto". Raises UserError where that is not certain."""
    where = printable(tree.root if len(tars) > 1 else tree.place(tars[0].name))
    if any(tar.inner for tar in tars):
        if images.found or images.has_cls or settings.label_from not in ("auto", "tar"):
            raise UserError(f"{where}: holds class tars and other files beside them; give a tar of class tars alone")
        _refuse_shards([stem for tar in tars for stem, _ in tar.inner], where, settings)
        return "tar"
    if settings.label_from != "auto":
        return settings.label_from
    if images.has_cls:
        return "cls"
    folders = _folders(tars, images)
    names = {folder for some in folders for folder in some}
    certain = []
    if any(images.label(tar, key, "json") for tar, _, key in images.found):
        certain.append("json")
    if len(names) > 1 and "" not in names:
        parents = {folder.rpartition("/")[0] for folder in names}
        if len(parents) > 1 or all(is_split(folder.rpartition("/")[2]) for folder in names):
            shown = ", ".join(map(printable, sorted(parents if len(parents) > 1 else names)[:3]))
            raise UserError(f"{where}: images lie in several folders of classes ({shown}); make a tar of each")
        one_each = len(tars) > 1 and all(len(some) == 1 for some in folders)
        certain += ["folder", "tar"] if one_each and not _are_folders(folders, tars) else ["folder"]
    if len(certain) > 1:
        raise UserError(f"{where}: labels may be from {' or '.join(certain)}; choose with --label-from")
    if certain:
        return certain[0]
    if len(tars) == 1:
        raise UserError(
            f"{where}: its images carry no labels (neither KEY.cls nor KEY.json with a label nor class folders nor "
            "tars of classes); give --labels, a label file or ImageNet's devkit"
        )
    _refuse_shards([tar.stem for tar in tars], where, settings)
    return "tar"


def _are_folders(folders: list[set[str]], tars: list[Tar]) -> bool:
    """Whether the folders in each tar are called as the tar is: it is a class."""
    return all(
        set(normal([tar.stem])) >= set(normal(folder.rpartition("/")[2] for folder in some))
        for tar, some in zip(tars, folders, strict=True)
    )


def _refuse_shards(stems: list[str], where: str, settings: ConvertSettings) -> None:
    """Raises UserError when tars are called as parts of a data set are, and not as classes."""
    part = next(
        (stem for stem in stems if is_split(stem) or (re.search(r"\d$", stem) and not re.fullmatch(r"n\d+", stem))),
        None,
    )
    if part is not None and settings.label_from == "auto":
        raise UserError(
            f"{where}: {printable(part)}.tar may be a class or a part of the data set, and its images carry no labels; "
            "choose with --label-from tar if each tar is a class, else give --labels"
        )


def _folders(tars: list[Tar], images: _Images) -> list[set[str]]:
    """Folders in each tar that hold images."""
    folders: dict[int, set[str]] = {tar.number: set() for tar in tars}
    for tar, member, _ in images.found:
        folders[tar.number].add(member.name.rpartition("/")[0])
    return list(folders.values())


def _labels(images: _Images, choice: str, settings: ConvertSettings, builder: Builder) -> list[tuple[Tar, Member, str]]:
    """Images with the text of their labels; those without one become faults."""
    if choice != "json":
        builder.listing.ignored += map(printable, images.json)
    compared = choice == "cls" and settings.label_from == "auto"
    labelled: list[tuple[Tar, Member, str]] = []
    for tar, member, key in images.found:
        fault = ""
        if choice in ("cls", "json"):
            text = images.label(tar, key, choice)
            fault = f"its .{choice} holds no label" if text == "" else f"has no .{choice} of the same key"
            if text and len(text.splitlines()) > 1:
                text, fault = "", f"its .{choice} holds several lines, not one label"
            if text and compared and (other := images.conflict(tar, key, text)):
                raise UserError(
                    f"{printable(f'{tar.name}/{key}')}: its .cls holds label {printable(text)} and its .json "
                    f"{printable(other)}; choose with --label-from"
                )
        elif choice == "folder":
            text = member.name.rpartition("/")[0].rpartition("/")[2]
            fault = "lies in no folder of its tar"
        else:
            text = tar.stem
        if text:
            labelled.append((tar, member, text))
        else:
            builder.fault(f"{tar.name}/{member.name}", fault)
    return labelled


def _without_names(labelled: list[tuple[Tar, Member, str]], builder: Builder) -> list[tuple[Tar, Member, str]]:
    """Where .cls files hold numbers, those that hold anything else are faults."""
    numbers = [row for row in labelled if is_number(row[2])]
    fixed = set(normal(builder.fixed_classes or ()))
    if not numbers or (fixed and fixed.issuperset(normal(text for _, _, text in labelled))):
        return labelled
    for tar, member, text in labelled:
        if not is_number(text):
            builder.fault(f"{tar.name}/{member.name}", "its .cls holds no class number; if a name, give --classes")
    return numbers


def _json_labels(raw: bytes, key: str | None) -> dict[str, str]:
    """The labels in a JSON object by their keys."""
    try:
        found = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return {}
    known = {name: found.get(name) for name in ([key] if key else LABEL_COLUMNS)} if isinstance(found, dict) else {}
    return {
        name: str(value)
        for name, value in known.items()
        if isinstance(value, (int, str, float)) and not isinstance(value, bool)
    }
