"""Sources whose images are records of larger files: CIFAR's binary files and parquet."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
from typing import Any

import numpy as np

from pipelines.convert.labels import fixed_classes
from pipelines.convert.listing import DISK_FULL, Builder, Listing, read_text, regular
from pipelines.errors import UserError, printable
from pipelines.read.image_prep import ConvertSettings
from pipelines.untrusted import Refused, confined

IMAGE_COLUMNS = ("image", "img", "jpg")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")
CIFAR_FILE = r"(data_batch_\d+|test_batch|train|test)\.bin"
CIFAR_PIXELS = 3 * 32 * 32
MAX_ROWS = 1 << 22  # of one parquet file; the hub's have some ten thousand
UNPACKED_SHARE = 20  # images against the parquet file that holds them


def list_cifar(root: str, names: list[str], settings: ConvertSettings) -> Listing:
    """CIFAR-10's and CIFAR-100's binary version: records of one label byte (100: coarse and fine) and 3072 of pixels,
    channel after channel (https://www.cs.toronto.edu/~kriz/cifar.html)."""
    builder = Builder("cifar", fixed_classes(settings))
    if len(names) > 1:  # all of a folder
        wanted = settings.split or "train"
        names = [name for name in names if name.startswith(("test",) if wanted == "test" else ("data_batch", "train"))]
        if wanted not in ("train", "test") or not names:
            raise UserError(f"split {settings.split!r}: {printable(root)} holds train and test; choose one of them")
    hundred = names[0] in ("train.bin", "test.bin")
    record = CIFAR_PIXELS + (2 if hundred else 1)
    for name in names:
        path = os.path.join(root, name)
        status = regular(path)
        if isinstance(status, str):
            raise UserError(f"{printable(path)}: {status}")
        if not status.st_size or status.st_size % record:
            raise UserError(f"{printable(path)}: {status.st_size} bytes are no multiple of {record}; download it again")
        number = builder.file(path)
        data = np.memmap(path, np.uint8, "r").reshape(-1, record)
        for i, label in enumerate(data[:, record - CIFAR_PIXELS - 1].tolist()):
            offset = i * record + record - CIFAR_PIXELS
            builder.add(f"{name}/{i}", label, number, offset, CIFAR_PIXELS, status.st_mtime_ns)
    classes_file = os.path.join(root, "fine_label_names.txt" if hundred else "batches.meta.txt")
    classes = _cifar_classes(classes_file)
    return builder.done(root, classes)


def _cifar_classes(path: str) -> list[str] | None:
    """Names of a CIFAR list, whose last line is empty; None where there is no such file."""
    if not os.path.exists(path):
        return None
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def files_of_split(src: str, names: list[str], settings: ConvertSettings) -> list[str]:
    """Files of the wanted split, by the words before their numbers (train-00000-of-00014.parquet)."""
    split_of = {name: re.split(r"[-_.]\d|\.parquet$", os.path.basename(name))[0] for name in names}
    splits = sorted(set(split_of.values()))
    if settings.split is None and len(splits) > 1:
        raise UserError(f"{printable(src)}: holds {', '.join(map(printable, splits))}; choose one of them as `split`")
    chosen = [name for name in names if settings.split in (None, split_of[name])]
    if not chosen:
        raise UserError(f"split {settings.split!r}: {printable(src)} holds {', '.join(map(printable, splits))}")
    return chosen


def list_parquet(root: str, names: list[str], settings: ConvertSettings, work: str) -> Listing:
    """Rows with an encoded image (bytes, or Hugging Face's struct of bytes and path) and a label.

    Parquet cannot be read image by image, so the images are first copied out of it, as they are, into `work`.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError("parquet needs pyarrow: pip install pyarrow")
    builder = Builder("parquet", fixed_classes(settings))
    classes = None
    needed = sum(os.path.getsize(os.path.join(root, name)) for name in names)
    needed -= sum(entry.stat().st_size for entry in os.scandir(work))  # copies made by an earlier run
    free = shutil.disk_usage(work).free
    if needed > free:
        raise UserError(
            f"{printable(root)}: its images are copied beside the result while it is made, {needed / 1e9:.1f} GB, but "
            f"{free / 1e9:.1f} GB are free there; free some or choose another disk"
        )
    for name in names:
        path = os.path.join(root, name)
        status = regular(path)
        if isinstance(status, str):
            raise UserError(f"{printable(path)}: {status}")
        identity = f"{name}\n{status.st_size}\n{status.st_mtime_ns}".encode("utf-8", "surrogateescape")
        base = os.path.join(work, f"spool-{hashlib.sha256(identity).hexdigest()[:24]}")
        try:
            labels, its_classes = confined(unpack_parquet, path, base, settings.max_bytes)
        except Refused as error:
            raise UserError(f"{printable(path)}: cannot be read as parquet ({error}); download it again") from None
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
            raise UserError(f"{printable(path)}: cannot be read ({error.strerror}); mend that") from None
        classes = classes or its_classes
        spool, offsets = f"{base}.bin", np.load(f"{base}.npy", allow_pickle=False)
        number = builder.file(spool)
        for i, value in enumerate(labels):
            row = f"{name}/{i}"
            if offsets[i, 0] < 0:
                too_long = f"{offsets[i, 1]} bytes are more than {settings.max_bytes} (max_bytes)"
                builder.fault(row, too_long if offsets[i, 1] else "the row has no image bytes")
            elif not isinstance(value, (int, str)):
                builder.fault(row, "the row has no label")
            else:
                builder.add(row, value, number, int(offsets[i, 0]), int(offsets[i, 1]), status.st_mtime_ns)
    return builder.done(root, classes)


def _column(path: str, names: list[str], known: tuple[str, ...]) -> str:
    for name in known:
        if name in names:
            return name
    found = ", ".join(map(printable, names))
    raise UserError(f"{printable(path)}: no column {' or '.join(known)} among {found}; rename it")


def _hugging_face_classes(metadata: dict[bytes, bytes] | None, label: str) -> list[str] | None:
    """Class names from the schema's metadata as `datasets` writes it."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return [str(name) for name in names] if isinstance(names, list) and names else None


def unpack_parquet(path: str, base: str, max_bytes: int) -> tuple[list[Any], list[str] | None]:
    """Copies a parquet file's images into BASE.bin, once, with offset and length of each row's image in BASE.npy, int64
    [rows, 2]: (-1, 0) where a row has none, (-1, length) where it is longer than max_bytes.

    Returns the rows' labels and the class names, where the file has them. Raises UserError, OSError, and what pyarrow
    raises for damaged files. Few bytes of parquet may stand for any number of rows and images, so both are bounded.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False) as file:
        schema = file.schema_arrow
        image, label = (_column(path, schema.names, known) for known in (IMAGE_COLUMNS, LABEL_COLUMNS))
        if file.metadata.num_rows > MAX_ROWS:
            raise UserError(f"{path}: {file.metadata.num_rows} rows, more than {MAX_ROWS}; make several files of it")
        labels: list[Any] = []
        for batch in file.iter_batches(batch_size=4096, columns=[label]):
            labels += [value if isinstance(value, (int, str)) else None for value in batch.column(0).to_pylist()]
            if len(labels) > MAX_ROWS:
                raise UserError(f"{path}: more than {MAX_ROWS} rows; make several files of it")
        if not os.path.exists(f"{base}.npy"):
            _copy_images(file, image, path, base, max_bytes, len(labels))
        return labels, _hugging_face_classes(schema.metadata, label)


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
    os.rename(f"{base}.npy.part", f"{base}.npy")  # the index says that the copy is whole
