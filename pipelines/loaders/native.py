"""Compiled host code of the FFCV backend: JPEG to RGB by the libturbojpeg that FFCV is built on, then crop and resize.

Needs numba; only backends that have found it import this module. Everything here runs without the GIL and does not
check its arguments: `beton` checks addresses and lengths against the file, `crops` computes boxes within the image.

Decoding. FFCV's `imdecode` asks libturbojpeg for the fast, less exact DCT and its callers drop the return code. Here
the same library is asked for the exact DCT (2 % slower over all, and then the pixels are those of PIL and
torchvision), stops at the first sign of corruption, and decodes no rows below the crop: TurboJPEG 2 has no call for
that, so the height in a copy of the header is lowered, and libjpeg finishes after the last row that is needed.

Resizing. FFCV's `resize` is OpenCV's INTER_AREA: a third to a half of its loader's time. This one is PIL's antialiased
filter (Pillow, src/libImaging/Resample.c: horizontal pass, then vertical, 8 bits between) in integers, with the three
channels of a pixel in one int64, so that one multiplication covers all three. It agrees with PIL but for weights of 12
bits instead of 22 (mean difference below 0.01 of 255, at most 1), is the same on every machine, and 2 to 4 times faster
than INTER_AREA.

Shapes: B samples, S output side, T taps of the filter.
"""

from __future__ import annotations

import ctypes

import llvmlite.binding
import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

OK, NOT_JPEG, OTHER_SIZE, OTHER_COLOUR, BROKEN, NO_MEMORY = range(6)
"""result of decoding a sample"""
BILINEAR, BICUBIC, AREA = range(3)

_RGB = 0  # TJPF_RGB
_FLAGS = 4096 | 8192 | 32768  # TJFLAG_ACCURATEDCT | TJFLAG_STOPONWARNING | TJFLAG_LIMITSCANS (turbojpeg.h)
_TRAILING = np.frombuffer(b"extraneous bytes before marker 0xd9\0", np.uint8)
"""libjpeg's message (jerror.h, JWRN_EXTRANEOUS_DATA) for data between the last row and the end: all rows are decoded"""

# Three lanes of 21 bits in an int64. A filtered value v, in 0..255 or, with bicubic's negative lobes, -64..447, stands
# in its lane as v * 2^12, raised by 64 * 2^12 where it may be negative: below 2^21 in every case.
_BITS = 12
_ONES = 1 | 1 << 21 | 1 << 42
_HALF = _ONES << (_BITS - 1)
_BYTE = 255 * _ONES
_RAISE = 64


def load(library: str) -> None:
    """Registers the functions of FFCV's library, and of the libturbojpeg it is linked with, for the compiled code.

    Raises AttributeError when one is missing.
    """
    lib = ctypes.CDLL(library)
    for symbol, name in (
        ("std_fast_begin", "tjInitDecompress"),
        ("std_fast_decompress", "tjDecompress2"),
        ("std_fast_error", "tjGetErrorStr2"),
        ("std_fast_end", "tjDestroy"),
        ("std_fast_resize", "resize"),
    ):
        llvmlite.binding.add_symbol(symbol, ctypes.cast(getattr(lib, name), ctypes.c_void_p).value)


# External functions are referred to by name, not by ctypes objects, so that numba can cache the compiled code.
_int, _word = types.int32, types.intp
_decompress = types.ExternalFunction(
    "std_fast_decompress", _int(_word, _word, types.uintp, _word, _int, _int, _int, _int, _int)
)
_begin = types.ExternalFunction("std_fast_begin", _word())
_end = types.ExternalFunction("std_fast_end", _int(_word))
_error = types.ExternalFunction("std_fast_error", _word(_word))
_strstr = types.ExternalFunction("strstr", _word(_word, _word))
_area = types.ExternalFunction("std_fast_resize", types.void(*[types.int64] * 11))


@intrinsic
def _pointer(typing_context, address):
    """An address as a pointer to bytes."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint8)(address), generate


@njit(nogil=True, cache=True)
def jpeg_header(data):
    """(height, width, components, rows, offset) of a JPEG's bytes, uint8; height 0 where it has no readable header.

    `rows` is the height of a row of blocks, or 0 where lowering the height, stored at `offset`, does not cut the image:
    progressive, several scans, restart markers.
    """
    height = width = components = rows = offset = 0
    cuttable = True
    if data.size < 4 or data[0] != 0xFF or data[1] != 0xD8:
        return 0, 0, 0, 0, 0
    at = 2
    while at + 4 <= data.size and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        length = np.int64(data[at + 2]) << 8 | np.int64(data[at + 3])
        if at + 2 + length > data.size or length < 2:
            break
        if marker == 0xDD and length >= 4:  # restart interval
            cuttable &= data[at + 4] == 0 and data[at + 5] == 0
        elif 0xC0 <= marker <= 0xCF and marker != 0xC4 and marker != 0xC8 and marker != 0xCC and length >= 11:
            cuttable &= marker <= 0xC1  # sequential, Huffman
            offset = at + 5
            height = np.int64(data[at + 5]) << 8 | np.int64(data[at + 6])
            width = np.int64(data[at + 7]) << 8 | np.int64(data[at + 8])
            components = np.int64(data[at + 9])
            if length < 8 + 3 * components:
                break
            for c in range(components):
                rows = max(rows, 8 * np.int64(data[at + 11 + 3 * c] & 15))
        elif marker == 0xDA and length >= 3:  # start of scan
            cuttable &= data[at + 4] == components
            return height, width, components, rows if cuttable else 0, offset
        at += 2 + length
    return 0, 0, 0, 0, 0


@njit(nogil=True, cache=True)
def _decode(address, length, height, width, bottom, pixels, encoded):
    """Rows 0..bottom of a JPEG into `pixels` (at least 3 * height * width bytes), RGB. Returns one of the codes."""
    data = carray(_pointer(address), (length,))
    found_height, found_width, components, rows, offset = jpeg_header(data)
    if found_height == 0:
        return NOT_JPEG
    if found_height != height or found_width != width:
        return OTHER_SIZE
    if components != 1 and components != 3:
        return OTHER_COLOUR
    if rows:
        # One row more than the crop: chroma of a block's last row is interpolated with the row below.
        rows *= -(-(bottom + 1) // rows)
    if 0 < rows < height:
        encoded[:length] = data
        encoded[offset] = rows >> 8
        encoded[offset + 1] = rows & 255
        address = np.intp(encoded.ctypes.data)
    else:
        rows = height
    # A decompressor for each image, in 2 microseconds. TurboJPEG 2.1 keeps state of the previous image: after a header
    # that failed half-read it writes outside a good image's buffer; without tables it uses another's.
    handle = _begin()
    if handle == 0:
        return NO_MEMORY
    code = OK
    if _decompress(handle, address, length, pixels.ctypes.data, width, 0, rows, _RGB, _FLAGS) != 0:
        if _strstr(_error(handle), _TRAILING.ctypes.data) == 0:
            code = BROKEN
    _end(handle)
    return code


@njit(nogil=True, cache=True)
def _weight(x, cubic):
    """The filter: a triangle of half width 1, or Keys' cubic with a = -0.5 of half width 2 (PIL's BICUBIC)."""
    x = abs(x)
    if not cubic:
        return max(1.0 - x, 0.0)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0 if x < 2.0 else 0.0


@njit(nogil=True, cache=True)
def _windows(length, outputs, cubic):
    """Which of `length` values each of `outputs` ones takes, and how much of each: first int64 [S], weights int64
    [T, S] that sum to 2^12 over T. T is at least 2; the last weights may be 0, for values past the end.
    """
    scale = length / outputs
    stretch = max(scale, 1.0)
    reach = stretch * (2.0 if cubic else 1.0)
    taps = int(2 * reach) + 2
    first = np.empty(outputs, np.int64)
    weights = np.zeros((taps, outputs), np.int64)
    used = 1
    for i in range(outputs):
        centre = (i + 0.5) * scale
        low = max(int(centre - reach + 0.5), 0)
        high = min(int(centre + reach + 0.5), length)
        total = 0.0
        for k in range(low, high):
            total += _weight((k + 0.5 - centre) / stretch, cubic)
        # Rounding the running sum, not each weight, keeps the sum exact.
        running, before = 0.0, 0
        for k in range(low, high):
            running += _weight((k + 0.5 - centre) / stretch, cubic)
            here = int(np.rint(running / total * (1 << _BITS)))
            weights[k - low, i] = here - before
            before = here
        first[i] = low
        used = max(used, high - low)
    return first, weights[: max(used, 2)]


@njit(nogil=True, cache=True)
def _clip(lanes):
    """int64 [N] of three raised values each -> three values clipped to 0..255, in place."""
    low, high = _RAISE, _RAISE + 255
    for x in range(lanes.size):
        v = lanes[x]
        a = min(max(v & 511, low), high) - low
        b = min(max(v >> 21 & 511, low), high) - low
        c = min(max(v >> 42 & 511, low), high) - low
        lanes[x] = a | b << 21 | c << 42


@njit(nogil=True, cache=True)
def resample(pixels, stride, top, left, height, width, out, cubic):
    """Resizes the box of an RGB image to a square.

    pixels: uint8, rows of `stride` bytes; out: uint8 [S, 3 * S]; cubic: bicubic instead of bilinear.
    """
    side = out.shape[0]
    row_first, row_weights = _windows(height, side, cubic)
    column_first, column_weights = _windows(width, side, cubic)
    row_taps, column_taps = len(row_weights), len(column_weights)
    start = _HALF + (_RAISE << _BITS) * _ONES if cubic else _HALF
    packed = np.zeros(width + column_taps, np.int64)
    ring = np.zeros((row_taps, side), np.int64)  # the last rows that have passed the horizontal filter
    sums = np.empty(side, np.int64)
    one, two, done = np.uint64(1), np.uint64(2), 0  # unsigned indices are not checked for a negative sign
    for y in range(side):
        while done < min(row_first[y] + row_taps, height):
            base = (top + done) * stride + 3 * left
            source = pixels[base : base + 3 * width]
            for x in range(width):
                i = np.uint64(3 * x)
                packed[x] = np.int64(source[i]) | np.int64(source[i + one]) << 21 | np.int64(source[i + two]) << 42
            target = ring[done % row_taps]
            u, v = column_weights[0], column_weights[1]
            if column_taps % 2:
                w = column_weights[2]
                for x in range(side):
                    i = np.uint64(column_first[x])
                    target[x] = start + u[x] * packed[i] + v[x] * packed[i + one] + w[x] * packed[i + two]
            else:
                for x in range(side):
                    i = np.uint64(column_first[x])
                    target[x] = start + u[x] * packed[i] + v[x] * packed[i + one]
            for k in range(2 + column_taps % 2, column_taps, 2):
                u, v = column_weights[k], column_weights[k + 1]
                for x in range(side):
                    i = np.uint64(column_first[x] + k)
                    target[x] += u[x] * packed[i] + v[x] * packed[i + one]
            if cubic:
                for x in range(side):
                    target[x] >>= _BITS
                _clip(target)
            else:
                for x in range(side):
                    target[x] = target[x] >> _BITS & _BYTE
            done += 1
        sums[:] = start
        for k in range(row_taps):  # past the last row the weight is 0, and the ring holds some earlier row
            row, weight = ring[(row_first[y] + k) % row_taps], row_weights[k, y]
            for x in range(side):
                sums[x] += weight * row[x]
        for x in range(side):
            sums[x] >>= _BITS
        if cubic:
            _clip(sums)
        target_row = out[y]
        for x in range(side):
            i = np.uint64(3 * x)
            target_row[i] = np.uint8(sums[x])
            target_row[i + one] = np.uint8(sums[x] >> 21)
            target_row[i + two] = np.uint8(sums[x] >> 42)


@njit(nogil=True, cache=True)
def decode_samples(addresses, lengths, jpeg, sound, heights, widths, boxes, out, pixels, encoded, kind):
    """Decodes, crops and resizes samples one after the other; returns (samples done, code of the one that failed or
    OK).

    addresses, lengths: where the samples' bytes are, [B]; jpeg [B]: bool, else raw RGB; sound [B]: bool, known not to
    be damaged (others are decoded to their last row, so that damage below the crop is seen too); heights, widths [B],
    boxes [B, 4]; out: uint8 [B, S, 3 * S]; pixels: 3 bytes for each pixel of the largest JPEG; encoded: as many bytes
    as the longest JPEG; kind: BILINEAR, BICUBIC or AREA.
    """
    for i in range(len(addresses)):
        height, width, address = np.int64(heights[i]), np.int64(widths[i]), np.intp(addresses[i])
        top, left = np.int64(boxes[i, 0]), np.int64(boxes[i, 1])
        box_height, box_width = np.int64(boxes[i, 2]), np.int64(boxes[i, 3])
        if jpeg[i]:
            bottom = top + box_height if sound[i] else height
            code = _decode(address, lengths[i], height, width, bottom, pixels, encoded)
            if code != OK:
                return i, code
            address = np.intp(pixels.ctypes.data)
        if kind == AREA:
            side = len(out[i])
            _area(
                0, address, height, width, top, top + box_height, left, left + box_width, out[i].ctypes.data, side, side
            )
        else:
            image = carray(_pointer(address), (3 * height * width,))
            resample(image, 3 * width, top, left, box_height, box_width, out[i], kind == BICUBIC)
    return len(addresses), OK
