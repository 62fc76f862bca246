"""One sample of a source, of any kind, as RGB pixels: the torch backend's decoder, and the other backends' fallback.

JPEGs are decoded exactly (slow integer DCT, smooth chroma), by the system's libturbojpeg where there is one, because it
reports damaged data, else by torchvision: the pixels are the same. All else in folders (EXIF rotations, CMYK, PNG, ...)
becomes RGB as in conversion (`image_prep`).
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import PIL.Image

from pipelines.errors import CorruptImage
from pipelines.read.base import MAX_PIXELS, Source
from pipelines.read.exif import orientation
from pipelines.read.image_prep import ConvertSettings, prepare
from pipelines.read.turbojpeg import BadImage, turbojpeg

Pixels = npt.NDArray[np.uint8]

_AS_IT_IS = ConvertSettings(mode="raw", size=None, max_pixels=MAX_PIXELS)


def decode_rgb(source: Source, index: int) -> Pixels:
    """The sample upright: uint8 [H, W, 3] of the size that the source states. Raises CorruptImage with its name,
    DataError when it cannot be read."""
    data = source.read(index)
    heights, widths = source.sizes(np.array([index]))
    height, width = int(heights[0]), int(widths[0])
    is_jpeg = source.is_jpeg(index)
    if source.kind == "beton" and not is_jpeg:
        return data.reshape(height, width, 3)
    try:
        encoded = data.tobytes()
        pixels = None
        if is_jpeg and (source.kind == "beton" or not is_turned(encoded)):
            pixels = _plain_jpeg(encoded)
        if pixels is None:
            image = prepare(encoded, _AS_IT_IS, raw=True)
            pixels = np.frombuffer(image.payload, np.uint8).reshape(image.height, image.width, 3)
        if pixels.shape[:2] != (height, width):
            raise BadImage(f"it is {pixels.shape[1]}x{pixels.shape[0]} pixels, not {width}x{height} as stated")
    except BadImage as error:
        fix = "convert again" if source.kind == "beton" else "replace or remove it"
        raise CorruptImage(f"{source.name(index)}: cannot be decoded ({error}); {fix}") from error
    return pixels


def is_turned(encoded: bytes) -> bool:
    """Whether a JPEG has an EXIF orientation other than upright."""
    if b"Exif\0" not in encoded[: 1 << 16]:
        return False
    with PIL.Image.open(io.BytesIO(encoded), formats=("JPEG",)) as image:
        return orientation(image) != 1


def is_plain_jpeg(source: Source, index: int, encoded: bytes, sound: bool) -> bool:
    """Whether every decoder reads a JPEG sample alike: upright, gray or colour, of the stated size and not damaged
    (other decoders may pass over damage in silence). `decode_rgb` decodes the others, or names what is wrong.

    sound: it is known not to be damaged. To find out costs about half a decoding.
    """
    if not encoded.endswith(b"\xff\xd9") or (source.kind == "folder" and is_turned(encoded)):
        return False
    (height,), (width,) = source.sizes(np.array([index]))
    decoder = turbojpeg()
    if decoder is not None:
        known = decoder.header(encoded)
        if known is None or known.is_cmyk or (known.height, known.width) != (height, width):
            return False
        try:
            if not sound:
                decoder.decode(encoded, known, 8)
        except BadImage:
            return False
        return True
    try:
        with PIL.Image.open(io.BytesIO(encoded)) as image:
            return image.mode in ("RGB", "L") and image.size == (width, height)
    except Exception:  # PIL raises errors of every kind; `decode_rgb` will name it
        return False


def _plain_jpeg(encoded: bytes) -> Pixels | None:
    """A gray or colour JPEG as it is stored; None for other kinds. Raises BadImage for damaged data."""
    decoder = turbojpeg()
    if decoder is None:
        return _torchvision_jpeg(encoded)
    known = decoder.header(encoded)
    if known is None or known.is_cmyk or known.width * known.height > MAX_PIXELS:
        return None
    pixels = np.empty((known.height, known.width, 3), np.uint8)
    decoder.decode(encoded, known, 1, pixels)
    return pixels


def _torchvision_jpeg(encoded: bytes) -> Pixels | None:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        image = decode_jpeg(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    except RuntimeError:
        return None
    return None if len(image) not in (1, 3) else image.expand(3, -1, -1).permute(1, 2, 0).numpy()
