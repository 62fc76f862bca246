"""From disk to an augmented batch on the device. `open_loader` is the way in."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from pipelines.errors import CorruptImage, DataError, UserError

if TYPE_CHECKING:
    from pipelines.read.batch import Loader, LoaderSpec
    from pipelines.read.source import Source

__all__ = ["BACKENDS", "DataError", "UserError", "open_loader"]

BACKENDS = ("auto", "ffcv", "dali", "torch", "resident")
RESIDENT_SIDE = 96  # pixels: above it, decoding is worth its memory
RESIDENT_BYTES = 1 << 30  # on a CPU
RESIDENT_SHARE = 0.25  # of a GPU's memory

log = logging.getLogger("std_fast")


def open_loader(spec: LoaderSpec, backend: str = "auto") -> Loader:
    """Opens the dataset of `spec` with one of BACKENDS; all give the same boxes, labels and order.

    "auto" takes resident for a small dataset of small images of one size, else ffcv where it is installed, else torch;
    the log says which and why. Raises UserError for an unknown backend, one that is not installed, or a dataset that
    cannot be opened.
    """
    from pipelines.read.source import open_source

    if backend not in BACKENDS:
        raise UserError(f"backend {backend!r} is unknown: choose one of {', '.join(BACKENDS)}")
    source = open_source(spec.path)
    if backend == "auto":
        backend, why = _choose(spec, source)
        log.info("%s: backend %s (%s)", source.path, backend, why)
    if backend == "ffcv":
        from pipelines.loaders.ffcv import FfcvLoader

        return FfcvLoader(spec, source)
    if backend == "dali":
        from pipelines.loaders.dali import DaliLoader

        return DaliLoader(spec, source)
    if backend == "torch":
        from pipelines.loaders.torch import TorchLoader

        return TorchLoader(spec, source)
    from pipelines.loaders.resident import ResidentLoader

    return ResidentLoader(spec, source)


def _choose(spec: LoaderSpec, source: Source) -> tuple[str, str]:
    """The backend for "auto", and the reason."""
    from pipelines.loaders import ffcv as ffcv_backend

    if spec.resample != "area" and (size := _resident_bytes(spec, source)):
        return "resident", f"{size / 2**20:.0f} MiB decoded, kept on {spec.device}"
    try:
        ffcv_backend.library()
    except UserError as error:
        return "torch", str(error)
    return "ffcv", "installed"


def _resident_bytes(spec: LoaderSpec, source: Source) -> int:
    """Memory that the decoded dataset would take, 0 when it is not one to keep: too large, or of several sizes."""
    import numpy as np
    import torch

    limit = RESIDENT_BYTES
    if torch.device(spec.device).type == "cuda":
        limit = int(RESIDENT_SHARE * torch.cuda.get_device_properties(spec.device).total_memory)
    size = 0
    # A look at a few first: in a folder, each costs the opening of a file.
    for some in (np.linspace(0, source.num_samples - 1, 32).astype(np.int64), np.arange(source.num_samples)):
        try:
            heights, widths = source.sizes(some)
        except CorruptImage:  # the loader will name it
            return 0
        size = 3 * source.num_samples * int(heights[0] * widths[0])
        if np.ptp(heights) or np.ptp(widths) or max(heights[0], widths[0]) > RESIDENT_SIDE or size > limit:
            return 0
    return size
