"""Sources whose images are records of larger files: CIFAR's binary files and parquet."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from dataclasses import replace
from typing import Any

import numpy as np

from pipelines.convert.labels import LABEL_COLUMNS, parse_labels
from pipelines.convert.listing import DISK_FULL, Builder, Listing, read_text
from pipelines.convert.splits import are_several, split_column, split_of, wrong_split
from pipelines.convert.trees import Entry, Tree, add_missing_parts
from pipelines.errors import UserError, printable
from pipelines.read.image_prep import ConvertSettings
from pipelines.read.manifest import normal
from pipelines.untrusted import Refused, confined

IMAGE_COLUMNS = ("image", "img", "jpg")
CIFAR_FILE = r"(data_batch_\d+|test_batch|train|test)\.bin"
CIFAR_PIXELS = 3 * 32 * 32
MAX_ROWS = 1 << 22  # of one parquet file; the hub's have some ten thousand
UNPACKED_SHARE = 20  # images against the parquet file that holds them
Unpacked = tuple[str, list[int | str | None], list[str] | None, list[str]]
"""of a parquet file: its copy's path without ending, the labels, class names and the rows' splits, where it has them"""


def list_cifar(tree: Tree, entries: list[Entry], settings: ConvertSettings, builder: Builder, work: str) -> Listing:
    """CIFAR-10's and CIFAR-100's binary version: records of one label byte (100: coarse and fine) and 3072 of pixels,
    channel after channel (https://www.cs.toronto.edu/~kriz/cifar.html)."""
    if settings.split is not None or len(entries) > 1:  # of a folder
        wanted = settings.split or "train"
        starts = {"train": ("data_batch", "train"), "test": ("test",)}.get(wanted)
        entries = [entry for entry in entries if starts and entry.name.startswith(starts)]
        if not entries:
            raise UserError(f"--split {settings.split!r}: not in {printable(tree.source)}; choose train or test")
    add_missing_parts(tree, entries, builder)
    hundred = entries[0].name in ("train.bin", "test.bin")
    record = CIFAR_PIXELS + (2 if hundred else 1)
    for entry in entries:
        path = tree.place(entry.name)
        if entry.fault:
            raise UserError(f"{printable(path)}: {entry.fault}")
        if not entry.size or entry.size % record:
            raise UserError(f"{printable(path)}: {entry.size} bytes are no multiple of {record}; download it again")
        local = tree.local(entry.name)
        number = builder.file(local)
        data = np.memmap(local, np.uint8, "r").reshape(-1, record)
        labels = data[:, record - CIFAR_PIXELS - 1]
        if labels.max() >= (100 if hundred else 10):
            raise UserError(
                f"{printable(path)}: has label {labels.max()}, so it is no file of CIFAR; download it again"
            )
        for i, label in enumerate(labels.tolist()):
            offset = i * record + record - CIFAR_PIXELS
            builder.add(f"{entry.name}/{i}", label, number, offset, CIFAR_PIXELS, entry.stamp)
    names_file = "fine_label_names.txt" if hundred else "batches.meta.txt"
    classes = None
    for entry in tree.children():
        if entry.name == names_file:  # one name a line, the last line empty
            lines = read_text(tree.local(entry.name)).splitlines()
            classes = [line.strip() for line in lines if line.strip()]
    return builder.done(tree.source, classes)


def list_parquet(tree: Tree, entries: list[Entry], settings: ConvertSettings, builder: Builder, work: str) -> Listing:
    """Rows with an encoded image (bytes, or Hugging Face's struct of bytes and path) and a label.

    Parquet cannot be read image by image, so the images are first copied out of it, as they are, into `work`. Labels
    stored as text are class names or numbers, see `labels`.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError("parquet needs pyarrow: pip install pyarrow")
    add_missing_parts(tree, entries, builder)
    needed = sum(entry.size for entry in entries)
    needed -= sum(entry.stat().st_size for entry in os.scandir(work))  # copies made by an earlier run
    free = shutil.disk_usage(work).free
    if needed > free:
        raise UserError(
            f"{printable(tree.source)}: its images are copied beside the result while it is made, "
            f"{needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free there; free some or choose another disk"
        )
    rows: list[tuple[str, int | str, int, int, int, int]] = []
    parts, classes, split = _unpacked_all(tree, entries, settings, work)
    for entry, (base, labels, _, column) in zip(entries, parts, strict=True):
        offsets = np.load(f"{base}.npy", allow_pickle=False)
        number = builder.file(f"{base}.bin")
        for i, value in enumerate(labels):
            name = f"{entry.name}/{i}"
            if split is not None and column and column[i] != split:
                continue
            if offsets[i, 0] < 0:
                too_long = f"{offsets[i, 1]} bytes are more than {settings.max_bytes} (max_bytes)"
                builder.fault(name, too_long if offsets[i, 1] else "the row has no image bytes")
            elif value in (None, "", -1):
                builder.fault(name, "label -1 (an unlabelled test split?)" if value == -1 else "the row has no label")
            else:
                rows.append((name, value, number, int(offsets[i, 0]), int(offsets[i, 1]), entry.stamp))
    values = [row[1] for row in rows]
    if any(isinstance(value, str) for value in values):
        known = builder.fixed_classes or classes
        parsed = parse_labels(
            [str(value) for value in values], known, f"{printable(tree.source)}: the column of labels"
        )
        values = list(parsed)
    for row, value in zip(rows, values, strict=True):
        builder.add(row[0], value, *row[2:])
    return builder.done(tree.source, classes)


def _unpacked_all(
    tree: Tree, entries: list[Entry], settings: ConvertSettings, work: str
) -> tuple[list[Unpacked], list[str] | None, str | None]:
    """What `_unpacked` returns for each file, the class names, and the split that the rows are narrowed to, if any.

    Where the files are called by the wanted split, they need no column. Raises UserError where the column holds several
    splits and none is chosen, or not the one asked for.
    """
    named = split_of(entries[0].name) == settings.split
    needed = None if named else settings.split
    parts: list[Unpacked] = []
    classes: list[str] | None = None
    splits: set[str] = set()
    for entry in entries:
        parts.append(_unpacked(tree, entry, replace(settings, split=needed), work))
        _, _, its_classes, column = parts[-1]
        splits.update(column)
        if settings.split is None and are_several(splits):
            raise wrong_split(printable(tree.source), splits, None)
        if classes and its_classes and normal(classes) != normal(its_classes):
            raise UserError(f"{printable(tree.place(entry.name))}: names other classes than the files before it")
        classes = classes or its_classes
    if settings.split in splits:
        return parts, classes, settings.split
    if settings.split is not None and (not named or are_several(splits)):
        raise wrong_split(printable(tree.source), splits, settings.split)
    return parts, classes, None


def _unpacked(tree: Tree, entry: Entry, settings: ConvertSettings, work: str) -> Unpacked:
    """Copies one file's images into `work`, once."""
    place = tree.place(entry.name)
    if entry.fault:
        raise UserError(f"{printable(place)}: {entry.fault}")
    identity = f"{entry.name}\n{entry.size}\n{entry.stamp}".encode("utf-8", "surrogateescape")
    base = os.path.join(work, f"spool-{hashlib.sha256(identity).hexdigest()[:24]}")
    try:
        local = tree.local(entry.name)
        limits = settings.max_bytes, settings.label_key, settings.split
        labels, classes, splits = confined(unpack_parquet, local, base, *limits)
    except Refused as error:
        raise UserError(f"{printable(place)}: cannot be read as parquet ({error}); download it again") from None
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise UserError(f"{printable(place)}: cannot be read ({error.strerror}); fix that") from None
    return base, labels, classes, splits


def _column(path: str, names: list[str], known: tuple[str, ...], key: str | None = None) -> str:
    """The column that holds images or labels. Raises UserError where there is none or it is not certain."""
    columns = ", ".join(map(printable, names))
    found = [name for name in known if name in names] if key is None else [name for name in names if name == key]
    if len(found) == 1:
        return found[0]
    option = "rename one" if known is IMAGE_COLUMNS else "name the right one by --label-key"
    if found:
        raise UserError(f"{printable(path)}: several columns may be meant: {', '.join(found)}; {option}")
    wanted = printable(key) if key is not None else " or ".join(known)
    raise UserError(f"{printable(path)}: no column {wanted} among {columns}; {option}")


def _hugging_face_classes(metadata: dict[bytes, bytes] | None, label: str) -> list[str] | None:
    """Class names from the schema's metadata as `datasets` writes it."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return [str(name) for name in names] if isinstance(names, list) and names else None


def unpack_parquet(
    path: str, base: str, max_bytes: int, label_key: str | None = None, split: str | None = None
) -> tuple[list[Any], list[str] | None, list[str]]:
    """Copies a parquet file's images into BASE.bin, once, with offset and length of each row's image in BASE.npy, int64
    [rows, 2]: (-1, 0) where a row has none, (-1, length) where it is longer than max_bytes.

    Returns the rows' labels (integers, text, or None where a row has none), the class names, where the file has them,
    and the rows' splits, where a column holds them; that column has to be there if `split` is given. Raises UserError,
    OSError, and what pyarrow raises for damaged files. Few bytes of parquet may stand for any number of rows and
    images, so both are bounded.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False) as file:
        schema = file.schema_arrow
        image = _column(path, schema.names, IMAGE_COLUMNS)
        label = _column(path, schema.names, LABEL_COLUMNS, label_key)
        if file.metadata.num_rows > MAX_ROWS:
            raise UserError(f"{path}: {file.metadata.num_rows} rows, more than {MAX_ROWS}; make several files of it")
        column = split_column(schema.names, label)
        if split is not None and column is None:
            raise UserError(f"--split {split!r}: {path} is not called so, and has no column split; leave it out")
        labels: list[Any] = []
        splits: list[str] = []
        for batch in file.iter_batches(batch_size=4096, columns=[label, *([column] if column else [])]):
            labels += [_label(value, path) for value in batch.column(label).to_pylist()]
            splits += [str(value) for value in batch.column(column).to_pylist()] if column else []
            if len(labels) > MAX_ROWS:
                raise UserError(f"{path}: more than {MAX_ROWS} rows; make several files of it")
        if not os.path.exists(f"{base}.npy"):
            _copy_images(file, image, path, base, max_bytes, len(labels))
        return labels, _hugging_face_classes(schema.metadata, label), splits


def _label(value: Any, path: str) -> int | str | None:
    """A row's label. Raises UserError for a value that is none of one class."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, float):
        if value != value:  # NaN: the row has none
            return None
        if not value.is_integer():
            raise UserError(f"{path}: label {value} is no class number; name the right column by --label-key")
        return int(value)
    if value is not None and not isinstance(value, (int, str)):
        kind = type(value).__name__
        raise UserError(f"{path}: label is a {kind}, not one class; name the right column by --label-key")
    return value


def _copy_images(file: Any, column: str, path: str, base: str, max_bytes: int, count: int) -> None:
    limit = UNPACKED_SHARE * os.path.getsize(path) + max_bytes
    rows, at = [], 0
    with open(f"{base}.bin", "wb") as out:
        for batch in file.iter_batches(batch_size=64, columns=[column]):
            for value in batch.column(0).to_pylist():
                content = value.get("bytes") if isinstance(value, dict) else value
                if not isinstance(content, bytes) or len(content) > max_bytes:
                    rows.append((-1, len(content) if isinstance(content, bytes) else 0))
                    continue
                out.write(content)
                rows.append((at, len(content)))
                at += len(content)
            if at > limit:
                raise UserError(
                    f"{path}: its images take more than {UNPACKED_SHARE} times the file, which no photographs do; "
                    "look at what they are, and give them as a folder"
                )
        out.flush()
        os.fsync(out.fileno())
    if len(rows) != count:
        raise UserError(f"{path}: {len(rows)} images for {count} labels: damaged; download it again")
    with open(f"{base}.npy.part", "wb") as out:
        np.save(out, np.array(rows, np.int64).reshape(-1, 2))
        out.flush()
        os.fsync(out.fileno())
    os.rename(f"{base}.npy.part", f"{base}.npy")  # where there is an index, the copy is complete
