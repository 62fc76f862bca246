"""The folder of an export: it appears complete or not at all, with a model card."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from pipelines.errors import UserError
from pipelines.files import sync
from std_fast import __version__
from std_fast.commands.export_formats import preprocessing
from std_fast.config.recipe import Recipe


@contextmanager
def draft_beside(out: Path) -> Iterator[Path]:
    """A hidden folder that becomes `out`, complete and on the disk, when the block ends well; else it is removed."""
    out = Path(os.path.abspath(out))
    draft = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        for left in out.parent.glob(f".{out.name}.*.partial"):  # by an export that was killed
            if (owner := left.name.split(".")[-2]).isdigit() and not Path(f"/proc/{owner}").exists():
                shutil.rmtree(left, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft
        for path in [*draft.rglob("*"), draft]:
            sync(path)
        os.replace(draft, out)  # onto an empty folder too, but never onto a full one
        sync(out.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot be written ({error}); make room or name another folder") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def readme(report: dict, recipe: Recipe, chosen: list[str]) -> str:
    """The model card: what it is, how images are prepared, how each file is used."""
    p, d, name = preprocessing(recipe), recipe.distill, recipe.student.name
    size, classes, differences = report["image_size"], report["classes"], report["differences"]
    source = f"distilled from {len(d.teachers)} teacher(s)" if d.teachers else "trained on its labels alone"
    distilled = f", {source} by STD (tokens: {d.tokens})" if d.mode == "std" else ""
    ours = (
        "import std_fast.registry  # registers the architecture\n"
        if (report["architecture"] or "").startswith("std_")
        else ""
    )
    uses = {
        "timm": f'{ours}import timm\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True).eval()',
        "class-head": 'import timm\nmodel = timm.create_model("local-dir:FOLDER/class-head", pretrained=True).eval()',
        "onnx": "import onnxruntime\nsession = onnxruntime.InferenceSession('model.onnx')\n"
        "logits = session.run(['logits'], {'images': images})[0]",
        "pt2": 'import torch\nlogits = torch.export.load("model.pt2").module()(images)',
    }
    text = f"""---
library_name: timm
pipeline_tag: image-classification
tags: [image-classification, timm, std_fast]
---
# {name}, {classes} classes, {size} px

Recipe `{recipe.name}`, step {report["step"]}{distilled}. Prediction by: {report["predict"]}. By std_fast {__version__}.

Input: RGB float32 `[B, 3, {size}, {size}]`, pixels from 0 to 1 less mean {p["mean"]}, over deviation {p["std"]};
crop as timm's `crop_mode` {p["crop_mode"]!r} with `crop_pct` {p["crop_pct"]}. Output: logits `[B, {classes}]`.
"""
    for form in chosen:
        text += f"\n{form}: read back, it differed by {differences[form]:.1e} of the largest logit.\n"
        text += f"\n```python\n{uses[form]}\n```\n"
    return text
