"""Students for other programs: `export_run` writes a folder, reads each file of it back, and compares the logits.

    model.safetensors, config.json   the student as a timm model: for `timm.create_model("local-dir:OUT")` and, put on
                                     the Hugging Face hub as it is, for "hf-hub:USER/NAME"
    class-head/                      likewise its class head alone, in timm's own Mixer or ResMLP: needs no std_fast
    model.onnx                       ONNX with any batch size
    model.pt2                        torch.export program with any batch size
    README.md                        what it is and how each is used; the hub's model card

Shapes: B batch, K classes, S side of the images in pixels.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path

import torch
from torch import Tensor

from pipelines.errors import UserError
from std_fast.commands.export_folder import draft_beside, readme
from std_fast.commands.export_formats import (
    Deployed,
    TimmModel,
    compare,
    from_hub_folder,
    from_onnx,
    quiet,
    timm_models,
    write_hub_folder,
    write_onnx,
    write_pt2,
)
from std_fast.method.student import Student
from std_fast.training.evaluate import trained_student

log = logging.getLogger("std_fast")

FORMATS = ("timm", "class-head", "onnx", "pt2")
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def export_run(run: Path | str, out: Path | str, formats: tuple[str, ...] = (), predict: str = "") -> dict:
    """Writes the newest weights of a run (the moving average where it has one) as `formats` into the new folder `out`.

    Everything is written beside `out`, read back and compared on random images, and only then renamed to `out`. The
    statistics networks of MINE are left out.

    Args:
        formats: of `FORMATS`; by default all that the student and the installed packages allow.
        predict: "mean", "class" or "distill": which heads predict; by default what the recipe says ("mean" unless
            changed).

    Returns:
        `out`, `run`, `step`, `architecture` (timm's name), `predict`, `classes`, `image_size`, `files` (name -> bytes),
        `differences` (format -> largest difference of a logit, relative to the largest logit), `left_out` (format ->
        why).

    Raises:
        UserError: no run, a format that cannot be had, an `out` that holds something or cannot be written.
        RuntimeError: what was read back gives other logits than the student; nothing is left behind.
    """
    run, out = Path(run), Path(out)
    check_arguments(out, formats, predict)
    recipe, student, step, class_names = trained_student(run, predict)
    complete, head = timm_models(recipe, student)
    left_out = reasons(complete, head, student)
    if missing := [name for name in formats if name in left_out]:
        raise UserError(f"--formats: {missing[0]} cannot be written: {left_out[missing[0]]}")
    chosen = [name for name in FORMATS if name in (formats or FORMATS) and name not in left_out]

    images = torch.randn(3, 3, *[recipe.data.image_size] * 2, generator=torch.Generator().manual_seed(0))
    deployed = Deployed(student).eval()
    with draft_beside(out) as draft, quiet(), torch.no_grad():
        if not deployed(images).isfinite().all():
            raise UserError(f"{run}: a random image gets logits that are not finite; the run has diverged")
        differences: dict[str, float] = {}
        timm_forms = {"timm": (draft, complete, deployed), "class-head": (draft / "class-head", head, student.backbone)}
        for name, (folder, model, original) in timm_forms.items():
            if name in chosen and model is not None:
                log.info("writing %s", name)
                write_hub_folder(folder, model, recipe, student.num_classes, class_names)
                differences[name] = compare(name, from_hub_folder(folder), original, images, torch.float64)
        differences |= write_programs(draft, chosen, deployed, images)
        report = {
            "out": str(out),
            "run": str(run),
            "step": step,
            "architecture": complete.architecture if complete else None,
            "predict": student.predict if student.head_teacher else "class",
            "classes": student.num_classes,
            "image_size": recipe.data.image_size,
            "differences": differences,
            "left_out": {} if formats else left_out,
        }
        (draft / "README.md").write_text(readme(report, recipe, chosen), encoding="utf-8")
        files = sorted(path for path in draft.rglob("*") if path.is_file())
        report["files"] = {str(path.relative_to(draft)): path.stat().st_size for path in files}
    return report


def check_arguments(out: Path, formats: tuple[str, ...], predict: str) -> None:
    """UserError for a format or way of prediction that does not exist, or an `out` that holds something."""
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"--formats: {name!r} is not one of {', '.join(FORMATS)}")
    if predict not in ("", "mean", "class", "distill"):
        raise UserError(f"--predict: {predict!r} is not one of mean, class, distill")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: is there already and not an empty folder; name a new one")


def write_programs(draft: Path, chosen: list[str], model: Deployed, images: Tensor) -> dict[str, float]:
    """Writes `model.onnx` and `model.pt2` where they are chosen; returns how far each differs, read back."""
    differences: dict[str, float] = {}
    programs = [name for name in ("onnx", "pt2") if name in chosen]
    if not programs:
        return differences
    batch = torch.export.Dim("batch")
    log.info("tracing the model for %s", " and ".join(programs))
    # strict: the shapes of the code are traced too, so that no Python number fixes the batch
    program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},), strict=True)
    if "onnx" in chosen:
        log.info("writing onnx")
        write_onnx(program, draft / "model.onnx")
        differences["onnx"] = compare("onnx", from_onnx(draft / "model.onnx"), model, images)
    if "pt2" in chosen:
        log.info("writing pt2")
        write_pt2(program, draft / "model.pt2")
        differences["pt2"] = compare("pt2", torch.export.load(draft / "model.pt2").module(), model, images)
    return differences


def reasons(complete: TimmModel | None, head: TimmModel | None, student: Student) -> dict[str, str]:
    """The formats that cannot be had -> why, and the fix."""
    left_out = {}
    if complete is None:
        left_out["timm"] = "timm cannot build a ResNet with small_stem; use onnx or pt2"
    if not student.head_teacher:
        left_out["class-head"] = "the student has one head, which the format timm holds"
    elif head is None:
        left_out["class-head"] = (
            "timm has no Mixer or ResMLP of this shape; model.safetensors needs `import std_fast.registry`"
        )
    if absent := [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]:
        left_out["onnx"] = f"{', '.join(absent)} not installed: pip install {' '.join(ONNX_PACKAGES)}"
    if sys.flags.optimize:  # torch's tracer looks for the instructions of an assertion
        left_out["onnx"] = left_out["pt2"] = "torch cannot trace under python -O or PYTHONOPTIMIZE; start without them"
    return left_out
