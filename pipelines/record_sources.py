"""Sources whose images are records of larger files: CIFAR's binary files and parquet."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import UserError
from pipelines.image_prep import ConvertSettings
from pipelines.label_files import fixed_classes
from pipelines.listing import DISK_FULL, Builder, Listing, read_text, regular
from pipelines.source import printable

IMAGE_COLUMNS = ("image", "img", "jpg")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")
CIFAR_FILE = r"(data_batch_\d+|test_batch|train|test)\.bin"
CIFAR_PIXELS = 3 * 32 * 32


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
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError("parquet needs pyarrow: pip install pyarrow") from None
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
        try:
            status = os.stat(path)
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                image, label = (_column(path, schema.names, known) for known in (IMAGE_COLUMNS, LABEL_COLUMNS))
                classes = classes or _hugging_face_classes(schema.metadata, label)
                spool, offsets = _spool(file, image, work, f"{name}\n{status.st_size}\n{status.st_mtime_ns}")
                labels = file.read(columns=[label])[label].to_pylist()
        except UserError:
            raise
        except Exception as error:  # pyarrow's errors are of many kinds
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise
            reason = " ".join(str(error).split())
            raise UserError(f"{printable(path)}: cannot be read as parquet ({reason}); download it again") from None
        number = builder.file(spool)
        for i, value in enumerate(labels):
            row = f"{name}/{i}"
            if offsets[i, 0] < 0:
                builder.fault(row, "the row has no image bytes")
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


def _spool(file: Any, column: str, work: str, identity: str) -> tuple[str, npt.NDArray[np.int64]]:
    """Copies a parquet file's images into one file in `work`, once. Returns its path and offset and length of each
    row's image, int64 [rows, 2], (-1, 0) where a row has none."""
    base = os.path.join(work, f"spool-{hashlib.sha256(identity.encode('utf-8', 'surrogateescape')).hexdigest()[:24]}")
    data, index = f"{base}.bin", f"{base}.npy"
    if not os.path.exists(index):
        rows, at = [], 0
        with open(data, "wb") as out:
            for batch in file.iter_batches(batch_size=64, columns=[column]):
                for value in batch.column(0).to_pylist():
                    content = value.get("bytes") if isinstance(value, dict) else value
                    if isinstance(content, bytes):
                        out.write(content)
                        rows.append((at, len(content)))
                        at += len(content)
                    else:
                        rows.append((-1, 0))
            out.flush()
            os.fsync(out.fileno())
        with open(f"{index}.part", "wb") as out:
            np.save(out, np.array(rows, np.int64).reshape(-1, 2))
            out.flush()
            os.fsync(out.fileno())
        os.rename(f"{index}.part", index)  # the index says that the copy is whole
    return data, np.load(index, allow_pickle=False)
