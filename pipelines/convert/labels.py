"""Lists of labels and class names that lie in files of their own."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
import os
import re
import tarfile

from pipelines.convert.listing import read_text
from pipelines.errors import UserError, printable
from pipelines.read.image_prep import ConvertSettings
from pipelines.read.source import printable_names
from pipelines.untrusted import Refused, confined, open_regular, read_bytes

MAX_DEVKIT = 1 << 26  # bytes, unpacked; ImageNet's has 20 MB


def fixed_classes(settings: ConvertSettings) -> list[str] | None:
    """The class names that the user gave, if any."""
    return None if settings.classes is None else read_classes(settings.classes)


def read_classes(path: str) -> list[str]:
    """Class names from a manifest (JSON with `classes`) or from text with one on each line. Raises UserError."""
    text = read_text(path)
    try:
        found = json.loads(text)["classes"] if text.lstrip().startswith("{") else text.splitlines()
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"classes {printable(path)}: JSON without a list `classes`; give a beton's manifest") from None
    is_list = isinstance(found, list) and all(isinstance(name, str) for name in found)
    names = printable_names([name.strip() for name in found]) if is_list else None
    if not names or "" in names:
        raise UserError(f"classes {printable(path)}: must hold different, non-empty names, one on each line")
    return names


def read_labels(path: str, names: list[str]) -> tuple[dict[str, int | str], list[str] | None]:
    """Label of each image by file name, and the class names where the file tells them.

    Known: lines of LABEL in the order of the images' names; lines of NAME LABEL or NAME,LABEL ... (Kaggle's
    LOC_val_solution.csv); ImageNet's devkit, as its .tar.gz or unpacked. Labels are class names or numbers from 0.
    """
    if os.path.isdir(path) or path.endswith((".tar.gz", ".tgz")):
        return _devkit(path, names)
    try:
        rows = [row for row in csv.reader(read_text(path).replace("\t", " ").splitlines()) if row and row[0].strip()]
    except csv.Error as error:
        raise UserError(f"labels {printable(path)}: cannot be read as text of columns ({error}); mend it") from None
    fields = [" ".join(row).split() for row in rows]
    if all(len(row) == 1 for row in fields):
        if len(fields) != len(names):
            raise UserError(f"labels {printable(path)}: {len(fields)} lines for {len(names)} images; give one each")
        label_of = dict(zip(sorted(names), (row[0] for row in fields), strict=True))
    else:
        if fields[0][0].lower() in ("imageid", "image", "filename", "file", "name"):
            fields = fields[1:]
        if any(len(row) < 2 for row in fields):
            raise UserError(f"labels {printable(path)}: some lines hold a name and a label, others do not; mend it")
        label_of = {row[0]: row[1] for row in fields}
        stems = {os.path.splitext(name)[0]: name for name in names}
        label_of |= {stems[key]: label for key, label in label_of.items() if key in stems}
    if not all(re.fullmatch(r"\d{1,9}", label) for label in label_of.values()):
        return dict(label_of), None
    if label_of and min(map(int, label_of.values())) > 0:
        raise UserError(
            f"labels {printable(path)}: numbers begin at 1; if it is ImageNet's ground truth, give the devkit "
            "(ILSVRC2012_devkit_t12.tar.gz), which says which class each stands for; otherwise number from 0"
        )
    return {name: int(label) for name, label in label_of.items()}, None


def _devkit(path: str, names: list[str]) -> tuple[dict[str, int | str], list[str] | None]:
    """ImageNet's devkit: the ground truth in the order of the images' names, as WordNet ids by its own table."""
    if importlib.util.find_spec("scipy") is None:
        raise UserError("labels: the devkit's meta.mat needs scipy: pip install scipy")
    try:
        wnids, labels = confined(read_devkit, path)
    except (Refused, OSError) as error:
        raise UserError(f"labels {printable(path)}: not ImageNet's devkit ({error})") from None
    if len(labels) != len(names):
        raise UserError(
            f"labels {printable(path)}: {len(labels)} labels for {len(names)} images; use the tar of the same year"
        )
    return dict(zip(sorted(names), labels, strict=True)), wnids


def read_devkit(path: str) -> tuple[list[str], list[str]]:
    """All WordNet ids in order, and that of each image of the validation set. Raises errors of many kinds."""
    import scipy.io

    parts = {"meta.mat": b"", "ILSVRC2012_validation_ground_truth.txt": b""}
    if os.path.isdir(path):
        for part in parts:
            parts[part] = read_bytes(os.path.join(path, "data", part), MAX_DEVKIT)
    else:
        with open_regular(path) as file, gzip.GzipFile(fileobj=file) as unpacked:
            content = unpacked.read(MAX_DEVKIT + 1)
        if len(content) > MAX_DEVKIT:
            raise ValueError(f"more than {MAX_DEVKIT} bytes when unpacked")
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in tar:
                base = os.path.basename(member.name)
                stream = tar.extractfile(member) if base in parts and member.isreg() else None
                if stream is not None:
                    parts[base] = stream.read(MAX_DEVKIT)
    table = scipy.io.loadmat(io.BytesIO(parts["meta.mat"]), squeeze_me=True)["synsets"]
    wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table if int(row["num_children"]) == 0}
    labels = [wnid_of[int(line)] for line in parts["ILSVRC2012_validation_ground_truth.txt"].split()]
    return sorted(wnid_of.values()), labels
