"""Betons for tests, written byte by byte with `struct`: small, without FFCV, and independent of our reader."""

import io
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

FIELD_BYTES = 1 + 16 + 1024
ROW = 24  # (u1 mode, u2 width, u2 height, u8 address) packed, 3 bytes of padding, i8 label
ROWS_START = 24 + 2 * FIELD_BYTES


@dataclass(frozen=True)
class Sample:
    data: bytes
    height: int
    width: int
    label: int
    mode: int = 0  # 0 JPEG, 1 raw


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth colour image uint8 [height, width, 3], other for each seed."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    waves = [np.sin(0.05 * (1 + seed % 7) * y + c) + np.cos(0.04 * (1 + seed % 5) * x - c) for c in range(3)]
    return np.round(127.5 + 60 * np.stack(waves, axis=2)).astype(np.uint8)


def encoded(image: np.ndarray, format: str = "JPEG", **options: object) -> bytes:
    """The image as the bytes of a file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format, **options)
    return stream.getvalue()


def jpeg_sample(height: int, width: int, label: int, seed: int = 0) -> Sample:
    return Sample(encoded(pixels(height, width, seed), quality=90), height, width, label)


def raw_sample(height: int, width: int, label: int, seed: int = 0) -> Sample:
    return Sample(pixels(height, width, seed).tobytes(), height, width, label, mode=1)


def write_beton(path: Path, samples: list[Sample]) -> Path:
    """A beton with fields `image` and `label`; the data follow the metadata without a page's padding."""
    rows, table, data = b"", b"", b""
    start = ROWS_START + ROW * len(samples)
    for number, sample in enumerate(samples):
        address = start + len(data)
        rows += struct.pack("<BHHQ3xq", sample.mode, sample.width, sample.height, address, sample.label)
        table += struct.pack("<QQQ", number, address, len(sample.data))
        data += sample.data
    header = struct.pack("<HHIQQ", 2, 2, 1 << 21, len(samples), start + len(data))
    fields = struct.pack("<B16s1024s", 2, b"image", b"") + struct.pack("<B16s1024s", 1, b"label", b"")
    path.write_bytes(header + fields + rows + data + table)
    return path
