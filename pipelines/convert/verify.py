"""Looks into a converted dataset: what it holds (inspect, sample_sheet), and whether it is complete (verify)."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image

from pipelines.errors import CorruptImage, UserError, one_line, printable
from pipelines.read.beton import HEADER_TYPE, BetonSource
from pipelines.read.decode import decode_rgb
from pipelines.sheet import draw_sheet
from pipelines.untrusted import read_json

EDGES = (1, 32, 64, 128, 192, 256, 320, 384, 448, 512, 768, 1024, 2048, 65536)
"""of the histograms, pixels"""
SAMPLES, THUMBNAIL = 32, 128
_BLOCK = 1 << 24


def inspect(path: str) -> dict[str, Any]:
    """What a beton holds, ready for JSON: counts, bytes, sizes in pixels (histograms over EDGES), classes, and what its
    manifest holds about its making (None where there is none). Raises UserError when it is no beton."""
    source = BetonSource(path)
    sides = np.sort(np.stack([source.heights, source.widths]).astype(np.int64), axis=0)
    per_class = np.bincount(source.labels, minlength=source.num_classes)
    manifest = _manifest(path)
    jpegs = int(source.jpeg.sum())
    return {
        "path": path,
        "bytes": int(source.data.size),
        "samples": source.num_samples,
        "jpeg": jpegs,
        "raw": source.num_samples - jpegs,
        "data_bytes": int(source.byte_sizes.sum()),
        "bytes_per_sample": _statistics(source.byte_sizes),
        "shortest_side": _sides(sides[0]),
        "longest_side": _sides(sides[1]),
        "page_size": _page_size(source),
        "classes": source.num_classes,
        "class_names": source.class_names,
        "samples_per_class": _statistics(per_class),
        "empty_classes": int((per_class == 0).sum()),
        "manifest": None
        if manifest is None
        else {key: value for key, value in manifest.items() if key not in ("classes", "samples_per_class")},
    }


def _statistics(values: npt.NDArray[Any]) -> dict[str, float]:
    return {name: float(getattr(np, name)(values)) for name in ("min", "median", "mean", "max")}


def _sides(pixels: npt.NDArray[np.int64]) -> dict[str, Any]:
    counts, _ = np.histogram(pixels, EDGES)
    ranges = [f"{low}-{high - 1}" for low, high in zip(EDGES, EDGES[1:], strict=False)]
    histogram = {name: int(count) for name, count in zip(ranges, counts, strict=True) if count}
    return {**_statistics(pixels), "histogram": histogram}


def _page_size(source: BetonSource) -> int:
    return int(source.data[: HEADER_TYPE.itemsize].view(HEADER_TYPE)["page_size"][0])


def _manifest(path: str) -> dict[str, Any] | None:
    """Raises UserError when there is one that cannot be read."""
    try:
        manifest = read_json(f"{path}.json")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{printable(path)}.json: not a manifest ({error}); delete it, or convert again") from None
    if not isinstance(manifest, dict):
        raise UserError(f"{printable(path)}.json: not a manifest; delete it, or convert again")
    return manifest


def sample_sheet(path: str, out_png: str) -> None:
    """Draws SAMPLES thumbnails, evenly spread over the beton, with their class names, as one PNG. Raises UserError when
    it is no beton, a sample does not decode or the picture cannot be written."""
    source = BetonSource(path)
    images, captions = [], []
    for index in np.unique(np.linspace(0, source.num_samples - 1, SAMPLES).astype(int)).tolist():
        try:
            images.append(PIL.Image.fromarray(decode_rgb(source, index)))
        except CorruptImage as error:
            raise UserError(f"{error}, or see all that are damaged: `std-fast verify --decode`") from None
        images[-1].thumbnail((THUMBNAIL, THUMBNAIL))
        label = int(source.labels[index])
        captions.append(source.class_names[label] if source.class_names else str(label))
    draw_sheet(images, captions, out_png)


def verify(path: str, decode: bool = False, threads: int = 0) -> list[str]:
    """Faults of a beton, one line each, none if it is complete: its structure, its manifest's counts and checksum, and
    with `decode` every image. threads: for decoding; 0 = one per core this process may use."""
    try:
        source = BetonSource(path)
        manifest = _manifest(path)
    except UserError as error:
        return [str(error)]
    name = printable(path)
    faults = []
    page = _page_size(source)
    first = source.pointers // np.uint64(page)
    last = (source.pointers + source.byte_sizes.astype(np.uint64) - np.uint64(1)) // np.uint64(page)
    crossing = int((first != last).sum())
    if crossing:
        faults.append(f"{name}: {crossing} samples cross a page of {page} bytes: FFCV's process cache cannot read them")
    if manifest is None:
        faults.append(f"{name}: has no manifest {name}.json, so its checksum cannot be checked")
    else:
        faults += _against_manifest(name, source, manifest)
    if not decode:
        return faults

    def fault(index: int) -> str | None:
        try:
            decode_rgb(source, index)
        except CorruptImage as error:
            return str(error)
        return None

    # Decoding leaves Python's lock; pieces keep the list of futures short.
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        for start in range(0, source.num_samples, 1024):
            found = pool.map(fault, range(start, min(start + 1024, source.num_samples)))
            faults += [line for line in found if line]
    return faults


def _against_manifest(name: str, source: BetonSource, manifest: dict[str, Any]) -> list[str]:
    faults = []
    for key, found in (("samples", source.num_samples), ("bytes", int(source.data.size))):
        if manifest.get(key) != found:
            faults.append(one_line(f"{name}: {key} is {found}, the manifest says {manifest.get(key)}"))
    if manifest.get("samples_per_class") != np.bincount(source.labels, minlength=source.num_classes).tolist():
        faults.append(f"{name}: its labels are not those that the manifest counts")
    digest = hashlib.sha256()
    for start in range(0, source.data.size, _BLOCK):
        digest.update(source.data[start : start + _BLOCK].data)
    if manifest.get("sha256") != digest.hexdigest():
        faults.append(f"{name}: its checksum is not the manifest's: the file was changed or damaged; convert it again")
    return faults
