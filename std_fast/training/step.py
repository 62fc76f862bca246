"""One training step: the only place where forward, loss, backward and optimizer meet.

Nothing in it makes the host wait for the device. Shapes: B batch, K classes, H heads, M teachers, L blocks.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.augment.device import TrainBatch
from std_fast.config.recipe import Distill
from std_fast.method.losses import TeacherTargets, class_loss, confidence_weights, distillation_loss
from std_fast.method.student import Student, StudentOutput, resize_images
from std_fast.models.common import DropPathMask
from std_fast.models.drop_path import residual_scales
from std_fast.runtime.distributed import SINGLE_PROCESS, World
from std_fast.runtime.metrics import Meters
from std_fast.runtime.speed import Stopwatch
from std_fast.training.guard import Buffers, Guard
from std_fast.training.micro_batch import MicroBatch, mine_over
from std_fast.training.optim import EMA, set_learning_rates
from std_fast.training.schedule import StepSettings


class Losses(NamedTuple):
    """float32 scalars."""

    total: Tensor
    classes: Tensor
    distilled: Tensor | None
    information: Tensor | None  # MINE's V in nats, summed over the modules


@dataclass(frozen=True)
class Objective:
    """`L = (1 - a) L_class + a L_dist - V`: METHOD.md sections 4 and 5 (mine.py reverses V's gradient)."""

    distill: Distill
    smoothing: float
    head_teacher: tuple[int, ...]

    def __call__(self, out: StudentOutput, batch: TrainBatch) -> Losses:
        classes = class_loss(out.class_logits, batch.labels_a, batch.labels_b, batch.lam, self.smoothing)
        if batch.targets is None or out.dist_logits is None:
            return Losses(classes, classes, None, None)
        d = self.distill
        temperature = d.temperature if d.labels == "soft" else None
        loss = functools.partial(distillation_loss, targets=batch.targets, reweight=d.reweight, temperature=temperature)
        distilled = loss(out.dist_logits, head_teacher=self.head_teacher, head_weights=self.head_weights)
        if d.class_share:  # the class head learns from every teacher
            every = out.class_logits[:, None].expand(-1, batch.targets.labels.shape[1], -1)
            distilled = (1 - d.class_share) * distilled + d.class_share * loss(every)
        total = (1 - d.alpha) * classes + d.alpha * distilled
        if not out.information:
            return Losses(total, classes, distilled, None)
        information = torch.stack(out.information).sum()
        return Losses(total - information, classes, distilled, information)

    @property
    def head_weights(self) -> tuple[float, ...] | None:
        """For each head the weight of its module; None where all weigh the same."""
        weights, assign = self.distill.module_weights, self.distill.assign
        if weights is None:
            return None
        equal = len(self.head_teacher) // len(weights)
        per_module = [len(group) for group in assign] if assign else [equal] * len(weights)
        return tuple(weight for weight, heads in zip(weights, per_module, strict=True) for _ in range(heads))


@dataclass
class Trainer:
    """What one step needs. `forward` is the student, or its compiled or distributed wrapper.

    A step is, for each micro-batch (by default there is one, the batch): forward, loss, backward; then clip, optimizer,
    EMA. Gradients and losses are the means over the micro-batches, and so those of the batch, but for what the help of
    `run.micro_batch` names.
    """

    student: Student
    forward: Callable[..., StudentOutput]
    objective: Callable[..., Losses]  # an Objective, or its compiled form
    optimizer: Any  # one of optim.py: it reads `found_inf`
    ema: EMA | None
    guard: Guard
    meters: Meters
    autocast: Callable[[], contextlib.AbstractContextManager]
    clip: float
    seed: int
    world: World = SINGLE_PROCESS
    drop_path: Callable[..., DropPathMask] = residual_scales  # or the function that `kept_rows` returns
    watch: Stopwatch = field(default_factory=lambda: Stopwatch(torch.device("cpu")))
    micro_batch: MicroBatch = field(default_factory=MicroBatch)

    def __post_init__(self) -> None:
        psi = self.student.training_only()
        named = [(name, p) for name, p in self.student.named_parameters() if p.requires_grad]
        self.student_parameters = [p for name, p in named if name not in psi]
        self.psi_parameters = [p for name, p in named if name in psi]
        self.buffers = Buffers(self.student)

    def step(self, batch: TrainBatch, now: StepSettings) -> None:
        """Trains on one batch. Its losses and norms are added to the meters, on the device."""
        set_learning_rates(self.optimizer, now.lr, now.psi_lr)
        self.buffers.save()
        with self.watch.part("student", now.step):
            losses = self.gradients(batch, now)

        with self.watch.part("optimizer", now.step):
            norm = gradient_norm(self.student_parameters)
            psi_norm = [gradient_norm(self.psi_parameters)] if losses.information is not None else []
            if self.clip:
                torch.nn.utils.clip_grads_with_norm_(self.student_parameters, self.clip, norm)
            self.guard.check(now.step, losses.total, norm, *psi_norm)
            self.optimizer.found_inf = self.guard.found_inf  # every optimizer reads it: 1 leaves everything as it is
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.buffers.restore(self.guard.found_inf)
            if self.ema is not None:
                self.ema.update(now.step, self.guard.found_inf)
        self.meters.add(step_metrics(losses, norm, batch.targets), self.guard.found_inf)

    def gradients(self, batch: TrainBatch, now: StepSettings) -> Losses:
        """Forward, loss and backward of the batch; of many processes the gradients are then their mean."""
        if not self.micro_batch.auto:
            return self.forward_backward(batch, now)
        kind = (now.with_mine, now.image_size)
        trial = self.micro_batch.is_trial(kind)
        run = functools.partial(self.forward_backward, batch, now, send=not trial)
        losses = self.micro_batch.fit(run, self.forget_gradients, kind, len(batch.positions))
        if trial:
            self.world.average([p.grad for p in self.student.parameters() if p.grad is not None])
        return losses

    def forward_backward(self, batch: TrainBatch, now: StepSettings, send: bool = True) -> Losses:
        """Adds up the gradients of the micro-batches, each divided by their number.

        Args:
            send: DDP averages them over the ranks, with the last micro-batch.
        """
        micro_batches = self.micro_batch.split(batch)
        last, every = len(micro_batches) - 1, []
        # for models that draw from torch's generator, as timm's do
        torch.manual_seed((self.seed * 1_000_003 + now.step + (self.world.rank << 40)) % 2**63)
        with self.full_batch_mine(micro_batches, now, send):
            for i, micro in enumerate(micro_batches):
                with nullcontext() if send and i == last else self.no_sync():
                    images = resize_images(micro.images, now.image_size)
                    with self.autocast():
                        out = self.forward(images, self.stochastic_depth(micro), now.with_mine)
                        losses = self.objective(out, micro)
                    self.backward(losses, len(micro_batches))
                every.append(losses)
        return mean_losses(every)

    def backward(self, losses: Losses, micro_batches: int = 1) -> None:
        """Gradients of all parameters; psi gets none in a step without MINE."""
        pauses = self.world.size > 1 and bool(self.psi_parameters) and losses.information is None
        total = losses.total
        if pauses:  # DDP waits in each step for a gradient of every parameter: 0 for psi's
            total = total + 0.0 * sum(parameter.sum() for parameter in self.psi_parameters)
        (total if micro_batches == 1 else total / micro_batches).backward()
        if pauses:  # as with one process, where the optimizer skips psi
            for parameter in self.psi_parameters:
                parameter.grad = None

    def no_sync(self) -> contextlib.AbstractContextManager:
        """Inside, gradients add up on this rank and are not sent."""
        return self.forward.no_sync() if isinstance(self.forward, DistributedDataParallel) else nullcontext()

    def full_batch_mine(
        self, micro_batches: list[TrainBatch], now: StepSettings, send: bool
    ) -> contextlib.AbstractContextManager:
        """Inside, MINE sees the complete batch; where that is one micro-batch, it does so by itself."""
        if not (now.with_mine and self.student.mine) or (len(micro_batches) == 1 and send):
            return nullcontext()

        def terms(micro: TrainBatch) -> Tensor:
            images = resize_images(micro.images, now.image_size)
            with self.autocast():
                return self.student.mine_terms(images, self.stochastic_depth(micro))

        return mine_over(micro_batches, self.student, terms, self.world)

    def forget_gradients(self) -> None:
        """Undoes what `forward_backward` did before it was broken off."""
        self.optimizer.zero_grad(set_to_none=True)
        self.buffers.restore(torch.ones_like(self.guard.found_inf))

    def stochastic_depth(self, batch: TrainBatch) -> DropPathMask:
        """Residual scales [2 L, B], 0 or 1 / (1 - rate), or kept rows: a pure function of seed, epoch and position.

        A timm model draws from torch's generator instead, which each step seeds anew.
        """
        if not any(getattr(self.student.backbone, "drop_rates", ())):
            return None
        # a fill kernel, not a copy from the host: nothing waits, and a compiled `drop_path` sees no new constant
        epoch = torch.full((), batch.epoch, dtype=torch.int64, device=batch.positions.device)
        return self.drop_path(self.student.backbone._drop_rates, self.seed, epoch, batch.positions)


def mean_losses(every: list[Losses]) -> Losses:
    """The means over micro-batches of the same size."""
    if len(every) == 1:
        return every[0]
    means = {
        name: torch.stack([getattr(losses, name) for losses in every]).detach().mean(0)
        for name, value in every[0]._asdict().items()
        if value is not None
    }
    return every[0]._replace(**means)


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together, a scalar on the device."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


@torch.no_grad()
def step_metrics(losses: Losses, norm: Tensor, targets: TeacherTargets | None) -> dict[str, Tensor]:
    """Scalars on the device for the log."""
    values = {"loss": losses.total, "loss_class": losses.classes, "grad_norm": norm}
    if losses.distilled is not None and targets is not None:
        values["loss_distill"] = losses.distilled
        if targets.confidence is not None:
            for i, weight in enumerate(confidence_weights(targets.confidence).mean(0)):
                values[f"teacher_weight_{i}"] = weight
    if losses.information is not None:
        values["information"] = losses.information
        values["loss"] = losses.total + losses.information  # the student's objective without the reversed term
    return values
