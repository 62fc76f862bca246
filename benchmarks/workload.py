"""What the benchmarks of the step are run on: the project's own parts, built as `std-fast train` builds them.

The images are synthetic and the weights random, which no time depends on. Shapes: B batch, K classes, M teachers.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import fake_gpu
from benchmarks.harness import best, progress
from pipelines.augment.device import TrainBatch
from pipelines.errors import UserError
from pipelines.read.batch import Batch, Loader
from std_fast.config import recipe as recipes
from std_fast.config.recipe import Distill, Duration, Recipe, StudentSpec, TeacherSpec
from std_fast.method.losses import TeacherTargets, targets_from_logits
from std_fast.teachers.classifiers import create_timm
from std_fast.teachers.overlap import Overlap
from std_fast.teachers.stream import BatchStream, TargetSource
from std_fast.training.build import Parts, build
from std_fast.training.micro_batch import rows as first_rows
from std_fast.training.schedule import StepSettings
from std_fast.training.step import Objective

TINY = {"patch_size": 8, "dim": 16, "depth": 3, "token_dim": 8, "channel_dim": 32}
TINY_TEACHER = "test_resnet"  # timm's, 0.5 M parameters: where targets are given, any teacher will do
PRETRAINED = ("resnet50", "resnet101")
DIM_HELP = "with --model mixer: channels of a Mixer with Mixer-S16's proportions"
SOURCES = 16  # different images on disk; the others are links to them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, sizes and precision. By default the batch is 1024 on a GPU and 8 on a CPU."""
    parser.add_argument("--model", default="mixer_s16", help="a student of this project [mixer_s16]")
    parser.add_argument("--dim", type=int, default=0, help=DIM_HELP)
    parser.add_argument("--batch", type=int, default=0, help="images per step [1024 on a GPU, 8 on a CPU]")
    parser.add_argument("--image-size", type=int, default=224, help="[224]")
    parser.add_argument("--classes", type=int, default=1000, help="[1000]")
    parser.add_argument("--precision", default="auto", help="as run.precision [auto]")
    parser.add_argument("--compile", default="auto", help="as run.compile [auto: on a GPU]")


def add_teachers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teachers", nargs="+", default=list(PRETRAINED), help=f"timm names [{' '.join(PRETRAINED)}]")


def settle(args: argparse.Namespace) -> None:
    """Fills in what depends on the device, and the tiny sizes of --smoke. UserError: `--dim` of another model."""
    if getattr(args, "dim", 0) and args.model != "mixer":
        raise UserError(f"--dim: {args.model} has channels of its own; use it with --model mixer")
    if args.smoke:
        args.model, args.batch, args.image_size, args.classes = "mixer", 8, 32, 8
    args.batch = args.batch or (1024 if args.device == "cuda" else 8)


def settle_recipe(args: argparse.Namespace) -> None:
    """With --recipe: fills in its sizes and teachers (`runs/NAME` is what the built-in recipe NAME trains)."""
    if not args.recipe:
        return
    recipe = recipes.load(args.recipe)
    models = [recipes.load(Path(spec.weights).name).student for spec in recipe.distill.teachers]
    args.image_size, args.batch = recipe.data.image_size, args.batch or recipe.run.batch
    args.teachers = [student.name for student in models]
    args.teacher_options = {student.name: student.options for student in models}


def options_of_mixer(args: argparse.Namespace) -> dict[str, Any]:
    """Sizes of the model "mixer": tiny, or with `--dim` those of the study's students; none of other models."""
    if args.model != "mixer":
        return {}
    if not (dim := getattr(args, "dim", 0)):
        return TINY
    return {"patch_size": 16, "dim": dim, "depth": 8, "token_dim": dim // 2, "channel_dim": 4 * dim}


def variant(args: argparse.Namespace) -> str | None:
    """Stands in the file's name where the model is not the usual one."""
    if getattr(args, "recipe", ""):
        return args.recipe
    if dim := getattr(args, "dim", 0):
        return f"{args.model}-c{dim}"
    return None if args.model == "mixer_s16" else args.model


def recipe_for(args: argparse.Namespace, folder: Path, teachers: tuple[str, ...], **distill: Any) -> Recipe:
    """The published recipe of `args.model` with three things replaced: synthetic data, teachers of random
    weights, and MINE in each step, so that it is measured too.

    Args:
        folder: where data, weights and the run go.
        teachers: names; none gives the plain backbone with the same settings.
        distill: fields of the recipe's section, replaced.
    """
    base = "mixer_s16_std" if args.model == "mixer" else f"{args.model}_std"
    recipe = recipes.load(getattr(args, "recipe", "") or base)
    data = replace(
        recipe.data, train=str(folder / "images"), val="", image_size=args.image_size, backend="torch", threads=1
    )
    run = replace(
        recipe.run,
        out=str(folder / "run"),
        batch=args.batch,
        device=args.device,
        precision=args.precision,
        compile=args.compile,
        length="1000 steps",
    )
    run = recipes.from_dict(type(run), vars(run))  # so that words from the command line are validated
    student = recipe.student
    if args.model == "mixer":
        student = StudentSpec("mixer", options_of_mixer(args), recipe.student.drop_path)
    if teachers:
        options = getattr(args, "teacher_options", {})
        specs = tuple(
            TeacherSpec(name, str(folder / f"{name}.safetensors"), options.get(name, {})) for name in teachers
        )
        mine = replace(recipe.distill.mine, every="1 step")
        section = replace(replace(recipe.distill, teachers=specs, mine=mine), **distill)
    else:
        section = Distill(mode="none")
    return replace(recipe, data=data, run=run, student=student, distill=section)


@contextlib.contextmanager
def workplace(args: argparse.Namespace, teachers: tuple[str, ...], images: int = 0) -> Iterator[Path]:
    """A temporary folder with `images/CLASS/*.jpg` (by default two batches) and the weights of the teachers."""
    with tempfile.TemporaryDirectory(prefix="std-fast-bench-") as name:
        folder = Path(name)
        write_images(
            folder / "images", args.classes, images or max(2 * args.batch, args.classes), 4 * args.image_size // 3
        )
        for teacher in dict.fromkeys(teachers):
            options = getattr(args, "teacher_options", {}).get(teacher, {})
            write_teacher(folder / f"{teacher}.safetensors", teacher, args.classes, args.image_size, options)
        yield folder


def write_images(folder: Path, classes: int, count: int, side: int) -> None:
    """CLASS/NUMBER.jpg of about the bytes a pixel of photographs (0.2 to 0.3 at quality 90): clouds with a grain."""
    from PIL import Image

    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(min(SOURCES, count)):
        height, width = side, side + int(random.integers(0, side // 2 + 1))
        clouds = random.integers(0, 256, (8, 8, 3)).astype(np.uint8)
        smooth = np.asarray(Image.fromarray(clouds).resize((width, height), Image.Resampling.BICUBIC), np.float32)
        grain = random.normal(0, 6, (height, width, 1))
        pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)
    for number in range(count):
        place = folder / f"{number % classes:04d}"
        place.mkdir(exist_ok=True)
        os.link(folder / f"{number % SOURCES}.jpg", place / f"{number}.jpg")
    for file in folder.glob("*.jpg"):
        file.unlink()


def write_teacher(path: Path, name: str, classes: int, side: int, options: dict[str, Any]) -> None:
    """Random weights of a timm model. Raises UserError for a name that timm does not have."""
    from safetensors.torch import save_file

    try:
        save_file(create_timm(name, side, num_classes=classes, **options).state_dict(), str(path))
    except UserError as error:
        raise UserError(f"--teachers: {error}") from None


@contextlib.contextmanager
def built(recipe: Recipe) -> Iterator[Parts]:
    """`build(recipe)`, closed at the end."""
    progress(f"building {recipe.student.name}, {recipe.distill.mode}")
    parts = build(recipe)
    try:
        yield parts
    finally:
        parts.close()


def raw_batch(parts: Parts, seed: int = 0) -> Batch:
    """A uint8 batch of noise on the device, as a loader gives it."""
    B, side, device = parts.recipe.run.batch, parts.recipe.data.image_size, parts.device
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (B, side, side, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
    labels = torch.randint(0, parts.train_loader.num_classes, (B,), generator=generator)
    positions = torch.arange(B)
    return Batch(images.to(device), labels.to(device), positions.to(device), np.arange(B), epoch=0, step=0)


class SameBatch:
    """A loader that gives the same batch for ever."""

    steps_per_epoch = 1 << 40

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Batch]:
        while True:
            yield self.batch


def same_batch_stream(parts: Parts, source: TargetSource, overlap: Overlap | None = None) -> BatchStream:
    """A stream that prepares the same raw batch for ever, from the device's memory."""
    return BatchStream(cast(Loader, SameBatch(raw_batch(parts))), parts.augment, source, overlap)


def given_batch(parts: Parts, seed: int = 0) -> TrainBatch:
    """A batch that is ready for the step; its targets, if the run has teachers, are those of random logits."""
    with torch.no_grad():
        return replace(parts.augment(raw_batch(parts, seed)), targets=given_targets(parts, seed))


def given_targets(parts: Parts, seed: int = 0) -> TeacherTargets | None:
    """Targets from random logits of M teachers, on the device; None for a plain run."""
    teachers = len(parts.recipe.distill.teachers)
    if not teachers:
        return None
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(parts.recipe.run.batch, teachers, parts.train_loader.num_classes, generator=generator)
    return TeacherTargets._make(x if x is None else x.to(parts.device) for x in targets_from_logits(logits))


class Stepper:
    """`Trainer.step` on a batch, counted; `check` verifies that what was timed was training.

    MINE is part of it where the recipe has it in each step (`recipe_for` does), and not where it comes once an epoch.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts, self.count = parts, 0
        distill = parts.recipe.distill
        self.with_mine = distill.uses_mine and Duration.parse(distill.mine.every) == Duration(1, "steps")

    def __call__(self, batch: TrainBatch, **changes: Any) -> None:
        """`changes` to the settings of the step: `with_mine`, `image_size`."""
        self.count += 1
        now = StepSettings(self.count, lr=1e-4, psi_lr=1e-4, with_mine=self.with_mine)
        self.parts.trainer.step(batch, replace(now, **changes))

    def check(self) -> None:
        """RuntimeError when a loss or gradient was not finite: the optimizer then did nothing."""
        if (bad := self.parts.trainer.guard.read()[0]) and fake_gpu.computes():
            raise RuntimeError(f"step {bad[0]} was not finite: these times are not of training")


def step_flops(parts: Parts, batch: TrainBatch, with_mine: bool = True) -> int:
    """Floating-point operations of one training step for one image: matrix products and convolutions, forward and
    backward, counted by their shapes while the plain student runs on four images."""
    rows = 4
    trainer, recipe = parts.trainer, parts.recipe
    objective = Objective(recipe.distill, recipe.optim.smoothing, trainer.student.head_teacher)
    few = first_rows(batch, 0, rows)
    with FlopCounterMode(display=False) as counter:
        with trainer.autocast():
            losses = objective(trainer.student(few.images, None, with_mine and recipe.distill.uses_mine), few)
        losses.total.backward()
    trainer.optimizer.zero_grad(set_to_none=True)
    return counter.get_total_flops() // rows


def matmul_ceiling(device: str, dtype: torch.dtype, size: int = 0) -> float:
    """FLOP/s of the best of some square matrix products: measured, not the data sheet's."""
    size = size or (8192 if device == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / best(lambda: torch.mm(a, b), device, calls=10 if device == "cuda" else 2)


def copy_ceiling(device: str, size: int = 0) -> float:
    """Bytes/s, read and written together, of the best of some copies of a buffer beyond the caches."""
    source = torch.randn((size or (1 << 31 if device == "cuda" else 1 << 28)) // 4, device=device)
    target = torch.empty_like(source)
    return 8 * len(source) / best(lambda: target.copy_(source), device)


def compute_dtype(parts: Parts) -> torch.dtype:
    """In which the matrix products run."""
    with parts.trainer.autocast():
        device = parts.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
