"""What the student sees, drawn as a contact sheet. Shapes: B batch, H height, W width."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pipelines.augment.device import TrainBatch
from pipelines.augment.spec import AugmentSpec
from pipelines.sheet import draw_sheet

CELL = 96  # pixels: a smaller image is enlarged by an integer factor to at least this width, so that a caption fits


def contact_sheet(
    batch: TrainBatch, path: str | Path, spec: AugmentSpec, class_names: Sequence[str] | None = None
) -> None:
    """Draws a batch, its normalisation (`spec.mean`, `spec.std`) undone, with captions such as `cat` or `cat 0.37 dog`.

    class_names: for the captions; class numbers without it. Raises UserError when the file cannot be written.
    """

    def name(label: int) -> str:
        return class_names[label] if class_names else str(label)

    enlarge = -(-CELL // batch.images.shape[3])
    pixels_BHW3 = denormalise(batch.images, spec).permute(0, 2, 3, 1).cpu()
    large = pixels_BHW3.repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2).numpy()
    rows = zip(batch.labels_a.tolist(), batch.labels_b.tolist(), batch.lam.tolist(), strict=True)
    captions = [name(a) if lam == 1 else f"{name(a)} {lam:.2f} {name(b)}" for a, b, lam in rows]
    draw_sheet([Image.fromarray(image) for image in large], captions, path)


def denormalise(images: Tensor, spec: AugmentSpec) -> Tensor:
    """Normalised float [B, 3, H, W] -> the nearest uint8; erased pixels (normal noise) are cut to 0..255."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (spec.mean, spec.std))
    return ((images.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
