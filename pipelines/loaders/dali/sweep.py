"""The best `hw_decoder_load`: which share of the images the GPU's JPEG engine decodes while its cores decode the rest.

It depends on the GPU, the number of CPU threads and the images, so it is measured with the loader's own specification,
once per machine and dataset: the result is kept in the cache folder ($XDG_CACHE_HOME, by default ~/.cache).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipelines.files import write_atomic
from pipelines.loaders.base import available_cores
from pipelines.loaders.dali.loader import DaliLoader
from pipelines.loaders.dali.pipeline import import_dali
from pipelines.read.base import Source
from pipelines.read.batch import LoaderSpec
from pipelines.untrusted import read_json

log = logging.getLogger("std_fast")

LOADS = (0.0, 0.35, 0.65, 0.9, 0.99)
"""values of hw_decoder_load that `sweep` tries"""
STEPS = 12
"""of each; the first is not timed"""


def best_load(spec: LoaderSpec, source: Source) -> float:
    """The kept result for this machine and dataset, else that of a `sweep`, which is then kept. The log shows it."""
    conditions = _conditions(spec, source)
    file = _cache_file(conditions)
    load = _read(file, conditions)
    if load is not None:
        log.info("%s: DALI's hw_decoder_load %.2f, as measured before (%s)", source.path, load, file)
        return load
    load, rows = sweep(spec, source)
    log.info("%s: DALI's hw_decoder_load %.2f, the best of %s", source.path, load, rows)
    _keep(file, {"hw_decoder_load": load, "rows": rows, "conditions": conditions})
    return load


def sweep(
    spec: LoaderSpec, source: Source, loads: tuple[float, ...] = LOADS, steps: int = STEPS
) -> tuple[float, list[dict[str, float]]]:
    """The best hw_decoder_load, and what was measured: images per second for each load."""
    rows = []
    for load in loads:
        with DaliLoader(replace(spec, hw_decoder_load=load), source) as loader:
            count = min(steps, loader.steps_per_epoch)
            epoch = loader.epoch(0)
            next(epoch)  # buffers grow with the first batches
            started = time.perf_counter()
            for _ in range(count - 1):
                next(epoch)
            if loader.device.type == "cuda":
                torch.cuda.synchronize(loader.device)
            seconds = time.perf_counter() - started
        rows.append({"hw_decoder_load": load, "images_per_second": (count - 1) * loader.sampler.local_batch / seconds})
    return max(rows, key=lambda row: row["images_per_second"])["hw_decoder_load"], rows


def _conditions(spec: LoaderSpec, source: Source) -> dict[str, Any]:
    """What the result depends on: machine and dataset."""
    device = torch.device(spec.device)
    return {
        "machine": platform.node(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": spec.threads or available_cores(),
        "dali": import_dali().__version__,
        "dataset": source.fingerprint(),
    }


def _cache_file(conditions: dict[str, Any]) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()
    return home / "std_fast" / "dali" / f"{digest[:32]}.json"


def _read(file: Path, conditions: dict[str, Any]) -> float | None:
    """The kept value; None where there is none that can be used."""
    try:
        kept = read_json(file)
        load = float(kept["hw_decoder_load"])
        return load if 0 <= load <= 1 and kept["conditions"] == conditions else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _keep(file: Path, result: dict[str, Any]) -> None:
    """Writes the file in one piece: other processes may read or write it at the same time."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(result, indent=1))
    except OSError as error:
        log.warning("%s: cannot be written (%s); the next start measures hw_decoder_load again", file, error.strerror)
