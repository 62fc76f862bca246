"""The files of an export: each format written, read back, and compared with the student.

Shapes: B batch, K classes, S side of the images in pixels.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from std_fast.config.recipe import Distill, Recipe
from std_fast.method.student import Student
from std_fast.models import Backbone
from std_fast.runtime.checkpoint import write_tensors

# Largest difference of any logit, relative to the largest logit. Models that torch runs are compared in float64, where
# only another function could differ by this much; programs are float32 and sum in another order.
TOLERANCE = {"timm": 1e-9, "class-head": 1e-9, "onnx": 2e-5, "pt2": 2e-5}


class TimmModel(NamedTuple):
    """How timm builds a model, and the weights to put into it."""

    architecture: str
    args: dict[str, Any]  # of `timm.create_model`, besides the number of classes and the image size
    state: dict[str, Tensor]


class Deployed(nn.Module):
    """The student as a function of the images alone: `[B, 3, S, S]` -> logits `[B, K]`."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Tensor:
        return self.student(images)


def timm_models(recipe: Recipe, student: Student) -> tuple[TimmModel | None, TimmModel | None]:
    """The student, and its class head alone in an architecture of timm's; None where timm has no such model."""
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
        args = {"teachers": d.num_teachers, "tokens": d.tokens, "predict": student.predict}
        if d.token_mlp_ratio != Distill.token_mlp_ratio:
            args["token_mlp_ratio"] = list(d.token_mlp_ratio)
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


def write_hub_folder(
    folder: Path, model: TimmModel, recipe: Recipe, num_classes: int, class_names: list[str] | None
) -> None:
    """`model.safetensors` and the `config.json` from which timm and the hub build the model again."""
    folder.mkdir(exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state.items()}
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
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
    if recipe.run.precision != "auto":
        config["precision"] = recipe.run.precision  # for `std-fast predict`; others pass over it
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
        "interpolation": {"auto": "bilinear", "area": "box"}.get(recipe.data.eval_resample, recipe.data.eval_resample),
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


def write_pt2(program: torch.export.ExportedProgram, path: Path) -> None:
    """The program as torch.export.save writes it, through memory: torch's writer ends the process on a full disk."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    path.write_bytes(buffer.getvalue())  # after an error getbuffer's view crashes the collector of Python 3.12.1


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


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the warnings of torch and onnxscript; errors are raised as ever."""
    onnxscript = logging.getLogger("onnxscript")
    level = onnxscript.level
    onnxscript.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        onnxscript.setLevel(level)
