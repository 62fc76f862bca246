"""X.beton.json, the manifest beside a converted file. Its fields:

format             1
samples, bytes, sha256   of the .beton
fingerprint        of the data: class and original bytes of each sample, whatever the samples' order, the names and
                   kind of the files that they came from, and the settings. Two files of one fingerprint hold the
                   same images with the same classes.
classes            names, in the order of the labels;  samples_per_class: counts in the same order
conversion         {id, part, parts, images}: this file is `part` (from 0) of the `parts` that together hold each of
                   the source's `images` once. Parts of one conversion have one `id`: the digest of the source's
                   names, labels and sizes, the classes, the settings and `parts`. A data set opened from several
                   files is complete when they have one id and the parts 0 .. parts - 1, each once.
                   Manifests of version 0.1.0 lack it, and `fingerprint`; their `shard` is [part, parts].
shard              [part, parts], as in version 0.1.0
source             {kind, sha256}: the digest of the samples' names, labels and original bytes in the source's order
settings, versions what the bytes depend on besides the source
counts             samples, faults, ignored entries, and what was done to how many images
faults             [{name, reason}]: what should have been an image and is left out
ignored            names of what was passed over because it is no image of a class
request            digest of all that was asked for; a conversion run again finds its work done by it
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.convert.listing import Listing
from pipelines.convert.workers import DoneTask
from pipelines.read.image_prep import ConvertSettings, library_versions

MANIFEST_VERSION = 1
_LISTED = ("labels", "classes", "split", "kind", "label_from", "label_key")
"""settings whose effect on the samples shows in the listing"""


def shown_settings(settings: ConvertSettings) -> dict[str, Any]:
    """The settings that the bytes of samples depend on."""
    return {name: value for name, value in asdict(settings).items() if name not in _LISTED}


def conversion_id(listing: Listing, settings: ConvertSettings, parts: int) -> str:
    """Digest that all parts of one conversion share, also where they are made on different machines."""
    digest = hashlib.sha256("\n".join(listing.names).encode("utf-8", "surrogateescape"))
    for column in (listing.labels, listing.sizes):
        digest.update(column.astype("<i8").tobytes())
    digest.update(json.dumps([listing.kind, listing.classes, shown_settings(settings), parts]).encode())
    return digest.hexdigest()


def data_fingerprint(samples: npt.NDArray[Any], labels: npt.NDArray[np.int64], classes: list[str]) -> str:
    """See `fingerprint` above. samples: SAMPLE_TYPE [N]; labels: [N]."""
    names = [hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:16] for name in classes]
    rows = sorted(names[label] + sample.tobytes() for label, sample in zip(labels, samples["digest"], strict=True))
    return hashlib.sha256(b"".join(rows)).hexdigest()


def source_digest(listing: Listing, samples: npt.NDArray[Any]) -> str:
    """Digest of the stored images' names, labels and original bytes, in the source's order: that of the data alone,
    wherever and in whichever order it is stored."""
    digest = hashlib.sha256()
    for sample in samples[np.argsort(samples["source"])]:
        source = int(sample["source"])
        name = listing.names[source].encode("utf-8", "surrogateescape")
        digest.update(b"%s\0%d\0%s" % (name, listing.labels[source], sample["digest"].tobytes()))
    return digest.hexdigest()


def make_manifest(
    listing: Listing,
    settings: ConvertSettings,
    shard: tuple[int, int],
    samples: npt.NDArray[Any],
    faults: list[tuple[str, str]],
    done: list[DoneTask],
) -> dict[str, Any]:
    """The manifest but for `bytes`, `sha256` and `request`. samples: SAMPLE_TYPE [N]."""
    labels = listing.labels[samples["source"]]
    how = sum((Counter(task.how) for task in done), Counter[str]())
    return {
        "format": MANIFEST_VERSION,
        "samples": len(samples),
        "fingerprint": data_fingerprint(samples, labels, listing.classes),
        "conversion": {
            "id": conversion_id(listing, settings, shard[1]),
            "part": shard[0],
            "parts": shard[1],
            "images": len(listing),
        },
        "source": {"kind": listing.kind, "sha256": source_digest(listing, samples)},
        "settings": shown_settings(settings),
        "shard": list(shard),
        "versions": library_versions(),
        "counts": {"samples": len(samples), "faults": len(faults), "ignored": len(listing.ignored)}
        | dict(sorted(how.items())),
        "faults": [{"name": name, "reason": reason} for name, reason in faults],
        "ignored": listing.ignored,
        "samples_per_class": np.bincount(labels, minlength=len(listing.classes)).tolist(),
        "classes": listing.classes,
    }
