"""Archives and tables as data sets come in."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np


def tar_bytes(files: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of these files, by name."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as out:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def devkit_files(numbers: dict[str, int], truth: list[int], parents: int = 0) -> dict[str, bytes]:
    """ImageNet's devkit: its table of WordNet ids and their numbers, and the validation images' numbers.

    parents: how many of the ids, the last ones, are no classes but stand above some.
    """
    import scipy.io

    rows = np.zeros(len(numbers), [("ILSVRC2012_ID", object), ("WNID", object), ("num_children", object)])
    for i, (wnid, number) in enumerate(numbers.items()):
        rows[i] = (number, wnid, 3 if i >= len(numbers) - parents else 0)
    table = io.BytesIO()
    scipy.io.savemat(table, {"synsets": rows})
    root = "ILSVRC2012_devkit_t12/data"
    text = "\n".join(map(str, truth)).encode()
    return {f"{root}/meta.mat": table.getvalue(), f"{root}/ILSVRC2012_validation_ground_truth.txt": text}


def write_parquet(path: Path, images: list, labels: list, column: str = "label", names: list | None = None) -> Path:
    """Images and a column of labels; names: of the classes, as the hub's files hold them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"image": images, column: labels})
    if names:
        info = {"info": {"features": {column: {"names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, path, row_group_size=5)
    return path
