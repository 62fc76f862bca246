"""One encoded image of any kind -> what a beton stores of it. Converting processes import this: numpy and PIL only.

How pixels become 8-bit RGB:
    EXIF orientation is applied. Gray, palette, YCbCr and CMYK go through PIL's `convert("RGB")` (no colour profile is
    used). Alpha, of any kind, is laid over white. 16-bit gray becomes round(v * 255 / 65535); 16-bit colour keeps its
    high byte (PIL reads it so). Of several frames or pages the first is taken. Float and 32-bit images are refused:
    their range is not known.
How they are resized: never enlarged; antialiased bicubic (PIL), after a reduction in the DCT domain (JPEG) or by a box
    (others) while that leaves at least twice the target, where the difference cannot be seen.
JPEGs are decoded by the system's libturbojpeg where there is one, since it reports damaged data; PIL, used otherwise
    with the same pixels, reports missing data only.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import PIL.Image

from pipelines.errors import UserError
from pipelines.options import opt
from pipelines.read.base import MAX_PIXELS, MAX_SIDE
from pipelines.read.beton import JPEG_MODE, RAW_MODE
from pipelines.read.exif import orientation, turned
from pipelines.read.turbojpeg import BadImage, turbojpeg, turbojpeg_library

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
"""PIL's readers that see a file ("JPEG" opens MPO too): none that starts a program, as EPS does"""
REDUCING_GAP = 2
MIN_PAGE, MAX_PAGE = 1 << 21, 1 << 31  # FFCV's writer: 2 MiB to below 4 GiB

SIDES = ("shortest", "longest")
MODES = ("jpg", "raw", "proportion")
KINDS = ("auto", "folder", "tar", "parquet", "cifar")
LABEL_FROM = ("auto", "cls", "json", "folder", "tar")


@dataclass(frozen=True)
class ConvertSettings:
    """What the bytes of a converted dataset depend on besides its source. Raises UserError for a value out of range."""

    side: str = opt("shortest", "which side `size` limits: shortest or longest")
    size: int | None = opt(None, "images larger than this on that side are reduced to it; default: kept as they are")
    quality: int = opt(90, "of JPEGs that are encoded anew; one that already fits is stored as it is")
    mode: str = opt("jpg", "jpg, raw (RGB values), or proportion (a share of them raw)")
    raw_share: float = opt(0.5, "with mode proportion; chosen by a hash of their number in the source")
    seed: int | None = opt(0, "the samples are stored in an order shuffled by it; `none` keeps the source's order")
    labels: str | None = opt(
        None, "label file of a source that has none: NAME LABEL or LABEL a line; or ImageNet's devkit"
    )
    classes: str | None = opt(None, "file with the class names in order: another beton's manifest, or one name a line")
    split: str | None = opt(None, "part of a source that holds several, by its names or a column: train or test, say")
    kind: str = opt("auto", "what SRC is: auto (as its files say), folder, tar, parquet or cifar")
    label_from: str = opt(
        "auto", "where the labels of tars are: auto, cls or json (KEY.cls, KEY.json), folder (within the tar) or tar"
    )
    label_key: str | None = opt(None, "column or JSON key that holds the label; default: label, cls, ...")
    page_size: int = opt(1 << 23, "bytes, a power of two; no sample may be larger")
    max_pixels: int = opt(100_000_000, "largest image that is accepted")
    max_bytes: int = opt(1 << 28, "largest encoded image that is accepted")

    def __post_init__(self) -> None:
        choices = {"side": SIDES, "mode": MODES, "kind": KINDS, "label_from": LABEL_FROM}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(
                    f"--{name.replace('_', '-')} {getattr(self, name)!r} is unknown; choose one of {', '.join(known)}"
                )
        limits = {"quality": (1, 100), "raw_share": (0, 1), "max_pixels": (1, MAX_PIXELS), "max_bytes": (1, 1 << 31)}
        if self.size is not None:
            limits["size"] = (1, MAX_SIDE)
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must lie in {low}..{high}")
        for name, works, needed in (
            ("side", self.size is not None, "needs --size"),
            ("raw_share", self.mode == "proportion", "needs --mode proportion"),
            ("quality", self.mode != "raw", "needs --mode jpg or proportion"),
        ):
            if not works and getattr(self, name) != getattr(type(self), name):
                raise UserError(f"--{name.replace('_', '-')}: {needed}, or leave it out")
        if not MIN_PAGE <= self.page_size <= MAX_PAGE or self.page_size & (self.page_size - 1):
            raise UserError(f"--page-size {self.page_size} must be a power of two in {MIN_PAGE}..{MAX_PAGE}")


class Prepared(NamedTuple):
    """A sample as the beton stores it."""

    payload: bytes
    mode: int
    """JPEG_MODE or RAW_MODE"""
    width: int
    height: int
    how: tuple[str, ...]
    """what was done to it, for the manifest's counts"""


def prepare(data: bytes, settings: ConvertSettings, raw: bool) -> Prepared:
    """The image in `data` (an encoded file) as it is to be stored, raw or as JPEG. Raises BadImage."""
    if not data:
        raise BadImage("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of odd metadata; sizes are checked below
            with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return _prepare(image, data, settings, raw)
    except BadImage:
        raise
    except PIL.UnidentifiedImageError:
        raise BadImage(f"not an image in a known format ({', '.join(FORMATS)})") from None
    except PIL.Image.DecompressionBombError:
        raise BadImage(f"claims more than {settings.max_pixels} pixels (max_pixels)") from None
    except MemoryError:
        raise BadImage("decoding needs more memory than there is") from None
    except Exception as error:  # PIL's readers raise errors of every kind on damaged files
        raise BadImage(f"damaged: {' '.join(str(error).split()) or type(error).__name__}") from None


def prepare_cifar(data: bytes, settings: ConvertSettings, raw: bool) -> Prepared:
    """The same for an image of CIFAR's binary files: uint8 [3, 32, 32]."""
    image = PIL.Image.fromarray(np.frombuffer(data, np.uint8).reshape(3, 32, 32).transpose(1, 2, 0).copy())
    return _store(image, _target(*image.size, settings), 1, settings, raw, ())


def _prepare(image: PIL.Image.Image, data: bytes, settings: ConvertSettings, raw: bool) -> Prepared:
    width, height = image.size
    if width * height > settings.max_pixels:
        raise BadImage(f"claims {width}x{height} pixels, more than {settings.max_pixels} (max_pixels)")
    if width < 1 or height < 1:
        raise BadImage(f"claims {width}x{height} pixels")
    # Both rules treat the two sides alike, so the target can be computed before the image is turned.
    target = _target(width, height, settings)
    how: tuple[str, ...] = ()
    if image.format in ("JPEG", "MPO"):
        turn = orientation(image)
        if not raw and image.size == target and turn == 1 and _fits(image, data):
            return Prepared(data, JPEG_MODE, width, height, ("kept",))
        if image.mode != "RGB":
            how = (f"from {image.mode}",)
        image = _decode_jpeg(image, data, target)
    else:
        image.load()
        turn = orientation(image)  # after loading: PIL turns TIFFs by itself then
        if image.size != (width, height):
            target = _target(*image.size, settings)
        if image.mode != "RGB" or image.has_transparency_data:
            how = (f"from {image.mode}{' with alpha' if image.has_transparency_data else ''}",)
    return _store(_to_rgb(image), target, turn, settings, raw, how)


def _target(width: int, height: int, settings: ConvertSettings) -> tuple[int, int]:
    """Width and height to store."""
    side = min(width, height) if settings.side == "shortest" else max(width, height)
    if settings.size is None or side <= settings.size:
        return width, height
    scale = settings.size / side
    return max(1, round(width * scale)), max(1, round(height * scale))


def _store(
    image: PIL.Image.Image,
    target: tuple[int, int],
    turn: int,
    settings: ConvertSettings,
    raw: bool,
    how: tuple[str, ...],
) -> Prepared:
    """Resizes, turns and encodes an RGB image."""
    if max(target) > MAX_SIDE:
        raise BadImage(f"{target[0]}x{target[1]} pixels: a side is over {MAX_SIDE}; convert with `side: longest`")
    if image.size != target:
        image = image.resize(target, PIL.Image.Resampling.BICUBIC, reducing_gap=REDUCING_GAP)
        how += ("resized",)
    if turn != 1:
        image = turned(image, turn)
        how += ("turned",)
    if raw:
        payload, mode = image.tobytes(), RAW_MODE
    else:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=settings.quality, comment=b"")  # PIL would copy the source's
        payload, mode = file.getvalue(), JPEG_MODE
    return Prepared(payload, mode, *image.size, ("raw" if raw else "encoded", *how))


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode == "F":
        raise BadImage("holds floating-point values, whose range is not known; convert it to 8 bits first")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise BadImage("holds 32-bit values, whose range is not known; convert it to 8 bits first")
        return PIL.Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = PIL.Image.new("RGBA", layer.size, "white")
        return PIL.Image.alpha_composite(white, layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _frame_marker(data: bytes) -> int:
    """The marker of a JPEG's coding: 0xC0 baseline, 0xC1 extended, 0xC2 progressive, others rare; 0 if there
    is none."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return marker
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0


def _fits(image: PIL.Image.Image, data: bytes) -> bool:
    """Whether a JPEG of the right size and position can be stored as it is: one that FFCV, DALI and PIL all read,
    without a warning. Raises BadImage when it does not decode completely."""
    if image.format != "JPEG" or image.mode != "RGB" or data[-2:] != b"\xff\xd9":
        return False
    if _frame_marker(data) not in (0xC0, 0xC1, 0xC2):
        return False
    decoder = turbojpeg()
    if decoder is None:
        image.load()
        return True
    known = decoder.header(data)
    return known is not None and (known.width, known.height) == image.size and decoder.decode(data, known, 8) == ""


def _decode_jpeg(image: PIL.Image.Image, data: bytes, target: tuple[int, int]) -> PIL.Image.Image:
    """Pixels of an opened JPEG, reduced in the DCT domain by 2, 4 or 8 while both sides stay REDUCING_GAP times the
    target. Raises BadImage when data is damaged or missing."""
    divisor = 1
    while divisor < 8 and all(x // (2 * divisor) >= REDUCING_GAP * t for x, t in zip(image.size, target, strict=True)):
        divisor *= 2
    decoder = turbojpeg()
    known = None if decoder is None else decoder.header(data)
    if decoder is not None and known is not None and (known.width, known.height) == image.size:
        if known.is_cmyk:
            decoder.decode(data, known, 8)  # only looks for damage: PIL handles Adobe's inverted CMYK
        else:
            pixels = np.empty((-(-known.height // divisor), -(-known.width // divisor), 3), np.uint8)
            decoder.decode(data, known, divisor, pixels)
            return PIL.Image.fromarray(pixels)
    if divisor > 1:
        image.draft(None, (image.size[0] // divisor, image.size[1] // divisor))
    image.load()
    return image


def library_versions() -> dict[str, str]:
    """What the bytes of a converted image depend on besides its settings."""
    from PIL import features

    library = turbojpeg_library()
    return {
        "pillow": PIL.__version__,
        "libjpeg": str(features.version("libjpeg_turbo") or features.version("jpg")),
        "jpeg decoder": "pillow" if library is None else library._name,
    }
