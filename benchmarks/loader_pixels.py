"""How much the pixels of two backends differ: the last table of `std-fast bench loader`."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from benchmarks.loader_contestants import Settings, loader_spec
from pipelines.errors import UserError
from pipelines.read.settings import Resample

_CAUSES = {
    "ffcv": "the filter's weights: 12 bits here, 15 in torch",
    "ffcv, area": "FFCV's filter, INTER_AREA, instead of the antialiased triangle",
    "dali": "on a CPU as ffcv; on a GPU nvJPEG's DCT and DALI's filter",
    "resident": "rounds to 8 bits once instead of after each pass",
}
_COMPARED_STEPS = 2


def differences(settings: Settings, names: list[str]) -> list[dict[str, Any]]:
    """Mean and largest absolute difference of the first batches' pixels, of 255, from those of the torch backend, after
    checking that boxes, labels and order are the same."""
    from pipelines import open_loader
    from pipelines.loaders.resident import free_memory, padded_bytes
    from pipelines.read.source import open_source

    def first_batches(name: str) -> list[Any]:
        backend, _, resample = name.partition(", ")
        with open_loader(loader_spec(settings, cast(Resample, resample or "auto")), backend) as loader:
            return [batch for batch, _ in zip(loader.epoch(0), range(_COMPARED_STEPS), strict=False)]

    source = open_source(settings.data)
    all_pixels = padded_bytes(*source.sizes(np.arange(source.num_samples)))  # opens every image of a folder
    reference = first_batches("torch")
    rows = []
    for name in (*names, *(["ffcv, area"] if "ffcv" in names else []), "resident"):
        device = reference[0].images.device
        if name == "torch" or (name == "resident" and all_pixels > free_memory(device) / 4):
            continue
        means, largest = [], 0
        for batch, other in zip(first_batches(name), reference, strict=True):
            if not all(a.equal(b) for a, b in ((batch.labels, other.labels), (batch.positions, other.positions))):
                raise UserError(f"{name} gives other samples than torch: a fault of this program, please report it")
            apart = (batch.images.int() - other.images.int()).abs()
            means.append(apart.float().mean().item())
            largest = max(largest, int(apart.max()))
        rows.append(
            {"pair": f"{name} and torch", "mean": float(np.mean(means)), "largest": largest, "cause": _CAUSES[name]}
        )
    return rows
