"""Makes a folder of odd and bad image files, and says what converting must make of each.

    python -m tests.odd_images DIR     makes them in DIR/CLASS/, converts them to DIR.beton and prints the table

Good pictures show four quadrants, so that a turned or mirrored one is told from an upright one.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.TiffImagePlugin

WIDTH, HEIGHT = 96, 64
QUADRANTS = ((220, 40, 40), (40, 200, 40), (40, 40, 220), (230, 220, 60))
"""colours: top left, top right, bottom left, bottom right"""
ORIENTATION = 0x0112
CLASS = "odd"


class Kind(NamedTuple):
    name: str
    make: Callable[[Path], None]
    reason: str
    """part of the reason it must be refused for; "" if it must be stored; "-" if it must be passed over"""
    size: tuple[int, int]
    """width and height stored"""
    colours: tuple[tuple[int, int, int], ...]
    """of the quadrants stored"""


def picture(width: int = WIDTH, height: int = HEIGHT) -> PIL.Image.Image:
    pixels = np.zeros((height, width, 3), np.uint8)
    for i, colour in enumerate(QUADRANTS):
        rows = slice(height // 2) if i < 2 else slice(height // 2, None)
        pixels[rows, slice(width // 2) if i % 2 == 0 else slice(width // 2, None)] = colour
    return PIL.Image.fromarray(pixels)


def encoded(image: PIL.Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def turned(orientation: int) -> bytes:
    """The picture, stored so that this EXIF orientation makes it upright."""
    from PIL.Image import Transpose as T

    inverse = {
        2: T.FLIP_LEFT_RIGHT,
        3: T.ROTATE_180,
        4: T.FLIP_TOP_BOTTOM,
        5: T.TRANSPOSE,
        6: T.ROTATE_90,
        7: T.TRANSVERSE,
        8: T.ROTATE_270,
    }
    image = picture()
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(image.transpose(inverse[orientation]) if orientation in inverse else image, "JPEG", exif=exif)


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG made by hand, for what PIL does not write. rows: filter byte and samples of each line."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def png16() -> bytes:
    pixels = np.asarray(picture()).astype(">u2") * 257
    return png(WIDTH, HEIGHT, 16, 2, b"".join(b"\0" + row.tobytes() for row in pixels))


def gray16() -> PIL.Image.Image:
    return PIL.Image.fromarray(np.asarray(picture().convert("L")).astype(np.uint16) * 257)


def alpha() -> PIL.Image.Image:
    """The picture with its lower half transparent."""
    image = picture().convert("RGBA")
    mask = PIL.Image.new("L", image.size, 255)
    mask.paste(0, (0, HEIGHT // 2, WIDTH, HEIGHT))
    image.putalpha(mask)
    return image


def noise_jpeg(**options: object) -> bytes:
    """A JPEG with much coded data, for damage in its middle."""
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return encoded(PIL.Image.fromarray(pixels), "JPEG", **options)


def damaged_middle() -> bytes:
    data = bytearray(noise_jpeg())
    middle = len(data) // 2
    data[middle : middle + 40] = b"\xff\xd9" * 20  # an end mark, then nonsense
    return bytes(data)


def damaged_progressive() -> bytes:
    data = bytearray(noise_jpeg(progressive=True))
    middle = len(data) // 2
    data[middle : middle + 8] = bytes(8)
    return bytes(data)


def patched_frame(data: bytes, at: int, new: bytes) -> bytes:
    """The JPEG with bytes of its frame header replaced; at: 4 precision, 5 height, 7 width."""
    start = data.index(b"\xff\xc0") + at
    return data[:start] + new + data[start + len(new) :]


def gray_of(colours: tuple[tuple[int, int, int], ...]) -> tuple[tuple[int, int, int], ...]:
    grays = [PIL.Image.new("RGB", (1, 1), colour).convert("L").getpixel((0, 0)) for colour in colours]
    return tuple((g, g, g) for g in grays)  # type: ignore[misc]


GRAYS = gray_of(QUADRANTS)
WHITE = (255, 255, 255)
OVER_WHITE = (*QUADRANTS[:2], WHITE, WHITE)


def kinds() -> list[Kind]:
    plain = encoded(picture(), "JPEG", quality=95)
    found: list[Kind] = []

    def add(
        name: str,
        content: bytes | Callable[[Path], None],
        reason: str = "",
        size: tuple[int, int] = (WIDTH, HEIGHT),
        colours: tuple[tuple[int, int, int], ...] = QUADRANTS,
    ) -> None:
        make = (lambda path: path.write_bytes(content)) if isinstance(content, bytes) else content  # type: ignore[arg-type, return-value]
        found.append(Kind(name, make, reason, size, colours))  # type: ignore[arg-type]

    # what must be stored
    add("plain.jpg", plain)
    add("progressive.jpg", encoded(picture(), "JPEG", progressive=True))
    add("no_ending", plain)
    add("png_named.jpg", encoded(picture(), "PNG"))
    add("jpeg_named.png", plain)
    for i in range(1, 9):
        add(f"exif_{i}.jpg", turned(i))
    add("exif_9.jpg", turned(9))
    add("exif_broken.jpg", encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"))
    add("gray.jpg", encoded(picture().convert("L"), "JPEG"), colours=GRAYS)
    add("cmyk.jpg", encoded(picture().convert("CMYK"), "JPEG"))
    add("palette.png", encoded(picture().quantize(8), "PNG"))
    add("palette_alpha.png", encoded(alpha().quantize(8), "PNG"), colours=OVER_WHITE)
    add("one_bit.png", encoded(PIL.Image.new("1", (WIDTH, HEIGHT), 1), "PNG"), colours=(WHITE,) * 4)
    add("gray_alpha.png", encoded(alpha().convert("LA"), "PNG"), colours=(*GRAYS[:2], WHITE, WHITE))
    add("alpha.png", encoded(alpha(), "PNG"), colours=OVER_WHITE)
    add("gray_16.png", encoded(gray16(), "PNG"), colours=GRAYS)
    add("gray_16.tif", encoded(gray16(), "TIFF"), colours=GRAYS)
    add("colour_16.png", png16())
    add("frames.gif", encoded(picture(), "GIF", save_all=True, append_images=[PIL.Image.new("RGB", (WIDTH, HEIGHT))]))
    add("picture.webp", encoded(picture(), "WEBP", quality=95))
    add("picture.bmp", encoded(picture(), "BMP"))
    add("pages.tif", encoded(picture(), "TIFF", save_all=True, append_images=[PIL.Image.new("RGB", (9, 9))]))
    sideways = PIL.TiffImagePlugin.ImageFileDirectory_v2()
    sideways[ORIENTATION] = 6
    turned_tiff = picture().transpose(PIL.Image.Transpose.ROTATE_90)
    add("exif_6.tif", encoded(turned_tiff, "TIFF", tiffinfo=sideways))
    add("two_pictures.mpo", encoded(picture(), "MPO", save_all=True, append_images=[picture()]))
    add("1x1.png", encoded(picture(2, 2).crop((0, 0, 1, 1)), "PNG"), size=(1, 1), colours=QUADRANTS[:1] * 4)
    add("20000x20.jpg", encoded(picture(20000, 20), "JPEG"), size=(20000, 20))
    add("after_the_end.jpg", plain + b"more" * 100)
    add("before_the_end.jpg", plain[:-2] + b"\x12\x34\x56" + plain[-2:])
    add("Ünïcödé 写真.jpg", plain)
    add("new\nline.jpg", plain)
    add(os.fsdecode(b"not_utf8_\xff\xfe.jpg"), plain)
    add("l" * 251 + ".jpg", plain)
    add("link.jpg", lambda path: path.symlink_to("plain.jpg"))
    # what must be refused, by name
    add("float.tif", encoded(PIL.Image.new("F", (9, 9)), "TIFF"), "floating-point")
    values = PIL.Image.fromarray(np.full((9, 9), 1 << 20, np.int32))
    add("int_32.tif", encoded(values, "TIFF"), "32-bit")
    add("bomb.png", png(12000, 9000, 1, 0, bytes(9000 * (1 + 1500))), "pixels")
    add("bomb.jpg", patched_frame(plain, 5, struct.pack(">HH", 65000, 65000)), "pixels")
    add("too_tall_for_its_data.jpg", patched_frame(plain, 5, struct.pack(">H", 4 * HEIGHT)), "damaged")
    add("bits_12.jpg", patched_frame(plain, 4, b"\x0c"), "image")
    add("truncated.jpg", noise_jpeg()[:-2000], "damaged")
    add("truncated_head.jpg", plain[:300], "damaged")
    add("truncated.png", encoded(picture(), "PNG")[:-40], "damaged")
    add("only_a_header.jpg", plain[: plain.index(b"\xff\xda")], "image")  # Pillow 12: not an image, 13: damaged image
    add("damaged_middle.jpg", damaged_middle(), "damaged")
    add("damaged_progressive.jpg", damaged_progressive(), "damaged")
    add("empty.jpg", b"", "empty")
    add("text.jpg", b"not an image\n", "known format")
    add("page.jpg", b"<!DOCTYPE html><html>404</html>", "known format")
    add("drawing.svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "known format")
    add("program.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "known format")
    add("loop.jpg", lambda path: path.symlink_to(path.name), "symbolic links")
    add("dangling.jpg", lambda path: path.symlink_to("nowhere.jpg"), "No such file")
    add("device.jpg", lambda path: path.symlink_to("/dev/zero"), "neither a file")
    add("pipe.jpg", lambda path: os.mkfifo(path), "neither a file")
    add("folder.jpg", lambda path: path.mkdir(), "a folder")
    if os.geteuid():  # root reads everything

        def locked(path: Path) -> None:
            path.write_bytes(plain)
            path.chmod(0)

        add("locked.jpg", locked, "Permission denied")
    # what must be passed over, and listed
    add(".DS_Store", b"\0\0\0\1Bud1", "-")
    add("Thumbs.db", b"\xd0\xcf\x11\xe0", "-")
    return found


def make(folder: Path) -> list[Kind]:
    """Makes every kind in folder/CLASS. Returns them."""
    made = kinds()
    (folder / CLASS).mkdir(parents=True)
    for kind in made:
        kind.make(folder / CLASS / kind.name)
    return made
