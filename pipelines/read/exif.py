"""EXIF orientation: which way up a stored image is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import PIL.Image


def orientation(image: PIL.Image.Image) -> int:
    """EXIF orientation, 1..8, of an opened image; 5..8 swap its sides. 1 for none or broken EXIF, as in browsers."""
    if image.format == "TIFF":  # PIL turns these itself, and its `size` is that after the turn
        return 1
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # a broken EXIF block raises errors of many kinds; the pixels are still good
        return 1
    return value if value in range(1, 9) else 1


def turned(image: PIL.Image.Image, turn: int) -> PIL.Image.Image:
    """The image as it is shown with this orientation, of the size that `Source.sizes` gives."""
    from PIL.Image import Transpose as T

    turns = {
        2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_270, 7: T.TRANSVERSE,
        8: T.ROTATE_90,
    }  # fmt: skip
    return image.transpose(turns[turn]) if turn in turns else image
