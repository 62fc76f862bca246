"""A contact sheet: images in a grid of eight columns, each with its caption, as one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from pipelines.errors import UserError

COLUMNS = 8
GAP = 4
LINE = 14  # height of a caption
PAPER, INK = (255, 255, 255), (0, 0, 0)


def draw_sheet(images: Sequence[Image.Image], captions: Sequence[str], path: str | Path) -> None:
    """Draws the images, row by row, each in the middle of a cell that the largest of them fills.

    Raises:
        UserError: the file cannot be written.
    """
    width, height = max(image.width for image in images), max(image.height for image in images)
    columns = min(COLUMNS, len(images))
    size = (columns * (width + GAP) + GAP, -(-len(images) // columns) * (height + GAP + LINE) + GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, (image, text) in enumerate(zip(images, captions, strict=True)):
        left, top = GAP + place % columns * (width + GAP), GAP + place // columns * (height + GAP + LINE)
        sheet.paste(image, (left + (width - image.width) // 2, top + (height - image.height) // 2))
        text = text.encode("latin-1", "replace").decode("latin-1")  # all that PIL's own font is sure to have
        while len(text) > 1 and draw.textlength(text) > width:
            text = text[:-1]
        draw.text((left, top + height + 1), text, fill=INK)
    try:
        sheet.save(path, "PNG")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place") from None
