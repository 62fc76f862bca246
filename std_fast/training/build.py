"""From a recipe to the objects that a run needs."""

from __future__ import annotations

import functools
import gc
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import pipelines
from pipelines.augment.device import Augment
from pipelines.augment.preview import contact_sheet
from pipelines.errors import UserError
from pipelines.read.batch import Loader, LoaderSpec
from std_fast.config.files import filled_in
from std_fast.config.recipe import Recipe, TeacherSpec
from std_fast.method.mine import MutualInformation
from std_fast.method.student import ModulePlan, Student, plan_modules
from std_fast.runtime.compiling import backend_of, compiled, keep_cache, options
from std_fast.runtime.distributed import SINGLE_PROCESS, World, replicate
from std_fast.runtime.flops import count_macs
from std_fast.runtime.metrics import Meters
from std_fast.runtime.speed import SpeedMeter, Stopwatch, ceiling
from std_fast.teachers.overlap import Overlap
from std_fast.teachers.target_cache import TargetCache, epochs_needed, open_target_cache
from std_fast.teachers.teacher import (
    Teachers,
    autocast,
    build_classifier,
    build_teacher,
)
from std_fast.training.initial_weights import load_initial_weights
from std_fast.training.optim import EMA, build_optimizer
from std_fast.training.step import GROUP, Guard, Objective, Trainer, kept_rows, residual_scales

log = logging.getLogger("std_fast")


@dataclass
class Parts:
    """All that the loop drives."""

    recipe: Recipe
    device: torch.device
    train_loader: Loader
    val_loader: Loader | None
    augment: Augment
    teachers: Teachers | None  # also None where all their targets are stored
    target_cache: TargetCache | None
    trainer: Trainer
    overlap: Overlap
    speed: SpeedMeter
    backend: str | None  # of torch.compile

    def close(self) -> None:
        for part in (self.train_loader, self.val_loader, self.target_cache):
            if part is not None:
                part.close()


def uses_gpu(recipe: Recipe) -> bool:
    """Whether the recipe runs on a GPU here. UserError when it asks for one that is not there."""
    wanted = recipe.run.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device: cuda, but torch sees no GPU; set it to auto or cpu, or look at `std-fast doctor`")
    return wanted != "cpu" and torch.cuda.is_available()


def pick_device(recipe: Recipe) -> torch.device:
    """The recipe's device: the CPU, or this process's GPU. UserError as `uses_gpu`."""
    return torch.device("cuda", torch.cuda.current_device()) if uses_gpu(recipe) else torch.device("cpu")


def precision_of(recipe: Recipe, device: torch.device) -> str:
    """`bfloat16` or `float32`."""
    chosen = recipe.run.precision
    return ("bfloat16" if device.type == "cuda" else "float32") if chosen == "auto" else chosen


def open_train_loader(
    recipe: Recipe, device: torch.device, world: World = SINGLE_PROCESS, drop_last: bool = True
) -> Loader:
    """Shuffled, endlessly many epochs; with `drop_last` whole batches only."""
    if not recipe.data.train:
        raise UserError("data.train: is empty; give a .beton or an image folder, e.g. --data.train imagenet.beton")
    spec = LoaderSpec(
        path=recipe.data.train,
        global_batch=recipe.run.batch,
        shuffle=True,
        drop_last=drop_last,
        shard=world.shard,
        seed=recipe.run.seed,
        device=str(device),
        **recipe.data.shared(),
    )
    return pipelines.open_loader(spec, recipe.data.backend)


def open_val_loader(
    recipe: Recipe, device: torch.device, path: str = "", world: World = SINGLE_PROCESS
) -> Loader | None:
    """Every image of `path`, by default `data.val`, once and in order; None when there is none."""
    path = path or recipe.data.val
    if not path:
        return None
    spec = LoaderSpec(
        path=path,
        global_batch=recipe.run.eval_batch or recipe.run.batch,
        shuffle=False,
        drop_last=False,
        shard=world.shard,
        seed=recipe.run.seed,
        device=str(device),
        **recipe.data.shared(crop=recipe.data.eval_crop, resample=recipe.data.eval_resample),
    )
    return pipelines.open_loader(spec, recipe.data.backend)


def build_student(recipe: Recipe, num_classes: int) -> Student:
    """The student of a recipe, on the CPU, with weights that only the seed decides.

    Raises:
        UserError: an unknown name, options or taps that do not fit, weights that do not fit.
    """
    d, s = recipe.distill, recipe.student
    torch.manual_seed(recipe.run.seed if recipe.run.init_seed is None else recipe.run.init_seed)
    options = dict(s.options)
    if d.tokens == "deit" and d.mode == "std":
        options["distill_token"] = True
    backbone = build_classifier(s.name, num_classes, recipe.data.image_size, s.drop_path, **options)
    modules: tuple[ModulePlan, ...] = ()
    if d.mode == "std":
        if not hasattr(backbone, "forward_taps"):
            raise UserError(
                f"student.name: {s.name} is timm's own and has no STD form; take one of this project's students"
            )
        modules = plan_modules(backbone, len(d.teachers), d.taps, d.assign)
    mine = d.mine
    if d.module_weights is not None and len(d.module_weights) != len(modules):
        raise UserError(f"distill.module_weights: has {len(d.module_weights)} entries for {len(modules)} modules")
    weight = mine.weight if d.uses_mine else 0.0
    student = Student(
        backbone, num_classes, modules, d.tokens, weight, mine.width, mine.ema, d.predict, d.token_mlp_ratio
    )
    if s.weights:
        load_initial_weights(student, s)
    return student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it


def build_teachers(
    recipe: Recipe, num_classes: int, device: torch.device, class_names: list[str] | None = None
) -> Teachers | None:
    """The frozen teachers on the device; None for a plain run."""
    d = recipe.distill
    if d.mode == "none":
        return None
    size, mean, std = recipe.data.image_size, recipe.augment.mean, recipe.augment.std
    teachers = [
        build_teacher(
            spec,
            num_classes,
            size,
            mean,
            std,
            f"distill.teachers.{i}",
            teacher_dtype(spec, recipe, device),
            class_names,
        )
        for i, spec in enumerate(d.teachers)
    ]
    return Teachers(teachers, d.temperature if d.labels == "soft" else None, d.top_k).to(device)


def teacher_dtype(spec: TeacherSpec, recipe: Recipe, device: torch.device) -> torch.dtype:
    """Type of a teacher's weights, from its own precision or the run's."""
    chosen = precision_of(recipe, device) if spec.precision == "auto" else spec.precision
    return torch.bfloat16 if chosen == "bfloat16" else torch.float32


def build_missing_teachers(
    recipe: Recipe, loader: Loader, target_cache: TargetCache | None, device: torch.device
) -> Teachers | None:
    """The teachers, unless there are none or all that the run can ask them is stored.

    Raises:
        UserError: they are needed and cannot be built.
    """
    if target_cache is None:
        return build_teachers(recipe, loader.num_classes, device, loader.source.class_names)
    epochs = epochs_needed(recipe, loader.steps_per_epoch)
    missing = None if epochs is None else target_cache.missing(epochs)
    if missing == []:
        log.info("%s holds all target_cache: no teacher is needed", target_cache.folder)
        return None
    try:
        return build_teachers(recipe, loader.num_classes, device, loader.source.class_names)
    except UserError as error:
        lacks = f"lacks {len(missing)} of {epochs} epochs" if missing else "may hold too few epochs for run.length"
        raise UserError(f"{error} (needed because distill.target_cache {lacks})") from None


def make_fast(recipe: Recipe, device: torch.device, augment: Augment, teachers: Teachers | None) -> str | None:
    """Compiles augmentation and teachers in place, as the recipe says; returns the compiler's backend, None for off.

    Raises:
        UserError: the compiler lacks what it needs.
    """
    backend = backend_of(recipe, device)
    if backend is not None:
        if options(backend)["backend"] == "inductor":
            keep_cache()
        augment.compile(**options(backend))
        if teachers is not None:
            teachers.compile(**options(backend))
    return backend


def build(recipe: Recipe, world: World = SINGLE_PROCESS) -> Parts:
    """Everything that a run of `recipe` needs. UserError for whatever the user can mend, before anything is trained."""
    # An earlier run of this process is let go first: its parts refer to each other, and full collections are rare.
    gc.collect()
    device = pick_device(recipe)
    precision = precision_of(recipe, device)
    if recipe.run.batch % (4 * world.size):  # MINE's partners lie in groups of four
        raise UserError(
            f"run.batch: {recipe.run.batch} over {world.size} processes must be a multiple of {4 * world.size}"
        )
    train_loader = open_train_loader(recipe, device, world)
    val_loader = target_cache = None
    try:
        val_loader = open_val_loader(recipe, device, world=world)
        classes = train_loader.num_classes
        check_same_classes(train_loader, val_loader)
        student = build_student(recipe, classes).to(device)
        check_options(recipe, student, world)
        subset = recipe.student.drop_path_mode == "subset"
        depth = kept_rows(student.backbone.drop_rates) if subset else residual_scales
        student.train()
        for mine in student.mine.children():
            assert isinstance(mine, MutualInformation)
            mine.gather = world.gather if world.size > 1 else None
        target_cache = open_target_cache(
            recipe, train_loader, precision, train_loader.steps_per_epoch * recipe.run.batch, world
        )
        teachers = build_missing_teachers(recipe, train_loader, target_cache, device)
        whole = not (subset or recipe.student.early_size)  # else an image's arithmetic is not always the same: no MFU
        flops = flops_per_image(student, teachers, recipe.data.image_size) if whole else None
        augment = Augment(recipe.augment, recipe.run.seed).to(device)
        backend = make_fast(recipe, device, augment, teachers)
        objective = Objective(recipe.distill, recipe.optim.smoothing, student.head_teacher)
        watch = Stopwatch(device)
        decay = recipe.optim.ema ** (recipe.run.batch / recipe.optim.ema_batch) if recipe.optim.ema else 0.0
        trainer = Trainer(
            student=student,
            forward=replicate(compiled(student, backend), world, device),
            objective=compiled(objective.__call__, backend),
            optimizer=build_optimizer(student, recipe, device),
            average=EMA(student, decay) if decay else None,
            guard=Guard(device, world),
            meters=Meters(world),
            autocast=functools.partial(autocast, device, precision),
            clip=recipe.optim.clip if recipe.optim.name != "lamb" else 0.0,  # LAMB clips by itself
            seed=recipe.run.seed,
            world=world,
            depth=compiled(depth, backend),
            watch=watch,
        )
        overlap = Overlap(recipe.run.overlap, device, watch)
        limit = ceiling(device, precision)
        speed = SpeedMeter(device, watch, flops, limit * world.size)
    except BaseException:
        for part in (train_loader, val_loader, target_cache):
            if part is not None:
                part.close()
        raise
    text = "device %s, precision %s, compile %s, measured ceiling %.2f TFLOP/s"
    log.info(text, device, precision, backend or "off", limit / 1e12)
    return Parts(
        recipe, device, train_loader, val_loader, augment, teachers, target_cache, trainer, overlap, speed, backend
    )


def flops_per_image(student: nn.Module, teachers: Teachers | None, image_size: int) -> float | None:
    """Operations in matrix products and convolutions for one training image.

    Three forwards of the student (its backward pass counts as two) and one of each teacher, without MINE. None, said
    in the log, for a model whose arithmetic cannot be counted without running it.
    """
    try:
        total = 6.0 * count_macs(student, image_size)
        for teacher in teachers.teachers if teachers is not None else ():
            total += 2.0 * count_macs(teacher.model, teacher.image_size or image_size)  # type: ignore[arg-type]
        return total
    except Exception as error:  # each family of models has its own way of refusing tensors without data
        log.warning("no MFU in the log: the model's arithmetic cannot be counted (%r)", error)
        return None


def check_options(recipe: Recipe, student: Student, world: World) -> None:
    """UserError for an option that this student or this number of processes cannot have."""
    s = recipe.student
    if s.drop_path_mode == "subset":
        if not hasattr(student.backbone, "drop_rates"):
            raise UserError(f"student.drop_path_mode: {s.name} is timm's own, which knows only scale; leave it out")
        if recipe.run.batch % (GROUP * world.size):
            raise UserError(
                f"student.drop_path_mode: subset needs a run.batch that is a multiple of {GROUP * world.size}, "
                f"{GROUP} for each process; it is {recipe.run.batch}"
            )
    if s.early_size:
        if not getattr(student.backbone, "any_size", False):
            raise UserError(
                f"student.early_size: {s.name} takes images of one size only; leave it out, or use a CycleMLP"
            )
        if s.early_size >= recipe.data.image_size:
            raise UserError(
                f"student.early_size: {s.early_size} is not smaller than data.image_size {recipe.data.image_size}"
            )


def preview(recipe: Recipe, out: Path, epoch: int = 0, images: int = 64) -> None:
    """Draws the first images of an epoch, augmented as the student will see them, as a PNG.

    Raises:
        UserError: data that cannot be read, fewer than four images, or a PNG that cannot be written.
    """
    images = images // 4 * 4
    if images < 4:
        raise UserError("--images: must be 4 or more")
    device = pick_device(recipe)
    with open_train_loader(replace(recipe, run=replace(recipe.run, batch=images)), device) as loader:
        mixed = Augment(recipe.augment, recipe.run.seed).to(device)(next(iter(loader.epoch(epoch))))
        contact_sheet(mixed, out, spec=recipe.augment, class_names=loader.source.class_names)


def check_same_classes(train: Loader, val: Loader | None) -> None:
    """UserError when training and validation data name different classes."""
    if val is None:
        return
    ours, theirs = train.source.class_names, val.source.class_names
    if ours is not None and theirs is not None and list(ours) != list(theirs):
        odd = sorted(set(ours) ^ set(theirs))
        what = f"e.g. {odd[0]!r} is only in one of them" if odd else "the same names in another order"
        raise UserError(
            f"data.val: its classes are not those of data.train ({what}); convert both from the same classes"
        )
    if val.num_classes > train.num_classes:
        raise UserError(
            f"data.val: has {val.num_classes} classes, data.train {train.num_classes}; use data of the same classes"
        )


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with the run's folder filled in."""
    out = filled_in(recipe.run.out, recipe.name, recipe.run.seed)
    return replace(recipe, run=replace(recipe.run, out=str(out)))
