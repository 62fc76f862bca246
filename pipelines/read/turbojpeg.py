"""JPEG decoding by the system's libturbojpeg, which reports damage: libjpeg only warns of it and keeps decoding."""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class BadImage(Exception):
    """The image cannot be stored; the message is the reason, one line."""


def with_usual_header(data: bytes) -> bytes:
    """A JPEG with the JFIF revision and Adobe transform that libjpeg assumes where it does not know the given ones."""
    changed, at, components = bytearray(data), 2, 3
    places = []
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        marker, body = data[at + 1], data[at + 4 : at + 16]
        if marker == 0xE0 and body[:5] == b"JFIF\0":
            changed[at + 9] = 1
        elif marker == 0xEE and body[:5] == b"Adobe" and len(body) == 12:
            places.append(at + 15)
        elif 0xC0 <= marker <= 0xC2 and len(body) > 5:
            components = body[5]
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    for place in places:
        changed[place] = 2 if components == 4 else 1
    return bytes(changed)


class JpegHeader(NamedTuple):
    width: int
    height: int
    is_rgb: bool
    is_cmyk: bool


class TurboJpeg:
    """A decoder of TurboJPEG's API 2, which version 3 keeps. One instance per thread."""

    _PF_RGB, _PF_GRAY, _PF_CMYK = 0, 6, 11
    _CS_RGB, _CS_CMYK, _CS_YCCK = 0, 3, 4
    _LIMIT_SCANS = 32768  # refuses progressive files of absurdly many scans
    _WARNING = 0
    # Warnings after which the picture is complete: about bytes after its last line, or about the header. The library
    # reports the first warning only, so one about the header may hide others.
    _AT_THE_END, _OF_THE_HEADER = "before marker 0xd9", ("JFIF revision", "Adobe color transform")

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, long, integer = ctypes.c_void_p, ctypes.c_ulong, ctypes.c_int
        known = ctypes.POINTER(integer)
        library.tjInitDecompress.restype = pointer
        library.tjGetErrorStr2.restype = ctypes.c_char_p
        library.tjGetErrorStr2.argtypes = library.tjGetErrorCode.argtypes = library.tjDestroy.argtypes = [pointer]
        library.tjDecompressHeader3.argtypes = [pointer, ctypes.c_char_p, long, known, known, known, known]
        sizes_and_flags = (integer, integer, integer, integer, integer)
        library.tjDecompress2.argtypes = [pointer, ctypes.c_char_p, long, pointer, *sizes_and_flags]
        self._library = library
        self._handle = None
        self._renew()

    def _renew(self) -> None:
        """A fresh handle, for each image. TurboJPEG 2.1 keeps state of the previous one: after a header that failed
        half-read, a good image has size 0x0, and decoding it writes outside its buffer; an image without quantization
        tables is decoded with those of another."""
        self.__del__()
        self._handle = self._library.tjInitDecompress()
        if not self._handle:
            raise MemoryError("tjInitDecompress")

    def __del__(self) -> None:
        if self._handle:
            self._library.tjDestroy(self._handle)

    def header(self, data: bytes) -> JpegHeader | None:
        """Size and colour space; None where TurboJPEG does not support the kind of JPEG, which may still be sound."""
        self._renew()
        width, height, sampling, space = (ctypes.c_int() for _ in range(4))
        outputs = [ctypes.byref(value) for value in (width, height, sampling, space)]
        failed = self._library.tjDecompressHeader3(self._handle, data, len(data), *outputs)
        if failed:
            usual = with_usual_header(data)  # a warning fails too
            return None if usual == data else self.header(usual)
        if width.value < 1 or height.value < 1:
            return None
        is_cmyk = space.value in (self._CS_CMYK, self._CS_YCCK)
        return JpegHeader(width.value, height.value, space.value == self._CS_RGB, is_cmyk)

    def decode(self, data: bytes, known: JpegHeader, divisor: int, pixels: npt.NDArray[np.uint8] | None = None) -> str:
        """Decodes at 1/divisor of the size into `pixels`, uint8 RGB [H, W, 3], sides divided and rounded up; without
        `pixels` it only looks for damage. Returns "" or the library's harmless warning. Raises BadImage."""
        width, height = -(-known.width // divisor), -(-known.height // divisor)
        kind = self._PF_CMYK if known.is_cmyk else self._PF_RGB if known.is_rgb or pixels is not None else self._PF_GRAY
        out = pixels
        if out is None:
            out = np.empty((height, width, {self._PF_CMYK: 4, self._PF_RGB: 3, self._PF_GRAY: 1}[kind]), np.uint8)
        status = self._library.tjDecompress2(
            self._handle, data, len(data), out.ctypes.data, width, 0, height, kind, self._LIMIT_SCANS
        )
        if not status:
            return ""
        warning = self._library.tjGetErrorStr2(self._handle).decode("ascii", "replace")
        is_warning = self._library.tjGetErrorCode(self._handle) == self._WARNING
        if is_warning and self._AT_THE_END in warning:
            return warning
        if is_warning and any(text in warning for text in self._OF_THE_HEADER):
            usual = with_usual_header(data)
            if usual == data:
                raise BadImage(f"damaged JPEG: {warning}")
            self._renew()
            return self.decode(usual, known, divisor, pixels) or warning
        raise BadImage(f"damaged JPEG: {warning}")


@functools.cache
def turbojpeg_library() -> ctypes.CDLL | None:
    for name in ("libturbojpeg.so.0", "libturbojpeg.so", "libturbojpeg.dylib"):  # find_library would start a compiler
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        if hasattr(library, "tjDecompressHeader3"):
            return library
    return None


_per_thread = threading.local()


def turbojpeg() -> TurboJpeg | None:
    """This thread's decoder, None where the library is not installed."""
    library = turbojpeg_library()
    if library is None:
        return None
    if not hasattr(_per_thread, "decoder"):
        _per_thread.decoder = TurboJpeg(library)
    return _per_thread.decoder
