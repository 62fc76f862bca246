"""A contact sheet: what the student sees, drawn as one PNG. Shapes: B batch, H height, W width."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from pipelines.augment.device import TrainBatch
from pipelines.augment.spec import AugmentSpec
from pipelines.errors import UserError

CELL = 96  # pixels: a smaller image is enlarged by an integer factor to at least this width, so that a caption fits
GAP = 4
LINE = 14  # height of the caption
PAPER, INK = (255, 255, 255), (0, 0, 0)


def contact_sheet(
    batch: TrainBatch | Tensor,
    path: str | Path,
    columns: int = 8,
    *,
    spec: AugmentSpec | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write a grid of a batch's images, row by row, to `path` (PNG).

    batch        uint8 [B, 3, H, W], drawn as it is; or a TrainBatch, whose normalisation (`spec.mean`, `spec.std`) is
                 undone and which gets captions such as `cat` or `cat 0.37 dog`
    class_names  for the captions; class numbers without it

    Raises UserError when the file cannot be written.
    """
    if isinstance(batch, TrainBatch):
        images, captions = denormalise(batch.images, spec or AugmentSpec()), _captions(batch, class_names)
    else:
        images, captions = batch, None
    B, _, H, W = images.shape
    columns = max(1, min(columns, B))
    enlarge = -(-CELL // W)
    width, height = W * enlarge + GAP, H * enlarge + GAP + (LINE if captions else 0)
    sheet = Image.new("RGB", (columns * width + GAP, -(-B // columns) * height + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, pixels in enumerate(images.permute(0, 2, 3, 1).cpu().contiguous().numpy()):
        left, top = GAP + i % columns * width, GAP + i // columns * height
        cell = Image.fromarray(pixels).resize((W * enlarge, H * enlarge), Image.Resampling.NEAREST)
        sheet.paste(cell, (left, top))
        if captions:
            draw.text((left, top + H * enlarge + 1), _fit(draw, captions[i], W * enlarge), fill=INK)
    try:
        sheet.save(path, format="PNG")
    except OSError as error:
        raise UserError(
            f"cannot write the contact sheet {path}: {error.strerror}; name a folder that exists"
        ) from error


def denormalise(images: Tensor, spec: AugmentSpec) -> Tensor:
    """Normalised float [B, 3, H, W] -> the nearest uint8; erased pixels (normal noise) are cut to 0..255."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (spec.mean, spec.std))
    return ((images.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def _captions(mixed: TrainBatch, class_names: Sequence[str] | None) -> list[str]:
    def name(label: int) -> str:
        return class_names[label] if class_names else str(label)

    rows = zip(mixed.labels_a.tolist(), mixed.labels_b.tolist(), mixed.lam.tolist(), strict=True)
    return [name(a) if lam == 1 else f"{name(a)} {lam:.2f} {name(b)}" for a, b, lam in rows]


def _fit(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    while len(text) > 1 and draw.textlength(text) > width:
        text = text[:-1]
    return text
