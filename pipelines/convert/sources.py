"""What a conversion reads: finds out of which kind a source is and lists it.

A source whose kind is not certain is refused, with the name of the option that decides. What is left out because it is
no image of a class is listed as ignored; what should have been an image is a fault. Image folders are listed here, tars
in `tars`, parquet and CIFAR's binary files in `records`.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace

from pipelines.convert.labels import file_labels, fixed_classes, is_number
from pipelines.convert.listing import SOURCES, Builder, Listing, has_image_ending, is_clutter
from pipelines.convert.records import CIFAR_FILE, list_cifar, list_parquet
from pipelines.convert.remote_tree import local_copy, remote_tree
from pipelines.convert.splits import choose_split, in_split_folders, is_split
from pipelines.convert.tars import list_tars
from pipelines.convert.trees import Entry, LocalTree, Tree
from pipelines.errors import UserError, printable
from pipelines.read import remote
from pipelines.read.folder import NOT_CLASSES
from pipelines.read.image_prep import ConvertSettings
from pipelines.read.remote import is_url, replaced

COMPRESSED = re.compile(r".*\.(tgz|tbz2?|txz|tar\.\w+|zip|7z|rar)", re.IGNORECASE)
MAX_DEPTH = 4  # of folders in folders: links may go round in circles


def list_source(src: str, settings: ConvertSettings, work: str) -> Listing:
    """Lists a source of any kind, which its files show; `src` is a path or a URL. `work` is a folder for copies.

    Raises UserError when there is nothing to convert, the kind is not known or not certain, a class is empty, or labels
    are missing.
    """
    labels, classes = (
        local_copy(given, work) if given is not None and is_url(given) else given
        for given in (settings.labels, settings.classes)
    )
    for option, given in (("--labels", labels), ("--classes", classes)):
        if given is not None and not os.path.exists(given):
            raise UserError(f"{option} {printable(given)}: no such file; correct the path")
    return list_tree(open_tree(src, work), replace(settings, labels=labels, classes=classes), work)


def open_tree(src: str, work: str) -> Tree:
    """The files of a source by path or URL. Raises UserError where it is none."""
    if is_url(src):
        if COMPRESSED.fullmatch(remote.file_name(src)):
            raise compressed(src)
        return remote_tree(src, work)
    try:
        status = os.stat(src)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        if glob.has_magic(src) or "{" in src:
            reason = f"{reason}: only a URL may be a pattern, for files on a disk name their folder"
        raise UserError(f"{printable(src)}: cannot be opened ({reason}); give {SOURCES}") from None
    return LocalTree(src) if stat.S_ISDIR(status.st_mode) else LocalTree(*named_file(src))


def compressed(src: str) -> UserError:
    shown = remote.shown(src) if is_url(src) else printable(src)
    return UserError(f"{shown}: a compressed archive cannot be read in place; unpack it and give the folder")


def refuse_replaced(listing: Listing, src: str, work: str) -> None:
    """UserError where one of the listing's archives is no longer the file that was listed."""
    if listing.archives:
        tree = open_tree(src, work)
        folders = {name.rpartition("/")[0] for name in listing.archives}
        now = {f"{path}/{entry.name}".lstrip("/"): entry.stamp for path in folders for entry in tree.children(path)}
        for name, stamp in listing.archives.items():
            if now.get(name) != stamp:
                raise replaced(tree.place(name))


def named_file(src: str) -> tuple[str, list[str]]:
    """Folder and name of a source that is one file. Raises UserError where it is of no kind."""
    folder, name = os.path.split(src)
    if COMPRESSED.fullmatch(name):
        raise compressed(src)
    if not name.lower().endswith((".parquet", ".bin", ".tar")):
        raise UserError(f"{printable(src)}: not a known source; give {SOURCES}")
    return folder or ".", [name]


def list_tree(tree: Tree, settings: ConvertSettings, work: str) -> Listing:
    """Lists the source in a folder. See `list_source`."""
    own = {os.path.realpath(path) for path in (settings.labels, settings.classes) if path}
    entries = [entry for entry in tree.children() if os.path.realpath(tree.place(entry.name)) not in own]
    kind, used = _kind(tree, entries, settings)
    builder = Builder(kind, fixed_classes(settings))
    if kind != "tar" and settings.label_from not in ("auto", kind):
        raise UserError(f"--label-from {settings.label_from!r}: {printable(tree.source)} holds no tars; leave it out")
    if kind in ("parquet", "cifar") and settings.labels is not None:
        raise UserError(f"--labels: {kind} files hold their own labels; leave it out")
    if kind == "folder" and settings.split is not None and settings.labels is None:
        raise UserError(
            f"--split {settings.split!r}: {printable(tree.source)} is an image folder; convert the folder of the "
            "split, or leave it out"
        )
    if settings.label_key is not None and settings.labels is None and kind in ("folder", "cifar"):
        raise UserError(
            f"--label-key: {printable(tree.source)} is of kind {kind}, without columns or keys; leave it out"
        )
    if kind == "folder":
        list_flat = settings.labels is not None
        return (_list_flat if list_flat else _list_folder)(tree, entries, settings, builder)
    read = {entry.name.partition("/")[0] for entry in used}
    for entry in entries:
        if entry.name not in read:
            _unused(entry, builder)
    if kind != "cifar":
        used, settings = choose_split(printable(tree.source), used, settings)
    lists: dict[str, Callable[..., Listing]] = {"tar": list_tars, "parquet": list_parquet, "cifar": list_cifar}
    listing = lists[kind](tree, used, settings, builder, work)
    if kind != "parquet":  # whose images are copied when they are listed, as are files of some servers
        listing.archives = {entry.name: entry.stamp for entry in used if not tree.is_copied(entry.name)}
    return listing


def _unused(entry: Entry, builder: Builder) -> None:
    """What lies beside the files of a source: an image or archive is missing in the result, which must be known."""
    if not entry.is_folder and has_image_ending(entry.name) and not is_clutter(entry.name):
        builder.fault(entry.name, "an image beside the files that are converted: not read")
    elif COMPRESSED.fullmatch(entry.name):
        builder.fault(entry.name, "a compressed archive cannot be read in place: unpack it, or remove it")
    else:
        builder.listing.ignored.append(printable(entry.name))


def _kind(tree: Tree, entries: list[Entry], settings: ConvertSettings) -> tuple[str, list[Entry]]:
    """The source's kind and the entries that hold its images. Raises UserError when it could be of several."""
    visible = [entry for entry in entries if not entry.name.startswith(".")]
    files = [entry for entry in visible if not entry.is_folder]
    found = {
        "parquet": [entry for entry in files if entry.name.lower().endswith(".parquet")],
        "tar": [entry for entry in files if entry.name.lower().endswith(".tar")],
        "cifar": [entry for entry in files if re.fullmatch(r".*\.bin" if tree.named else CIFAR_FILE, entry.name)],
    }
    inner = in_split_folders(tree, visible)
    for kind in ("parquet", "tar"):
        below = [entry for entry in inner if entry.name.lower().endswith(f".{kind}")]
        if found[kind] and below and settings.kind in ("auto", kind):
            beside, path = printable(found[kind][0].name), printable(below[0].name)
            raise UserError(
                f"{printable(tree.source)}: holds {beside} and, in a folder, {path}; convert the folder "
                f"{path.rpartition('/')[0]} by itself, and move {beside} to a folder of its split"
            )
        found[kind] = found[kind] or below
    if settings.kind != "auto":
        if settings.kind != "folder" and not found[settings.kind]:
            raise UserError(f"--kind {settings.kind!r}: {printable(tree.source)} holds no such files; give {SOURCES}")
        return settings.kind, found.get(settings.kind, [])
    kinds = [kind for kind, members in found.items() if members]
    if kinds and _has_class_folder(tree, visible):
        kinds.append("folder")
    if len(kinds) > 1:
        raise UserError(f"{printable(tree.source)}: could be of kind {' or '.join(kinds)}; choose with `kind`")
    if kinds:
        return kinds[0], found[kinds[0]]
    for entry in files:
        if re.fullmatch(r"data_batch_\d+", entry.name):
            raise UserError(
                f"{printable(tree.source)}: CIFAR's Python version is pickled, which can run code; download the binary "
                "version"
            )
    return "folder", []


def _has_class_folder(tree: Tree, visible: list[Entry]) -> bool:
    folders = [entry.name for entry in visible if entry.is_folder and entry.name.lower() not in NOT_CLASSES]
    return any(has_image_ending(entry.name) for folder in folders for entry in tree.children(folder))


def _list_flat(tree: Tree, entries: list[Entry], settings: ConvertSettings, builder: Builder) -> Listing:
    """Images in a folder and below it, with a label file: which folder they lie in is not their class."""
    assert settings.labels is not None
    found = list(_files_below(tree, entries, settings.labels, builder))
    label_of, classes = file_labels([path for path, _ in found], settings, builder)
    numbers: dict[str, int] = {}
    for path, entry in found:
        folder = path.rpartition("/")[0]
        if folder not in numbers:
            numbers[folder] = builder.file(tree.place(folder))
        if path in label_of:
            _add_file(builder, numbers[folder], path, entry, label_of[path])
    return builder.done(tree.source, classes)


def _files_below(
    tree: Tree, entries: list[Entry], labels: str, builder: Builder, folder: str = ""
) -> Iterator[tuple[str, Entry]]:
    """Files of a folder and of those in it, with their paths from the root; but for the label file."""
    for entry in entries:
        path = f"{folder}/{entry.name}".lstrip("/")
        if is_clutter(entry.name) or (entry.is_folder and entry.name.lower() in NOT_CLASSES):
            _ignore_hidden(tree, path, entry, builder)
        elif entry.is_folder and path.count("/") < MAX_DEPTH:
            yield from _files_below(tree, tree.children(path), labels, builder, path)
        elif entry.is_folder:
            builder.fault(path, "lies too deep in folders: move it up, or remove it")
        elif entry.name != os.path.basename(labels) or os.path.realpath(tree.place(path)) != os.path.realpath(labels):
            yield path, entry


def _list_folder(tree: Tree, entries: list[Entry], settings: ConvertSettings, builder: Builder) -> Listing:
    """SRC/CLASS/IMAGE. Classes are numbered in the order of their names as text, as torchvision's ImageFolder does."""
    ignored = builder.listing.ignored
    classes = []
    for entry in entries:
        if is_clutter(entry.name) or entry.name.lower() in NOT_CLASSES:
            _ignore_hidden(tree, entry.name, entry, builder)
            continue
        if not entry.is_folder:
            _unused(entry, builder)
            continue
        before = len(builder.listing.names)
        path = tree.place(entry.name)
        folder = builder.file(path)
        for inner in tree.children(entry.name):
            name = f"{entry.name}/{inner.name}"
            if is_clutter(inner.name):
                ignored.append(printable(name))
            else:
                _add_file(builder, folder, name, inner, entry.name)
        if len(builder.listing.names) == before:
            raise UserError(
                f"{printable(path)}: no image in this class; put images directly in it, remove the folder, or, if it "
                f"is itself a folder of classes, convert {printable(path)}"
            )
        classes.append(entry.name)
    if not classes:
        raise UserError(f"{printable(tree.source)}: no class folders in it; give {SOURCES}")
    if all(map(is_split, classes)):
        raise UserError(
            f"{printable(tree.source)}: its folders ({', '.join(map(printable, classes))}) are splits without "
            "classes; convert each with --labels"
        )
    return builder.done(tree.source, classes)


def _ignore_hidden(tree: Tree, path: str, entry: Entry, builder: Builder) -> None:
    """A hidden folder of images may be a class: that is for the user to say."""
    if entry.is_folder and entry.name.lower() not in NOT_CLASSES and not entry.name.startswith(".Trash"):
        if any(has_image_ending(inner.name) for inner in tree.children(path)):
            builder.fault(path, "a hidden folder that holds images: rename it if it is a class, or remove it")
            return
    builder.listing.ignored.append(printable(path))


def _add_file(builder: Builder, folder: int, name: str, entry: Entry, label: int | str) -> None:
    fault = "a folder where an image should be: move its images up, or remove it" if entry.is_folder else entry.fault
    if fault:
        builder.fault(name, fault)
    else:
        builder.add(name, label, folder, -1, entry.size, entry.stamp)


def ordered_as_text(classes: list[str]) -> bool:
    """Whether class names are numbers that stand in another order than numbers do."""
    return all(map(is_number, classes)) and classes != sorted(classes, key=float)
