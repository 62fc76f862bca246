"""Writes FFCV's `.beton` format, version 2, without FFCV: where a sample's bytes go, and the header around them.

`pipelines.read.source` describes the format and reads it. As with FFCV's own writer, data begins at a page boundary,
and no sample crosses one, since FFCV's process cache reads by pages. Samples follow each other in their order, so the
bytes of a file depend on nothing but its samples. The last page ends with its last sample.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.read.beton import FIELD_TYPE, HEADER_TYPE, IMAGE_ID, IMAGE_TYPE, INT_ID, TABLE_TYPE, VERSION

ROW_TYPE = np.dtype([("", IMAGE_TYPE), ("", "<i8")], align=True)
"""metadata of a sample, as FFCV lays it out: image, label"""
_METADATA_START = HEADER_TYPE.itemsize + 2 * FIELD_TYPE.itemsize


def data_start(num_samples: int, page_size: int) -> int:
    """First byte of the data of a beton that may hold up to this many samples."""
    return -(-(_METADATA_START + num_samples * ROW_TYPE.itemsize) // page_size) * page_size


class Packer:
    """Gives samples their addresses: one after the other, the next page where the rest of a page is too short."""

    def __init__(self, start: int, page_size: int) -> None:
        self.end = start
        self._page_size = page_size

    def place(self, sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """Addresses, uint64 [B], of the next samples of these lengths, none over a page."""
        addresses = np.empty(len(sizes), np.uint64)
        for i, size in enumerate(sizes.tolist()):
            left = -self.end % self._page_size
            if left and size > left:
                self.end += left
            addresses[i] = self.end
            self.end += size
        return addresses


def runs(addresses: npt.NDArray[np.uint64], sizes: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """The stretches of file that these samples, which follow each other, take: (address, length) each."""
    found: list[tuple[int, int]] = []
    for address, size in zip(addresses.tolist(), sizes.tolist(), strict=True):
        if found and sum(found[-1]) == address:
            found[-1] = (found[-1][0], found[-1][1] + size)
        else:
            found.append((address, size))
    return found


def write_payload(fd: int, payload: bytes, addresses: npt.NDArray[np.uint64], sizes: npt.NDArray[np.int64]) -> None:
    """Writes samples' bytes, one after the other in `payload`, to their addresses. Raises OSError."""
    view = memoryview(payload)
    for address, length in runs(addresses, sizes):
        _write(fd, view[:length], address)
        view = view[length:]


def _write(fd: int, data: memoryview | bytes, address: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, address)
        view, address = view[written:], address + written


def finish(
    fd: int,
    samples: npt.NDArray[Any],
    addresses: npt.NDArray[np.uint64],
    labels: npt.NDArray[np.int64],
    end: int,
    page_size: int,
) -> None:
    """Writes header, field descriptors, metadata and allocation table around data that ends at `end`, and cuts off what
    lies behind. samples: columns mode, width, height and size [N]. Raises OSError."""
    fields = np.zeros(2, FIELD_TYPE)
    for field, (name, type_id) in zip(fields, (("image", IMAGE_ID), ("label", INT_ID)), strict=True):
        field["type_id"] = type_id
        field["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    rows = np.zeros(len(samples), ROW_TYPE)
    for column in ("mode", "width", "height"):
        rows["f0"][column] = samples[column]
    rows["f0"]["data_ptr"] = addresses
    rows["f1"] = labels
    table = np.zeros(len(samples), TABLE_TYPE)
    table["sample_id"], table["ptr"], table["size"] = np.arange(len(samples)), addresses, samples["size"]
    table_start = -(-end // 8) * 8
    header = np.array([(VERSION, len(fields), page_size, len(samples), table_start)], HEADER_TYPE)
    os.ftruncate(fd, end)
    _write(fd, table.tobytes(), table_start)
    _write(fd, header.tobytes() + fields.tobytes() + rows.tobytes(), 0)
