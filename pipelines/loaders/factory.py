"""`open_loader`: from a specification to a loader, and the choice of the backend for "auto"."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch

from pipelines.errors import CorruptImage, UserError
from pipelines.read.settings import Backend
from pipelines.read.source import open_source

if TYPE_CHECKING:
    from pipelines.read.base import Source
    from pipelines.read.batch import Loader, LoaderSpec

BACKENDS = get_args(Backend)
RESIDENT_SIDE = 96  # pixels; larger images are decoded anew for each batch
RESIDENT_BYTES = 1 << 30  # largest decoded dataset to keep in the host's memory
RESIDENT_SHARE = 0.25  # the same on a GPU, as a share of its memory

log = logging.getLogger("std_fast")


def open_loader(spec: LoaderSpec, backend: str = "auto", source: Source | None = None) -> Loader:
    """Opens the dataset of `spec`, or `source`, with one of BACKENDS; all give the same boxes, labels and order.

    "auto" takes resident for a small dataset of small images of one size, else ffcv where it is installed, else torch;
    the log names the choice and its reason. Raises UserError for an unknown backend, one that is not installed, or a
    dataset that cannot be opened.
    """
    if backend not in BACKENDS:
        raise UserError(f"data.backend: {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    source = open_source(spec.path, spec.one_part) if source is None else source
    if backend == "auto":
        backend, reason = _choose(spec, source)
        log.info("%s: backend %s (%s)", source.path, backend, reason)
    if backend == "ffcv":
        from pipelines.loaders.ffcv import FfcvLoader

        return FfcvLoader(spec, source)
    if backend == "dali":
        from pipelines.loaders.dali.loader import DaliLoader
        from pipelines.loaders.dali.sweep import best_load

        if spec.hw_decoder_load is None and torch.device(spec.device).type == "cuda":
            spec = replace(spec, hw_decoder_load=best_load(spec, source))
        return DaliLoader(spec, source)
    if backend == "torch":
        from pipelines.loaders.torch import TorchLoader

        return TorchLoader(spec, source)
    from pipelines.loaders.resident import ResidentLoader

    return ResidentLoader(spec, source)


def _choose(spec: LoaderSpec, source: Source) -> tuple[str, str]:
    """The backend for "auto", and the reason."""
    from pipelines.loaders import ffcv

    if spec.resample != "area" and (size := _resident_bytes(spec, source)):
        return "resident", f"{size / 2**20:.0f} MiB decoded, kept on {spec.device}"
    try:
        ffcv.library()
    except UserError as error:
        return "torch", str(error)
    return "ffcv", "installed"


def _resident_bytes(spec: LoaderSpec, source: Source) -> int:
    """Memory that the decoded dataset would take; 0 when it is too large to keep, or has images of several sizes."""
    limit = RESIDENT_BYTES
    if torch.device(spec.device).type == "cuda":
        limit = int(RESIDENT_SHARE * torch.cuda.get_device_properties(spec.device).total_memory)
    size = 0
    # A few samples first: in a folder, the size of each costs the opening of a file.
    for some in (np.linspace(0, source.num_samples - 1, 32).astype(np.int64), np.arange(source.num_samples)):
        try:
            heights, widths = source.sizes(some)
        except CorruptImage:  # the loader's error will name it
            return 0
        size = 3 * source.num_samples * int(heights[0] * widths[0])
        if np.ptp(heights) or np.ptp(widths) or max(heights[0], widths[0]) > RESIDENT_SIDE or size > limit:
            return 0
    return size
