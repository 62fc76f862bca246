"""One training step: the only place where forward, loss, backward and optimizer meet.

Nothing in it makes the host wait for the device. Shapes: B batch, K classes, H heads, M teachers, L blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipelines import rng
from pipelines.augment import Mixed
from std_fast.distributed import ALONE, World
from std_fast.losses import TeacherAnswers, class_loss, confidence_weights, distillation_loss
from std_fast.metrics import Meters
from std_fast.models.common import Keep
from std_fast.optim import MovingAverage, set_learning_rates
from std_fast.recipe import Distill
from std_fast.speed import Stopwatch
from std_fast.student import Student, StudentOutput


class Losses(NamedTuple):
    """float32 scalars."""

    total: Tensor
    classes: Tensor
    distilled: Tensor | None
    information: Tensor | None  # MINE's V in nats, summed over the modules


@dataclass(frozen=True)
class Objective:
    """`L = (1 - a) L_class + a L_dist - V`: METHOD.md sections 4 and 5 (mine.py opposes V's sign for the student)."""

    distill: Distill
    smoothing: float
    head_teacher: tuple[int, ...]

    def __call__(self, out: StudentOutput, mixed: Mixed, answers: TeacherAnswers | None) -> Losses:
        classes = class_loss(out.class_logits, mixed.labels_a, mixed.labels_b, mixed.lam, self.smoothing)
        if answers is None or out.dist_logits is None:
            return Losses(classes, classes, None, None)
        d = self.distill
        temperature = d.temperature if d.labels == "soft" else None
        distilled = distillation_loss(out.dist_logits, answers, self.head_teacher, d.reweight, temperature)
        total = (1 - d.alpha) * classes + d.alpha * distilled
        if not out.information:
            return Losses(total, classes, distilled, None)
        information = torch.stack(out.information).sum()
        return Losses(total - information, classes, distilled, information)


class Guard:
    """Notices the first step whose loss or gradient is not finite, on the device.

    From that step on `found_inf` is 1 and the optimizer changes nothing, so that the weights stay those before
    the bad step until the host reads `first_bad` (when a line is logged) and stops. All ranks notice the same step.
    """

    def __init__(self, device: torch.device, world: World = ALONE) -> None:
        self.world = world
        self.found_inf = torch.zeros((), device=device)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def check(self, step: int, *values: Tensor) -> None:
        bad = self.world.sum((~torch.stack([value.detach().isfinite() for value in values])).sum())
        self.first_bad.masked_fill_((bad > 0) & (self.first_bad < 0), step)
        self.found_inf.copy_(self.first_bad >= 0)


def residual_scales(rates_L1: Tensor, seed: int, epoch: Tensor, positions: Tensor) -> Tensor:
    """Stochastic depth: 0 with probability `rate`, else 1 / (1 - rate), per residual branch and sample: `[2 L, B]`."""
    keep_L1 = 1 - rates_L1
    return (branch_draws(len(rates_L1), seed, epoch, positions) < keep_L1) / keep_L1


def branch_draws(branches: int, seed: int, epoch: Tensor, positions: Tensor) -> Tensor:
    """A uniform number in [0, 1) for each residual branch and sample: `[2 L, B]`."""
    draws = range((branches + 3) // 4)
    draws_BU = [rng.uniform(seed, epoch, positions, int(rng.Purpose.DROP_PATH), draw) for draw in draws]
    return torch.cat(draws_BU, dim=1).T[:branches]


GROUP = 32  # images among which `kept_rows` draws


def kept_rows(drop_rates: Sequence[float]) -> Callable[..., list[Tensor | None]]:
    """Stochastic depth that skips work, to stand where `residual_scales` does: for each residual branch the rows of the
    batch that it is computed for, ascending, and None where that is all.

    Of each GROUP consecutive images the same number is left out, the rate to the nearest of 1 / GROUP: every step has
    the same shapes, and any number of processes whose shares are whole groups draws alike.
    """
    left_out = [min(GROUP - 1, round(GROUP * rate)) for rate in drop_rates]

    def rows(rates_L1: Tensor, seed: int, epoch: Tensor, positions: Tensor) -> list[Tensor | None]:
        u_LB = branch_draws(len(rates_L1), seed, epoch, positions)
        order_LNG = u_LB.unflatten(1, (-1, GROUP)).argsort(dim=-1, stable=True)
        first_N1 = torch.arange(0, len(positions), GROUP, device=positions.device)[:, None]
        kept = [
            order_NG[:, out:].sort(dim=-1).values + first_N1 for order_NG, out in zip(order_LNG, left_out, strict=True)
        ]
        return [rows_NR.flatten() if out else None for rows_NR, out in zip(kept, left_out, strict=True)]

    return rows


@dataclass
class Trainer:
    """What one step needs. `forward` is the student, or its compiled or distributed wrapper."""

    student: Student
    forward: Callable[..., StudentOutput]
    objective: Callable[..., Losses]  # an Objective, or its compiled form
    optimizer: Any  # one of optim.py: it reads `found_inf`
    average: MovingAverage | None
    guard: Guard
    meters: Meters
    autocast: Callable[[], contextlib.AbstractContextManager]
    clip: float
    seed: int
    world: World = ALONE
    depth: Callable[..., Keep] = residual_scales  # or what `kept_rows` gives
    watch: Stopwatch = field(default_factory=lambda: Stopwatch(torch.device("cpu")))

    def __post_init__(self) -> None:
        psi = self.student.training_only()
        named = [(name, p) for name, p in self.student.named_parameters() if p.requires_grad]
        self.student_parameters = [p for name, p in named if name not in psi]
        self.psi_parameters = [p for name, p in named if name in psi]

    def step(
        self, mixed: Mixed, answers: TeacherAnswers | None, step: int, lr: float, psi_lr: float, with_mine: bool
    ) -> None:
        """Learns from one batch; `step` counts from 1 over the whole training. Figures go to the meters."""
        set_learning_rates(self.optimizer, lr, psi_lr)
        began = self.watch.now()
        with self.autocast():
            out = self.forward(mixed.images, self.stochastic_depth(mixed, step), with_mine)
            losses = self.objective(out, mixed, answers)
        pauses = self.world.size > 1 and bool(self.psi_parameters) and losses.information is None
        total = losses.total + no_gradient(self.psi_parameters) if pauses else losses.total
        total.backward()
        if pauses:  # as on one process, where the optimizer passes over psi
            for parameter in self.psi_parameters:
                parameter.grad = None

        learned = self.watch.now()
        norm = gradient_norm(self.student_parameters)
        psi_norm = gradient_norm(self.psi_parameters) if losses.information is not None else norm
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(self.student_parameters, self.clip, norm)
        self.guard.check(step, losses.total, norm, psi_norm)
        self.optimizer.found_inf = self.guard.found_inf  # read by every optimizer: 1 leaves everything as it is
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(step)
        self.watch.note(student=(began, learned), optimizer=(learned, self.watch.now()))
        self.meters.add(figures(losses, norm, answers))

    def stochastic_depth(self, mixed: Mixed, step: int) -> Keep:
        """Residual scales [2 L, B], 0 or 1 / (1 - rate), or kept rows: a pure function of seed, epoch and position.

        A timm model draws from torch's generator instead, which is seeded by the step.
        """
        torch.manual_seed((self.seed * 1_000_003 + step + (self.world.rank << 40)) % 2**63)
        if not any(getattr(self.student.backbone, "drop_rates", ())):
            return None
        # a fill kernel, not a copy from the host: nothing waits, and a compiled `depth` sees no new constant
        epoch = torch.full((), mixed.epoch, dtype=torch.int64, device=mixed.positions.device)
        return self.depth(self.student.backbone._drop_rates, self.seed, epoch, mixed.positions)


def no_gradient(parameters: list[nn.Parameter]) -> Tensor | float:
    """0, whose gradient is 0 for every parameter: DDP waits in each step for a gradient of all of them."""
    return 0.0 * sum(parameter.sum() for parameter in parameters)


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together, a scalar on the device."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


@torch.no_grad()
def figures(losses: Losses, norm: Tensor, answers: TeacherAnswers | None) -> dict[str, Tensor]:
    """Scalars on the device for the log."""
    values = {"loss": losses.total, "loss_class": losses.classes, "grad_norm": norm}
    if losses.distilled is not None and answers is not None:
        values["loss_distill"] = losses.distilled
        for i, weight in enumerate(confidence_weights(answers.confidence).mean(0)):
            values[f"teacher_weight_{i}"] = weight
    if losses.information is not None:
        values["information"] = losses.information
        values["loss"] = losses.total + losses.information  # the student's objective without the opposed term
    return values
