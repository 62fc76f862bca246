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
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from pipelines.errors import UserError
from std_fast import __version__
from std_fast.config.recipe import Recipe, loads
from std_fast.method.student import Student
from std_fast.models import Backbone
from std_fast.runtime import checkpoint
from std_fast.teachers.classifiers import load_weights
from std_fast.training.build import build_student

FORMATS = ("timm", "class-head", "onnx", "pt2")
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
# Largest difference of any logit, relative to the largest logit. Models that torch runs are compared in float64, where
# only another function could differ by this much; programs are float32 and sum in another order.
TOLERANCE = {"timm": 1e-9, "class-head": 1e-9, "onnx": 2e-5, "pt2": 2e-5}


class TimmModel(NamedTuple):
    """How timm builds a model, and the weights to put into it."""

    architecture: str
    args: dict[str, Any]  # of `timm.create_model`, besides the number of classes and the image size
    state: dict[str, Tensor]


def export_run(run: Path | str, out: Path | str, formats: tuple[str, ...] = (), predict: str = "") -> dict:
    """Writes the newest weights of a run (the moving average where it has one) as `formats` into the new folder `out`.

    Everything is written beside `out`, read back and compared on random images, and only then renamed to `out`. The
    statistics networks of MINE are left out.

    Args:
        formats: of `FORMATS`; by default all that the student and the installed packages allow.
        predict: "mean", "class" or "distill": which heads answer; by default what the recipe says ("mean" unless
            changed).

    Returns:
        `out`, `run`, `step`, `architecture` (timm's name), `predict`, `classes`, `image_size`, `files` (name -> bytes),
        `differences` (format -> largest difference of a logit, relative to the largest logit), `left_out` (format ->
        why).

    Raises:
        UserError: no run, a format that cannot be had, an `out` that holds something or cannot be written.
        RuntimeError: what was read back does not answer as the student does; nothing is left behind.
    """
    run, out = Path(run), Path(out)
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"formats: {name!r} is not one of {', '.join(FORMATS)}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: is there already and not an empty folder; name a new one")
    if predict not in ("", "mean", "class", "distill"):
        raise UserError(f"predict: {predict!r} is not one of mean, class, distill")
    recipe, student, step, class_names = trained_student(run, predict)
    whole, head = timm_models(recipe, student)
    left_out = reasons(whole, head, student)
    if missing := [name for name in formats if name in left_out]:
        raise UserError(f"formats: {missing[0]} cannot be had: {left_out[missing[0]]}")
    chosen = [name for name in FORMATS if name in (formats or FORMATS) and name not in left_out]

    images = torch.randn(3, 3, *[recipe.data.image_size] * 2, generator=torch.Generator().manual_seed(0))
    deployed = Deployed(student).eval()
    differences: dict[str, float] = {}
    with draft_beside(out) as draft, quiet(), torch.no_grad():
        if not deployed(images).isfinite().all():
            raise UserError(f"{run}: a random image gets logits that are not finite; the run has diverged")
        if "timm" in chosen and whole is not None:
            write_hub_folder(draft, whole, recipe, student.num_classes, class_names)
            differences["timm"] = compare("timm", from_hub_folder(draft), deployed, images, torch.float64)
        if "class-head" in chosen and head is not None:
            write_hub_folder(draft / "class-head", head, recipe, student.num_classes, class_names)
            again = from_hub_folder(draft / "class-head")
            differences["class-head"] = compare("class-head", again, student.backbone, images, torch.float64)
        if "onnx" in chosen or "pt2" in chosen:
            batch = torch.export.Dim("batch")
            # strict: the shapes of the code are traced too, so that no Python number fixes the batch
            program = torch.export.export(deployed, (images[:2],), dynamic_shapes=({0: batch},), strict=True)
        if "onnx" in chosen:
            write_onnx(program, draft / "model.onnx")
            differences["onnx"] = compare("onnx", from_onnx(draft / "model.onnx"), deployed, images)
        if "pt2" in chosen:
            torch.export.save(program, draft / "model.pt2")
            differences["pt2"] = compare("pt2", torch.export.load(draft / "model.pt2").module(), deployed, images)
        report = {
            "out": str(out),
            "run": str(run),
            "step": step,
            "architecture": whole.architecture if whole else None,
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


# -- what is exported -------------------------------------------------------------------------------------------------


class Deployed(nn.Module):
    """The student as a function of the images alone: `[B, 3, S, S]` -> logits `[B, K]`."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Tensor:
        return self.student(images)


class Trained(NamedTuple):
    """What a run has come to."""

    recipe: Recipe
    student: Student  # without statistics networks, in evaluation mode, on the CPU
    step: int
    class_names: list[str] | None


def trained_student(run: Path, predict: str) -> Trained:
    """From the newest whole checkpoint of a run, the moving average where it has one."""
    found = checkpoint.newest(run / "checkpoints")
    if found is None:
        raise UserError(f"{run}: holds no run with a whole checkpoint; give the folder that `std-fast train` wrote")
    path, tensors, meta = found
    recipe, num_classes, names = loads(meta["recipe"], str(path)), meta["num_classes"], meta["class_names"]
    bare = replace(
        recipe,
        student=replace(recipe.student, weights="", drop_path=0.0),
        distill=replace(recipe.distill, mine=replace(recipe.distill.mine, weight=0.0)),
    )
    with torch.random.fork_rng(devices=[]):  # fresh weights are drawn, and at once replaced
        student = build_student(bare, num_classes)
    state: dict[str, Tensor] = {}
    for kind in ("model.", "ema."):
        own = {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}
        state |= {name: tensor for name, tensor in own.items() if not name.startswith("mine.")}
    load_weights(student, state, str(run))
    if predict:
        student.predict = predict  # type: ignore[assignment]
    names = names if names and len(names) == num_classes else None
    return Trained(recipe, student.eval().requires_grad_(False), meta["step"], names)


def timm_models(recipe: Recipe, student: Student) -> tuple[TimmModel | None, TimmModel | None]:
    """The whole student, and its class head alone in an architecture of timm's; None where timm has no such model."""
    from std_fast.registry import architecture

    d, backbone = recipe.distill, student.backbone
    if not isinstance(backbone, Backbone):
        options = dict(recipe.student.options)
        small_stem = options.pop("small_stem", False)  # our own change to timm's ResNet
        return (None if small_stem else TimmModel(recipe.student.name, options, backbone.state_dict())), None
    twin = timm_twin(backbone)
    head = TimmModel(twin, {}, backbone.state_dict()) if twin else None
    if not student.head_teacher:
        if head is not None:
            return head, None
        args: dict[str, Any] = {"teachers": 0}
    else:
        args = {"teachers": len(d.teachers), "tokens": d.tokens, "predict": student.predict}
        args |= {key: to_lists(value) for key, value in (("taps", d.taps), ("assign", d.assign)) if value is not None}
    args |= recipe.student.options
    return TimmModel(architecture(recipe.student.name), args, student.state_dict()), head


def to_lists(value: Any) -> Any:
    return [to_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def timm_twin(backbone: Backbone) -> str | None:
    """The Mixer or ResMLP of timm's whose parameters have the names and shapes of this backbone's, if there is one."""
    import timm

    def shapes(model: nn.Module) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in model.state_dict().items()}

    own = shapes(backbone)
    for name in timm.list_models(["mixer_*", "resmlp_*"]):
        with torch.device("meta"), quiet():  # an image smaller than a patch makes empty layers
            twin = timm.create_model(name, num_classes=backbone.num_classes, img_size=backbone.image_size)
        if shapes(twin) == own:
            return name
    return None


def reasons(whole: TimmModel | None, head: TimmModel | None, student: Student) -> dict[str, str]:
    """The formats that cannot be had -> why, and what mends it."""
    left_out = {}
    if whole is None:
        left_out["timm"] = "timm cannot build a ResNet with small_stem; use onnx or pt2"
    if not student.head_teacher:
        left_out["class-head"] = "the student has no other heads; timm is its class head"
    elif head is None:
        left_out["class-head"] = "timm has no Mixer or ResMLP of this shape; use timm, which needs std_fast"
    if absent := [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]:
        left_out["onnx"] = f"{', '.join(absent)} not installed: pip install {' '.join(ONNX_PACKAGES)}"
    return left_out


# -- formats ----------------------------------------------------------------------------------------------------------


def write_hub_folder(
    folder: Path, model: TimmModel, recipe: Recipe, num_classes: int, class_names: list[str] | None
) -> None:
    """`model.safetensors` and the `config.json` from which timm and the hub build the model again."""
    folder.mkdir(exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    built = create(model, num_classes, recipe.data.image_size)
    config: dict[str, Any] = {
        "architecture": model.architecture,
        "num_classes": num_classes,
        "num_features": built.num_features,
        "pretrained_cfg": {
            **preprocessing(recipe),
            "fixed_input_size": bool(built.pretrained_cfg.get("fixed_input_size")),
            "num_classes": num_classes,
            "first_conv": built.pretrained_cfg.get("first_conv"),
            "classifier": built.pretrained_cfg.get("classifier"),
        },
    }
    if class_names:
        config["label_names"] = class_names
    if model.args:
        config["model_args"] = model.args
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def create(model: TimmModel, num_classes: int, image_size: int) -> Any:
    """The model by timm, with fresh weights on no device: for what timm knows of it."""
    import timm

    overlay = {"input_size": (3, image_size, image_size), "num_classes": num_classes}
    with torch.device("meta"):
        return timm.create_model(model.architecture, pretrained_cfg_overlay=overlay, **model.args)


def preprocessing(recipe: Recipe) -> dict[str, Any]:
    """What is done to an image before the model sees it, in timm's words."""
    crop = recipe.data.eval_crop
    return {
        "input_size": [3, recipe.data.image_size, recipe.data.image_size],
        "mean": list(recipe.augment.mean),
        "std": list(recipe.augment.std),
        "interpolation": "bilinear",  # what `pipelines` does, antialiased
        "crop_pct": crop.fraction if crop.kind == "center" else 1.0,
        "crop_mode": "squash" if crop.kind == "full" else "center",
    }


def from_hub_folder(folder: Path) -> nn.Module:
    """The folder as timm reads it."""
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    """One file with the weights inside; input `images`, output `logits`."""
    names: dict[str, Any] = dict(input_names=["images"], output_names=["logits"])
    torch.onnx.export(program, f=path, dynamo=True, external_data=False, verbose=False, **names)


def from_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """The file as onnxruntime runs it on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def compare(
    name: str,
    again: Callable[[Tensor], Tensor],
    original: nn.Module,
    images: Tensor,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Largest difference between the logits of what was read back and of the original, for a batch and for one image.

    Relative to the largest logit. Modules are compared in `dtype`, and left in it when it is not theirs.

    Raises:
        RuntimeError: it exceeds TOLERANCE, or shapes differ.
    """
    if dtype == torch.float64:
        again, original = again.double(), original.double()  # type: ignore[attr-defined]
    expected = original(images.to(dtype))
    if dtype == torch.float64:
        original.float()  # float32 values survive the way there and back
    largest = 0.0
    for part in (slice(None), slice(1)):
        got = again(images[part].to(dtype))
        if got.shape != expected[part].shape:
            shapes = f"{tuple(got.shape)}, the student {tuple(expected[part].shape)}"
            raise RuntimeError(f"{name}: read back, it gives logits {shapes}")
        difference = (got - expected[part]).abs().max() / expected.abs().max().clamp(min=torch.finfo(dtype).tiny)
        if not difference <= TOLERANCE[name]:  # also when it is not a number
            much = f"{difference:.1e} of the largest, more than {TOLERANCE[name]:.0e}"
            raise RuntimeError(f"{name}: read back, its logits differ by {much}")
        largest = max(largest, difference.item())
    return largest


# -- the folder -------------------------------------------------------------------------------------------------------


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch and onnxscript say of their own doings; errors are raised as ever."""
    onnxscript = logging.getLogger("onnxscript")
    level = onnxscript.level
    onnxscript.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        onnxscript.setLevel(level)


@contextmanager
def draft_beside(out: Path) -> Iterator[Path]:
    """A hidden folder that becomes `out` when the block ends well, whole and on the disk, and vanishes otherwise."""
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


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def readme(report: dict, recipe: Recipe, chosen: list[str]) -> str:
    """The model card: what it is, how images are prepared, how each file is used."""
    p, d, name = preprocessing(recipe), recipe.distill, recipe.student.name
    size, classes, differences = report["image_size"], report["classes"], report["differences"]
    taught = f", distilled from {len(d.teachers)} teacher(s) by STD (tokens: {d.tokens})" if d.mode == "std" else ""
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

Recipe `{recipe.name}`, step {report["step"]}{taught}. Prediction by: {report["predict"]}. By std_fast {__version__}.

Input: RGB float32 `[B, 3, {size}, {size}]`, pixels from 0 to 1 less mean {p["mean"]}, over deviation {p["std"]};
crop as timm's `crop_mode` {p["crop_mode"]!r} with `crop_pct` {p["crop_pct"]}. Output: logits `[B, {classes}]`.
"""
    for form in chosen:
        text += f"\n{form}: read back, it differed by {differences[form]:.1e} of the largest logit.\n"
        text += f"\n```python\n{uses[form]}\n```\n"
    return text
