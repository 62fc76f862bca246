"""From a recipe to the objects that a run needs."""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

import pipelines
from pipelines.augment.device import Augment
from pipelines.errors import UserError, quantity
from pipelines.read.batch import Loader, LoaderSpec
from pipelines.read.remote import is_url
from pipelines.read.source import open_source
from std_fast.config.files import filled_in
from std_fast.config.recipe import Duration, Recipe, TeacherSpec
from std_fast.method.student import ModulePlan, Student, plan_modules
from std_fast.models.drop_path import GROUP, kept_rows, residual_scales
from std_fast.runtime.budget import Ledger
from std_fast.runtime.compiling import backend_of, compiled, keep_cache, options
from std_fast.runtime.distributed import SINGLE_PROCESS, World, replicate
from std_fast.runtime.flops import count_macs
from std_fast.runtime.metrics import Meters
from std_fast.runtime.speed import SpeedMeter, Stopwatch, peak
from std_fast.teachers.classes import DataClasses, relabel
from std_fast.teachers.classifiers import NotDownloaded, file_to_fetch
from std_fast.teachers.fingerprint import fingerprint
from std_fast.teachers.overlap import Overlap
from std_fast.teachers.stream import BatchStream, target_source
from std_fast.teachers.target_cache import TargetCache, epochs_needed, open_target_cache
from std_fast.teachers.teacher import Teachers, autocast, build_classifier, build_teacher
from std_fast.training.guard import Guard
from std_fast.training.host_memory import check_host_memory
from std_fast.training.initial_weights import load_initial_weights
from std_fast.training.micro_batch import MicroBatch, micro_batch_of
from std_fast.training.optim import EMA, build_optimizer
from std_fast.training.state import TrainState
from std_fast.training.step import Objective, Trainer

log = logging.getLogger("std_fast")


@dataclass
class Parts:
    """Everything that the loop drives."""

    recipe: Recipe
    device: torch.device
    train_loader: Loader
    val_loader: Loader | None
    augment: Augment
    teachers: Teachers | None  # also None where all their targets are stored
    target_cache: TargetCache | None
    stream: BatchStream
    trainer: Trainer
    state: TrainState
    speed: SpeedMeter
    backend: str | None  # of torch.compile
    closing: ExitStack = field(repr=False)

    def close(self) -> None:
        self.closing.close()


def uses_gpu(wanted: str) -> bool:
    """Whether `run.device` means a GPU here. UserError when it asks for one that is not there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device: cuda, but torch sees no GPU; set it to auto or cpu, or look at `std-fast doctor`")
    return wanted != "cpu" and torch.cuda.is_available()


def pick_device(wanted: str) -> torch.device:
    """What `run.device` means: the CPU, or this process's GPU. UserError as `uses_gpu`."""
    return torch.device("cuda", torch.cuda.current_device()) if uses_gpu(wanted) else torch.device("cpu")


def precision_of(chosen: str, device: torch.device) -> str:
    """What `run.precision` means on a device: `bfloat16` or `float32`."""
    return ("bfloat16" if device.type == "cuda" else "float32") if chosen == "auto" else chosen


def open_train_loader(
    recipe: Recipe, device: torch.device, world: World = SINGLE_PROCESS, drop_last: bool = True
) -> Loader:
    """Shuffled, endlessly many epochs; with `drop_last` full batches only."""
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
    recipe: Recipe,
    device: torch.device,
    path: str = "",
    world: World = SINGLE_PROCESS,
    classes: DataClasses | None = None,
    who: str = "the run",
) -> Loader | None:
    """Every image of `path`, by default `data.val`, once and in order; None when there is none.

    Args:
        classes: the model's, whose labels the images get; None: they keep those of the data.
        who: whose classes these are, for messages.

    Raises:
        UserError: data that cannot be read, or of other classes.
    """
    where = path or f"data.val ({recipe.data.val})"
    path = path or recipe.data.val
    if not path:
        return None
    source = open_source(path, recipe.data.one_part)
    if classes is not None:
        relabel(source, classes, where, who)
    return pipelines.open_loader(val_spec(recipe, path, str(device), world), recipe.data.backend, source)


def val_spec(recipe: Recipe, path: str, device: str, world: World = SINGLE_PROCESS) -> LoaderSpec:
    """Every image of `path` once and in order, prepared as for evaluation."""
    return LoaderSpec(
        path=path,
        global_batch=recipe.run.eval_batch or recipe.run.batch,
        shuffle=False,
        drop_last=False,
        shard=world.shard,
        seed=recipe.run.seed,
        device=device,
        **recipe.data.shared(crop=recipe.data.eval_crop, resample=recipe.data.eval_resample),
    )


def build_student(recipe: Recipe, num_classes: int, class_names: Sequence[str] | None = None) -> Student:
    """The student of a recipe, on the CPU, with weights that only the seed decides.

    Args:
        class_names: the data's, which are matched with those of `student.weights`.

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
        modules = plan_modules(backbone, d.num_teachers, d.taps, d.assign)
    mine = d.mine
    if d.module_weights is not None and len(d.module_weights) != len(modules):
        raise UserError(f"distill.module_weights: has {len(d.module_weights)} entries for {len(modules)} modules")
    weight = mine.weight if d.uses_mine else 0.0
    student = Student(
        backbone, num_classes, modules, d.tokens, weight, mine.width, mine.ema, d.predict, d.token_mlp_ratio
    )
    if s.weights:
        load_initial_weights(student, s, class_names)
    return student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it


def build_teachers(
    recipe: Recipe, num_classes: int, device: torch.device, class_names: list[str] | None = None
) -> Teachers | None:
    """The frozen teachers on the device; None where there are none."""
    d = recipe.distill
    if not d.teachers:
        return None
    images = recipe.data.image_size, recipe.augment.mean, recipe.augment.std
    teachers = []
    for i, spec in enumerate(d.teachers):
        dtype = teacher_dtype(spec, recipe.run.precision, device)
        try:
            teachers.append(build_teacher(spec, num_classes, *images, f"distill.teachers.{i}", dtype, class_names))
        except NotDownloaded as error:  # those of the others too, so that one walk to the network is enough
            rest = [(j, t.name) for j, t in enumerate(d.teachers) if j > i and t.weights == "pretrained"]
            more = [file_to_fetch(name, f"distill.teachers.{j}.weights") for j, name in rest]
            raise UserError("; and fetch ".join([str(error), *more])) from None
    return Teachers(teachers, d.temperature if d.labels == "soft" else None, d.top_k).to(device)


def teacher_dtype(spec: TeacherSpec, run_precision: str, device: torch.device) -> torch.dtype:
    """Type of a teacher's weights, from its own precision or `run.precision`."""
    chosen = precision_of(run_precision, device) if spec.precision == "auto" else spec.precision
    return torch.bfloat16 if chosen == "bfloat16" else torch.float32


def needed_teachers(
    recipe: Recipe, loader: Loader, device: torch.device, target_cache: TargetCache | None
) -> Teachers | None:
    """`build_teachers`, but None where the cache holds the targets of all epochs of the run."""
    what = recipe, loader.num_classes, device, loader.source.class_names
    if target_cache is None:
        return build_teachers(*what)
    length, batch = Duration.parse(recipe.run.length), recipe.run.batch
    epochs = epochs_needed(length, loader.steps_per_epoch, batch, recipe.distill.views)
    missing = None if epochs is None else target_cache.missing(epochs)
    if missing == []:
        log.info("%s holds the targets of all epochs: no teacher is needed", target_cache.folder)
        return None
    try:
        return build_teachers(*what)
    except UserError as error:
        lacks = "may hold too few epochs for run.length"
        if missing and epochs:
            lacks = f"lacks {len(missing)} of {quantity(epochs, 'epoch')}"
        raise UserError(f"{error} (needed because distill.target_cache {lacks})") from None


def make_fast(wanted: str, device: torch.device, augment: Augment, teachers: Teachers | None) -> str | None:
    """Compiles augmentation and teachers in place as `run.compile` says; returns torch.compile's backend, None for off.

    Raises:
        UserError: the compiler lacks what it needs.
    """
    backend = backend_of(wanted, device)
    if backend is not None:
        if options(backend)["backend"] == "inductor":
            keep_cache()
        augment.compile(**options(backend))
        if teachers is not None:
            teachers.compile(**options(backend))
    return backend


def build(
    recipe: Recipe,
    world: World = SINGLE_PROCESS,
    ledger: Ledger | None = None,
    check_data: Callable[[Loader], None] = lambda loader: None,
) -> Parts:
    """Everything that a run of `recipe` needs. UserError for whatever the user can fix, before anything is trained.

    Args:
        check_data: called with the training data, before anything else is opened.
    """
    gc.collect()  # the parts of an earlier run of this process form cycles, and full collections are rare
    r, device, ledger = recipe, pick_device(recipe.run.device), ledger or Ledger()
    precision = precision_of(r.run.precision, device)
    if r.run.batch % (4 * world.size):  # MINE's partners lie in groups of four
        raise UserError(f"run.batch: {r.run.batch} over {world.size} processes must be a multiple of {4 * world.size}")
    with ExitStack() as closing:
        train_loader = closing.enter_context(open_train_loader(r, device, world))
        check_data(train_loader)
        source = train_loader.source
        classes = DataClasses.named(source.num_classes, source.class_names)
        val_loader = open_val_loader(r, device, world=world, classes=classes, who="data.train")
        if val_loader is not None:
            closing.callback(val_loader.close)
        student = build_student(r, source.num_classes, source.class_names).to(device)
        check_options(r, student, world)
        micro_batch = micro_batch_of(r, world)
        target_cache = None
        if r.distill.target_cache:
            about, rows = fingerprint(r, train_loader, precision), train_loader.steps_per_epoch * r.run.batch
            target_cache = open_target_cache(r.distill, about, rows, r.run.batch, world)
            closing.callback(target_cache.close)
        teachers = needed_teachers(r, train_loader, device, target_cache)
        watch, limit = Stopwatch(device, ledger), peak(device, precision)
        varies = r.student.early_size or r.student.drop_path_mode == "subset"  # a step's arithmetic: there is no MFU
        flops = None if varies else flops_per_image(student, teachers, r.data.image_size)  # before compilation
        augment = Augment(r.augment, r.run.seed).to(device)
        backend = make_fast(r.run.compile, device, augment, teachers)
        trainer = build_trainer(r, student, device, precision, backend, watch, micro_batch, world)
        targets = target_source(r.distill, teachers, target_cache, trainer.autocast)
        overlap = Overlap(r.run.overlap, device)
        stream = BatchStream(train_loader, augment, targets, overlap, r.distill.views, watch, ledger)
        closing.callback(stream.close)
        mfu = f", MFU of {limit / 1e12:.0f} TFLOP/s" if limit and flops else ""
        log.info("device %s, precision %s, compile %s%s", device, precision, backend or "off", mfu)
        return Parts(
            recipe=r,
            device=device,
            train_loader=train_loader,
            val_loader=val_loader,
            augment=augment,
            teachers=teachers,
            target_cache=target_cache,
            stream=stream,
            trainer=trainer,
            state=TrainState(student, trainer.optimizer, trainer.ema),
            speed=SpeedMeter(device, watch, flops, limit and limit * world.size),
            backend=backend,
            closing=closing.pop_all(),
        )


def build_trainer(
    recipe: Recipe,
    student: Student,
    device: torch.device,
    precision: str,
    backend: str | None,
    watch: Stopwatch,
    micro_batch: MicroBatch,
    world: World = SINGLE_PROCESS,
) -> Trainer:
    """The step of a recipe around a student on its device: compiled, then replicated over the processes."""
    o, run = recipe.optim, recipe.run
    if device.type == "cpu":
        check_host_memory(recipe, student, micro_batch, precision)
    student.train()
    for mine in student.statistics():
        mine.gather = world.gather if world.size > 1 else None
    subset = recipe.student.drop_path_mode == "subset"
    forward = compiled(student, backend, **getattr(student.backbone, "inductor_settings", {}))
    return Trainer(
        student=student,
        forward=replicate(forward, world, device, accumulates=bool(run.micro_batch)),
        objective=compiled(Objective(recipe.distill, o.smoothing, student.head_teacher).__call__, backend),
        optimizer=build_optimizer(student, o, device),
        ema=EMA(student, o.ema ** (run.batch / o.ema_batch)) if o.ema else None,
        guard=Guard(device, world),
        meters=Meters(world),
        autocast=functools.partial(autocast, device, precision),
        clip=o.clip if o.name != "lamb" else 0.0,  # LAMB clips by itself
        seed=run.seed,
        world=world,
        drop_path=compiled(kept_rows(student.backbone.drop_rates) if subset else residual_scales, backend),
        watch=watch,
        micro_batch=micro_batch,
    )


def flops_per_image(student: nn.Module, teachers: Teachers | None, image_size: int) -> float | None:
    """Operations in matrix products and convolutions for one training image.

    Three forwards of the student (its backward pass counts as two) and one of each teacher, without MINE. None, with a
    line in the log, for a model whose arithmetic cannot be counted without running it.
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
            raise UserError(f"student.drop_path_mode: {s.name} is timm's own, which has only scale; leave it out")
        if recipe.run.batch % (GROUP * world.size):
            raise UserError(
                f"student.drop_path_mode: subset needs a run.batch that is a multiple of {GROUP * world.size}, "
                f"{GROUP} for each process; it is {recipe.run.batch}"
            )
    if s.early_size:
        timms = getattr(student.backbone, "pretrained_cfg", {"fixed_input_size": True})
        if not getattr(student.backbone, "any_size", not timms.get("fixed_input_size")):
            raise UserError(
                f"student.early_size: {s.name} takes images of one size only; leave it out, or use a CycleMLP or one "
                "of timm's convolutional networks"
            )
        if s.early_size >= recipe.data.image_size:
            raise UserError(
                f"student.early_size: {s.early_size} is not smaller than data.image_size {recipe.data.image_size}"
            )


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with the run's folder filled in. UserError where it would be one of the images' class folders."""
    out = filled_in(recipe.run.out, recipe.name, recipe.run.seed)
    for name in ("train", "val"):
        data = getattr(recipe.data, name)
        images = Path(data).resolve() if data and not is_url(data) else None
        if images is not None and images.is_dir() and Path(out).resolve().is_relative_to(images):
            raise UserError(f"run.out: {out} lies within the images of data.{name} ({data}); name a folder elsewhere")
    return replace(recipe, run=replace(recipe.run, out=str(out)))
