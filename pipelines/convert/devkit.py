"""ImageNet's devkit (ILSVRC2012_devkit_t12): the classes of the validation images, by WordNet id."""

from __future__ import annotations

import gzip
import importlib.util
import io
import os
import tarfile

from pipelines.convert.listing import in_order
from pipelines.errors import UserError, printable
from pipelines.untrusted import Refused, confined, open_regular, read_bytes

MAX_DEVKIT = 1 << 26  # bytes, unpacked; ImageNet's has 20 MB


def is_devkit(path: str) -> bool:
    """Whether a label file is the devkit, as its .tar.gz or unpacked."""
    return os.path.isdir(path) or path.endswith((".tar.gz", ".tgz"))


def devkit_labels(path: str, names: list[str]) -> tuple[dict[str, str], list[str]]:
    """WordNet id of each image, by the order of the names, and all WordNet ids. Raises UserError."""
    if importlib.util.find_spec("scipy") is None:
        raise UserError("labels: the devkit's meta.mat needs scipy: pip install scipy")
    try:
        wnids, labels = confined(read_devkit, path)
    except (Refused, OSError) as error:
        raise UserError(f"--labels {printable(path)}: not ImageNet's devkit ({error})") from None
    if len(labels) != len(names):
        raise UserError(
            f"--labels {printable(path)}: {len(labels)} labels for {len(names)} images; use the tar of the same year"
        )
    return dict(zip(in_order(names, f"--labels {printable(path)}"), labels, strict=True)), wnids


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
