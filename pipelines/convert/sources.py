"""What a conversion reads: finds out of which kind a source is and lists it; image folders and tars.

CIFAR's binary files and parquet are in `record_sources`.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator

from pipelines.convert.labels import fixed_classes, read_labels
from pipelines.convert.listing import SOURCES, Builder, Listing, is_clutter, regular, scan
from pipelines.convert.records import CIFAR_FILE, files_of_split, list_cifar, list_parquet
from pipelines.convert.tar_index import TarDamaged, members
from pipelines.errors import UserError
from pipelines.read.image_prep import ConvertSettings
from pipelines.read.source import printable

IMAGE_ENDINGS = ("jpg", "jpeg", "jpe", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "jp2")


def list_source(src: str, settings: ConvertSettings, work: str) -> Listing:
    """Lists a source of any kind, told by its files. `work` is a folder for copies, which only parquet needs.

    Raises UserError when there is nothing to convert, the kind is not known, a class is empty, or labels are missing.
    """
    try:
        status = os.stat(src)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{printable(src)}: cannot be opened ({reason}); give {SOURCES}") from None
    if not stat.S_ISDIR(status.st_mode):
        return _list_file(src, settings, work)
    names = sorted(entry.name for entry in scan(src) if not entry.name.startswith("."))
    by_ending: dict[str, list[str]] = {}
    for name in names:
        by_ending.setdefault(name.lower().rpartition(".")[2] if "." in name else "", []).append(name)
    if "parquet" not in by_ending and os.path.isdir(os.path.join(src, "data")):
        inner = sorted(entry.name for entry in scan(os.path.join(src, "data")))
        by_ending["parquet"] = [os.path.join("data", name) for name in inner if name.endswith(".parquet")]
    if by_ending.get("parquet"):
        return list_parquet(src, files_of_split(src, by_ending["parquet"], settings), settings, work)
    cifar = [name for name in by_ending.get("bin", ()) if re.fullmatch(CIFAR_FILE, name)]
    if cifar:
        return list_cifar(src, cifar, settings)
    if by_ending.get("tar"):
        return _list_tars(src, by_ending["tar"], settings)
    if any(re.fullmatch(r"data_batch_\d+", name) for name in names):
        raise UserError(
            f"{printable(src)}: CIFAR's Python version is pickled, which can run code; download the binary version"
        )
    return _list_folder(src, settings)


def _list_file(src: str, settings: ConvertSettings, work: str) -> Listing:
    folder, name = os.path.split(src)
    lower = name.lower()
    if lower.endswith(".parquet"):
        return list_parquet(folder or ".", [name], settings, work)
    if lower.endswith(".bin"):
        return list_cifar(folder or ".", [name], settings)
    if lower.endswith(".tar"):
        return _list_tars(folder or ".", [name], settings)
    if re.search(r"\.(tgz|tar\.\w+|zip|7z)$", lower):
        raise UserError(f"{printable(src)}: a compressed archive cannot be read in place; unpack it to a .tar first")
    raise UserError(f"{printable(src)}: not a known source; give {SOURCES}")


def _list_folder(src: str, settings: ConvertSettings) -> Listing:
    """SRC/CLASS/IMAGE, or, with a label file, SRC/IMAGE."""
    builder = Builder("folder", fixed_classes(settings))
    ignored = builder.listing.ignored
    if settings.labels is not None:
        found = [entry.name for entry in scan(src) if not is_clutter(entry.name)]
        label_of, classes = read_labels(settings.labels, found)
        folder = builder.file(src)
        for name in found:
            if name in label_of:
                _add_file(builder, src, folder, name, label_of[name])
            elif os.path.realpath(os.path.join(src, name)) != os.path.realpath(settings.labels):
                builder.fault(name, f"has no label in {printable(settings.labels)}")
        return builder.done(src, classes)
    classes = []
    for entry in scan(src):
        path = os.path.join(src, entry.name)
        if is_clutter(entry.name) or not os.path.isdir(path):
            ignored.append(printable(entry.name))
            continue
        before = len(builder.listing.names)
        folder = builder.file(path)
        for inner in scan(path):
            name = f"{entry.name}/{inner.name}"
            if is_clutter(inner.name):
                ignored.append(printable(name))
            else:
                _add_file(builder, src, folder, name, entry.name)
        if len(builder.listing.names) == before:
            raise UserError(
                f"{printable(path)}: no image in this class; put images directly in it, remove the folder, or, if it "
                f"is itself a folder of classes, convert {printable(path)}"
            )
        classes.append(entry.name)
    if not classes:
        raise UserError(f"{printable(src)}: no class folders in it; give {SOURCES}")
    return builder.done(src, classes)


def _add_file(builder: Builder, root: str, folder: int, name: str, label: int | str) -> None:
    status = regular(os.path.join(root, name))
    if isinstance(status, str):
        builder.fault(name, status)
    else:
        builder.add(name, label, folder, -1, status.st_size, status.st_mtime_ns)


def _list_tars(root: str, names: list[str], settings: ConvertSettings) -> Listing:
    """ImageNet's tar of class tars, a folder of class tars, a flat tar with a label file, or shards of key.jpg and
    key.cls; told by what the tars hold."""
    builder = Builder("tar", fixed_classes(settings))
    flat: list[tuple[str, int, int, int, int]] = []
    for name in names:
        path = os.path.join(root, name)
        status = regular(path)
        if isinstance(status, str):
            raise UserError(f"{printable(path)}: {status}; mend or remove it")
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{printable(path)}: cannot be opened ({error.strerror}); mend its permissions") from None
        try:
            _list_tar(builder, fd, path, name, status, flat)
        finally:
            os.close(fd)
    if not flat:
        return builder.done(os.path.join(root, names[0]))
    if settings.labels is not None:
        label_of, classes = read_labels(settings.labels, [os.path.basename(row[0]) for row in flat])
        for row in flat:
            label = label_of.get(os.path.basename(row[0]))
            if label is None:
                builder.fault(row[0], f"has no label in {printable(settings.labels)}")
            else:
                builder.add(row[0], label, *row[1:])
        return builder.done(root, classes)
    if len(names) == 1 or builder.listing.names:
        raise UserError(
            f"{printable(os.path.join(root, names[0]))}: its images carry no labels (neither key.cls nor tars of "
            "classes); give `labels`: a label file or ImageNet's devkit"
        )
    for row in flat:  # one tar per class, as in ImageNet's outer tar
        builder.add(row[0], os.path.splitext(os.path.basename(builder.listing.files[row[1]]))[0], *row[1:])
    return builder.done(root)


def _list_tar(
    builder: Builder, fd: int, path: str, name: str, status: os.stat_result, flat: list[tuple[str, int, int, int, int]]
) -> None:
    """Adds one tar's images: those of inner tars and those with a key.cls to the builder, others to `flat`."""
    number, stamp = builder.file(path), status.st_mtime_ns
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, tuple[int, int]] = {}

    def walk(prefix: str, start: int, size: int | None) -> Iterator[tuple[str, str, int, int]]:
        try:
            for member in members(fd, start, size):
                if member.fault:
                    builder.fault(prefix + member.name, member.fault)
                elif not is_clutter(os.path.basename(member.name)):
                    yield prefix + member.name, member.name, member.offset, member.size
        except (TarDamaged, OSError) as error:
            builder.fault(prefix.removesuffix("/"), str(error))

    for full, inner, offset, size in walk(f"{name}/", 0, None):
        folder, _, base = inner.rpartition("/")
        stem, _, ending = base.partition(".")
        ending, key = ending.lower(), f"{folder}/{stem}"
        if ending == "tar":
            for image, _, image_offset, image_size in walk(f"{full}/", offset, size):
                builder.add(image, stem, number, image_offset, image_size, stamp)
        elif ending == "cls":
            labels[key] = (offset, size)
        elif ending in IMAGE_ENDINGS:
            if key in images:
                builder.fault(full, "a second image of the same key: not read")
            else:
                images[key] = (full, offset, size)
        else:
            builder.listing.ignored.append(printable(full))
    for key, (full, offset, size) in images.items():
        if not labels:
            flat.append((full, number, offset, size, stamp))
            continue
        where = labels.get(key, (0, 0))
        text = os.pread(fd, min(where[1], 32), where[0]).strip()
        if key not in labels:
            builder.fault(full, "has no .cls of the same key")
        elif not re.fullmatch(rb"\d{1,9}", text):
            builder.fault(full, "its .cls holds no class number")
        else:
            builder.add(full, int(text), number, offset, size, stamp)
