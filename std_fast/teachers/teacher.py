"""Frozen teachers: timm classifiers by name, files and folders of weights, or runs of this project.

Shapes: B batch, K classes, M teachers, S side of a teacher's input in pixels.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.errors import UserError
from std_fast.config.recipe import TeacherSpec
from std_fast.method.losses import TeacherTargets, targets_from_logits
from std_fast.models import BACKBONES
from std_fast.models.common import check_images
from std_fast.teachers.classes import DataClasses, select_classes, wrong_classes
from std_fast.teachers.classifiers import (
    build_classifier,
    create_pretrained,
    create_timm,
    last_layers,
    load_weights,
    other_shapes,
    read_run,
    read_weights,
    stored_classes,
    timm_config,
)
from std_fast.teachers.fold import fold_batch_norms, random_image
from std_fast.teachers.hub_folder import Triple, read_hub_folder

log = logging.getLogger("std_fast")


class Teacher(nn.Module):
    """A frozen classifier that converts the student's images to its own normalisation and input size.

    It computes in the type of its weights, whatever autocast surrounds it: casting the weights once is faster than
    autocast's cast at each call. Normalisation and resizing are done in the images' own type before.

    Args:
        model: images `[B, 3, S, S]` -> logits of its own classes.
        mean, std: normalisation that the model was trained with, for pixels in [0, 1].
        student_mean, student_std: normalisation of the images that it is given.
        image_size: side S of its input; None takes the images as they are.
        classes: for each of the K classes of the data the model's own; None where they are the same.
    """

    scale: Tensor
    shift: Tensor
    classes: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        mean: Triple,
        std: Triple,
        student_mean: Triple,
        student_std: Triple,
        image_size: int | None = None,
        classes: Sequence[int] | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.model, self.image_size, self.num_classes = model, image_size, num_classes
        self.dtype = next((p.dtype for p in model.parameters()), torch.float32)  # of the first layer
        self.same = tuple(mean) == tuple(student_mean) and tuple(std) == tuple(student_std)
        # (x * s_std + s_mean - mean) / std as one multiplication and one addition
        numbers = torch.tensor([mean, std, student_mean, student_std], dtype=torch.float64)
        m, s, sm, ss = numbers.view(4, 1, 3, 1, 1)
        self.register_buffer("scale", (ss / s).float(), persistent=False)
        self.register_buffer("shift", ((sm - m) / s).float(), persistent=False)
        self.register_buffer("classes", None if classes is None else torch.tensor(classes), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode, whatever a surrounding module does."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Images in the student's normalisation `[B, 3, H, W]` -> logits `[B, K]`."""
        with torch.autocast(images.device.type, enabled=False):
            if not self.same:
                images = torch.addcmul(self.shift, images, self.scale)
            if self.image_size is not None and images.shape[-1] != self.image_size:
                size = (self.image_size, self.image_size)
                images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
            logits = self.model(images.to(self.dtype))
            if self.num_classes is not None and logits.shape[1:] != (self.num_classes,):
                shape = list(logits.shape)
                raise UserError(
                    f"teachers: one gives logits of shape {shape}, not [B, {self.num_classes}]; fix its head"
                )
            return logits if self.classes is None else logits.index_select(1, self.classes)


class Teachers(nn.Module):
    """All teachers of a run, in the recipe's order: images -> `TeacherTargets`, without gradients."""

    def __init__(self, teachers: list[Teacher], temperature: float | None = None, top_k: int = 0) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(teachers)
        self.temperature, self.top_k = temperature, top_k

    def forward(self, images: Tensor) -> TeacherTargets:
        """Images `[B, 3, H, W]`, mixed and normalised as for the student -> targets of the M teachers."""
        check_images(images)
        with torch.no_grad():
            logits = torch.stack([teacher(images) for teacher in self.teachers], dim=1)
            return targets_from_logits(logits, self.temperature, self.top_k)


class LoadedModel(NamedTuple):
    """A classifier with its weights, and the settings of its training where they are known."""

    model: nn.Module
    name: str
    mean: Triple | None = None
    std: Triple | None = None
    image_size: int | None = None  # the side that it is built for; None: it takes any
    classes: tuple[int, ...] | None = None  # for each class of the data the model's own; None: the same


def build_teacher(
    spec: TeacherSpec,
    num_classes: int,
    image_size: int,
    mean: Triple,
    std: Triple,
    where: str,
    dtype: torch.dtype = torch.float32,
    class_names: Sequence[str] | None = None,
) -> Teacher:
    """A teacher as its recipe entry says, in inference form: frozen, batch norms folded, channels-last, in `dtype`.

    Args:
        num_classes, image_size, mean, std: the student's.
        where: the recipe's name of the entry, for messages, e.g. `distill.teachers.0`.
        class_names: the data's, which are matched with the teacher's.

    Raises:
        UserError: unknown name, weights that are missing or do not fit, a class that the teacher lacks, images of a
            size that the model cannot take.
    """
    data = DataClasses.named(num_classes, class_names)
    if not spec.weights:
        raise UserError(f"{where}.weights: is empty, but a teacher needs trained weights; give a file")
    path = Path(spec.weights)
    if spec.weights == "pretrained":
        found = from_hub(spec, data, image_size, where)
    elif path.is_dir():
        read = from_folder if (path / "config.json").is_file() else from_run
        found = read(path, spec, data, image_size, where)
        if spec.name and spec.name != found.name:
            raise UserError(f"{where}.name: {spec.name} but {path} is a {found.name}; leave the name out")
        if spec.options:
            raise UserError(f"{where}.options: have no effect, {path} brings its own; leave them out")
    else:
        found = load_file(path, spec, data, image_size, where)
    size = spec.image_size or found.image_size or image_size
    logits = smoke_test(found.model, size, where)
    if found.classes is None and logits != num_classes:
        raise UserError(wrong_classes(where, logits, num_classes))
    folded = fold_batch_norms(found.model, size)
    model = in_precision(found.model, dtype, size, where).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    own_mean, own_std = spec.mean or found.mean or mean, spec.std or found.std or std
    teacher = Teacher(model, own_mean, own_std, mean, std, spec.image_size or found.image_size, found.classes)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    text = "%s: %s (%s), %.1f M parameters, %d batch norms folded, %d px, %s"
    log.info(text, where, found.name, spec.weights, millions, folded, size, str(teacher.dtype).removeprefix("torch."))
    if found.classes is not None:
        log.info("%s: the data's %d classes are matched by name among the teacher's %d", where, num_classes, logits)
    return teacher


def smoke_test(model: nn.Module, image_size: int, where: str) -> int:
    """Number of logits, from a forward of a random image of this size. Raises UserError unless they are finite."""
    try:
        with torch.no_grad():
            logits = model.eval()(random_image(image_size))
    except Exception as error:  # each family has its own way of refusing an image
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{where}.image_size: the model cannot take {image_size} px ({reason}); set the size that it was trained at"
        ) from None
    if not logits.isfinite().all():
        raise UserError(f"{where}.weights: a random image gets logits that are not finite; the weights are damaged")
    return logits.shape[-1]


def in_precision(model: nn.Module, dtype: torch.dtype, image_size: int, where: str) -> nn.Module:
    """The model in `dtype` with its last layer in float32; unchanged where it cannot compute in `dtype`.

    In bfloat16 the two largest of many logits are often equal, and argmax would then choose the class with the smaller
    number. The last layer costs next to nothing.
    """
    if dtype == torch.float32:
        return model
    low = copy.deepcopy(model).to(dtype)
    for head in last_layers(low):
        head.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))
    try:
        with torch.no_grad():
            low(random_image(image_size).to(dtype))
    except RuntimeError as error:
        log.warning("%s: stays in float32, it cannot compute in %s (%s)", where, dtype, str(error).splitlines()[0])
        return model
    return low


# -- where teachers come from -----------------------------------------------------------------------------------------


def from_hub(spec: TeacherSpec, data: DataClasses, image_size: int, where: str) -> LoadedModel:
    """timm's pretrained weights. Raises UserError, with the file to fetch and its place, when a download fails."""
    name = spec.name
    if not name:
        raise UserError(f"{where}.name: is needed with weights: pretrained; name a timm model")
    config = timm_config(name)
    classes = select_classes(spec.classes, config.num_classes, config.label_names, data, f"{where} ({name})")
    fixed = spec.image_size or fixed_size(config, spec.options)
    model = create_pretrained(name, fixed or image_size, f"{where}.weights", **spec.options)
    return LoadedModel(model, name, config.mean, config.std, fixed, classes)


def from_folder(path: Path, spec: TeacherSpec, data: DataClasses, image_size: int, where: str) -> LoadedModel:
    """A folder as timm, the Hugging Face hub and `std-fast export` write it: config.json and the weights."""
    hub = read_hub_folder(path)
    files = [path / "model.safetensors", path / "pytorch_model.bin"]
    file = next((file for file in files if file.is_file()), files[0])
    fixed = hub.image_size if hub.fixed_size else None
    full = replace(spec, name=hub.architecture, options=hub.options, image_size=spec.image_size or fixed)
    found = load_file(file, full, data, image_size, where, hub.num_classes, hub.class_names)
    return found._replace(mean=hub.mean or found.mean, std=hub.std or found.std)


def from_run(path: Path, spec: TeacherSpec, data: DataClasses, image_size: int, where: str) -> LoadedModel:
    """The newest complete checkpoint of a plain run of this project."""
    recipe, state, count, names, _ = read_run(path)
    if recipe.distill.mode != "none":
        raise UserError(f"{where}.weights: {path} is a distilled student; a teacher is a plain run (distill: none)")
    classes = select_classes(spec.classes, count, names, data, f"{where} ({path})")
    state = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    size = recipe.data.image_size
    model = build_classifier(recipe.student.name, count, size, **recipe.student.options)
    load_weights(model, state, f"{where}.weights ({path})")
    return LoadedModel(model, recipe.student.name, recipe.augment.mean, recipe.augment.std, size, classes)


def load_file(
    file: Path,
    spec: TeacherSpec,
    data: DataClasses,
    image_size: int,
    where: str,
    count: int | None = None,
    names: Sequence[str] | None = None,
) -> LoadedModel:
    """The model `spec.name`, ours or timm's, with the weights of a file; of `count` classes if that is known,
    called `names`."""
    if not spec.name:
        raise UserError(f"{where}.name: is needed, because {spec.weights!r} is a file, which does not name its model")
    name, state = spec.name, read_weights(file)
    config = None if name in BACKBONES else timm_config(name)
    fixed = spec.image_size or (fixed_size(config, spec.options) if config else image_size)
    count = count or data.number
    model: Any = build_classifier(name, count, fixed or image_size, **spec.options)
    found = stored_classes(model, state, count) or count
    classes = select_classes(spec.classes, found, names, data, f"{where} ({file})")
    if found != count:
        model = build_classifier(name, found, fixed or image_size, **spec.options)
    try:
        load_weights(model, state, f"{where}.weights ({file})")
    except UserError:
        # Names of another release, or positions of another size: timm can convert those of many models. It may
        # interpolate positions only where the recipe sets a size.
        if config is None or (not spec.image_size and other_shapes(model, state)):
            raise
        model = converted(name, state, fixed or image_size, found, spec.options)
        if model is None:
            raise
    mean, std = (config.mean, config.std) if config else (None, None)
    return LoadedModel(model, name, mean, std, fixed, classes)


def converted(name: str, state: dict[str, Tensor], image_size: int, num_classes: int, options: dict) -> Any:
    """The model with weights that timm can convert; None where it cannot."""
    overlay = {"state_dict": state, "num_classes": num_classes}  # with the right number of classes timm loads strictly
    options = {**options, "num_classes": num_classes, "pretrained": True, "pretrained_cfg_overlay": overlay}
    try:
        model: Any = create_timm(name, image_size, **options)
    except Exception:  # its converters raise many kinds, all of which mean that the weights are of something else
        log.debug("timm cannot convert these weights to %s", name, exc_info=True)
        return None
    model.pretrained_cfg.pop("state_dict")  # timm would keep a copy of all weights there
    return model


def fixed_size(config: Any, options: dict) -> int | None:
    """The only side that a timm model takes, by its `PretrainedCfg` and its options; None when it takes any."""
    if "img_size" in options:
        size = options["img_size"]
        return int(size if isinstance(size, int) else size[-1])
    return int(config.input_size[-1]) if config.fixed_input_size else None


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """bfloat16 autocast, or nothing at float32."""
    if precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()
