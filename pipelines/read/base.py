"""The interface of every dataset on disk, and the limits on what is read from one.

Shapes: B indices asked for, N samples.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipelines.errors import DataError

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]

MAX_SIDE = 65500  # pixels: libjpeg's limit
MAX_PIXELS = 178_956_970  # the size at which PIL refuses an image as a decompression bomb
MAX_BYTES = 1 << 28  # of an encoded image
MAX_CLASSES = 1 << 20


class Source(Protocol):
    """A dataset on disk. Indices run from 0 to num_samples - 1."""

    path: str
    kind: str
    """"beton" or "folder" """
    num_samples: int
    labels: Integers
    """int64 [N], 0..num_classes-1"""
    class_names: list[str] | None
    num_classes: int

    def sizes(self, indices: npt.NDArray[np.integer]) -> tuple[Integers, Integers]:
        """Heights and widths in pixels, int64 [B] each, of the upright images (after EXIF rotation).

        Raises DataError for an image that cannot be read.
        """
        ...

    def read(self, index: int) -> Bytes:
        """The sample's bytes, read-only uint8: an encoded image, or height*width*3 RGB values (raw mode of a beton).

        Raises DataError when they cannot be read.
        """
        ...

    def is_jpeg(self, index: int) -> bool:
        """Whether `read` gives a JPEG. Raises DataError for an image that cannot be read."""
        ...

    def name(self, index: int) -> str:
        """The sample in a message: its file, or its beton and number."""
        ...

    def fingerprint(self) -> str:
        """Hex digest of the dataset's identity; it changes with names, order, labels and lengths. No image is read."""
        ...


SAMPLED = 64


def sampled_digest(source: Source) -> str:
    """Hex digest of the bytes of SAMPLED images, spread evenly: what a `fingerprint`, which reads no image, cannot see
    where all images were replaced by others of the same lengths. One that cannot be read counts as empty."""
    digest = hashlib.sha256()
    for index in np.unique(np.linspace(0, source.num_samples - 1, SAMPLED).astype(np.int64)):
        try:
            digest.update(source.read(int(index)).data)
        except DataError:
            digest.update(b"unreadable")
    return digest.hexdigest()
