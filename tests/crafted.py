"""Betons that were crafted to harm whoever reads them, and a reader of a folder of them, to be run as a process.

    python -m tests.crafted FOLDER BACKEND

prints a JSON line for each file: its name, before it is read, and what became of it. A crash ends the list early.
"""

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path

from tests.beton_tools import Sample, encoded, pixels, write_beton

SIDE = 24


def _marker(data: bytes, marker: int) -> int:
    return data.index(bytes([0xFF, marker]))


def _with_size(data: bytes, height: int, width: int) -> bytes:
    at = _marker(data, 0xC0) + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def _scan_header(data: bytes, header: bytes) -> bytes:
    return data[: _marker(data, 0xDA)] + header


IMAGES: dict[str, Callable[[bytes], bytes]] = {
    "larger than the metadata say": lambda d: _with_size(d, SIDE, 4 * SIDE),
    "smaller than the metadata say": lambda d: _with_size(d, SIDE // 2, SIDE),
    "of absurd size": lambda d: _with_size(d, 65500, 65500),
    "without height": lambda d: _with_size(d, 0, SIDE),
    "cut off in its header": lambda d: d[:40],
    "cut off before its scan": lambda d: d[: _marker(d, 0xDA)],
    "a scan header of two bytes at the very end": lambda d: _scan_header(d, b"\xff\xda\x00\x02"),
    "a scan header that is cut off": lambda d: _scan_header(d, b"\xff\xda\x00\x0c\x03"),
    "cut off in its scan": lambda d: d[: _marker(d, 0xDA) + 40],
    "without Huffman tables": lambda d: d[: _marker(d, 0xC4)] + d[_marker(d, 0xDA) :],
    "without quantization tables": lambda d: d[: _marker(d, 0xDB)] + d[_marker(d, 0xC0) :],
    "two frames": lambda d: d[: _marker(d, 0xDA)] + _with_size(d, 8, 8)[_marker(d, 0xC0) :],
    "of 255 components": lambda d: d[: _marker(d, 0xC0) + 9] + b"\xff" + d[_marker(d, 0xC0) + 10 :],
    "a segment that is longer than the file": lambda d: d[:4] + b"\xff\xff" + d[6:],
    "endless padding": lambda d: d[:2] + b"\xff" * 4000,
    "a PNG": lambda d: encoded(pixels(SIDE, SIDE), "PNG"),
    "text": lambda d: b"#!/bin/sh\ntouch harm\n",
    "one byte": lambda d: b"\xff",
}
"""what stands in the place of a good JPEG of SIDE x SIDE"""


def write_all(folder: Path) -> list[str]:
    """A beton for each of IMAGES, between two good samples; returns the files' names."""
    good = encoded(pixels(SIDE, SIDE), quality=90)
    names = []
    for what, change in IMAGES.items():
        name = what.replace(" ", "-") + ".beton"
        samples = [Sample(data, SIDE, SIDE, 0) for data in (good, change(good), good)]
        write_beton(folder / name, samples)
        names.append(name)
    return names


def read(path: Path, backend: str) -> str:
    """`UserError: ...` for a beton that is refused, or what else became of it."""
    from pipelines import open_loader
    from pipelines.errors import UserError
    from pipelines.read.batch import LoaderSpec
    from pipelines.read.crops import CropSpec

    spec = LoaderSpec(str(path), 4, image_size=16, shuffle=False, drop_last=False, crop=CropSpec("full"), threads=2)
    outcome = ""
    try:
        with open_loader(spec, backend) as loader:
            for _ in range(2):  # what is kept of the first time must do no harm in the second
                try:
                    list(loader.epoch(0))
                    return "read"
                except UserError as error:
                    outcome = f"UserError: {error}"
    except UserError as error:  # resident decodes on opening; a bad structure is refused by all
        outcome = f"UserError: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return outcome


if __name__ == "__main__":
    for file in sorted(Path(sys.argv[1]).glob("*.beton")):
        print(json.dumps([file.name, "began"]), flush=True)
        print(json.dumps([file.name, read(file, sys.argv[2])]), flush=True)
