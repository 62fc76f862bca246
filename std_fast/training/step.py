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
from pipelines.augment.device import TrainBatch
from std_fast.config.recipe import Distill
from std_fast.method.losses import TeacherTargets, class_loss, confidence_weights, distillation_loss
from std_fast.method.student import Student, StudentOutput
from std_fast.models.common import DropPathMask
from std_fast.runtime.checkpoint import restore, training_tensors
from std_fast.runtime.distributed import SINGLE_PROCESS, World
from std_fast.runtime.metrics import Meters
from std_fast.runtime.speed import Stopwatch
from std_fast.training.optim import EMA, set_learning_rates


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

    def __call__(self, out: StudentOutput, mixed: TrainBatch, targets: TeacherTargets | None) -> Losses:
        classes = class_loss(out.class_logits, mixed.labels_a, mixed.labels_b, mixed.lam, self.smoothing)
        if targets is None or out.dist_logits is None:
            return Losses(classes, classes, None, None)
        d = self.distill
        distilled = self.distilled(out.dist_logits, mixed, targets, self.head_teacher, self.head_weights)
        if d.class_share:  # the class head learns from every teacher
            every = out.class_logits[:, None].expand(-1, targets.labels.shape[1], -1)
            distilled = (1 - d.class_share) * distilled + d.class_share * self.distilled(every, mixed, targets)
        total = (1 - d.alpha) * classes + d.alpha * distilled
        if not out.information:
            return Losses(total, classes, distilled, None)
        information = torch.stack(out.information).sum()
        return Losses(total - information, classes, distilled, information)

    def distilled(
        self,
        logits_BHK: Tensor,
        mixed: TrainBatch,
        targets: TeacherTargets,
        head_teacher: tuple[int, ...] | None = None,
        head_weights: tuple[float, ...] | None = None,
    ) -> Tensor:
        """`distillation_loss` as the recipe says."""
        d = self.distill
        temperature = d.temperature if d.labels == "soft" else None
        labels_B = torch.where(mixed.lam >= 0.5, mixed.labels_a, mixed.labels_b)
        return distillation_loss(
            logits_BHK, targets, head_teacher, d.reweight, temperature, d.loss, labels_B, head_weights
        )

    @property
    def head_weights(self) -> tuple[float, ...] | None:
        """Of each head that of its module."""
        weights, assign = self.distill.module_weights, self.distill.assign
        if weights is None:
            return None
        per_module = (
            [len(group) for group in assign] if assign else [len(self.head_teacher) // len(weights)] * len(weights)
        )
        return tuple(weight for weight, heads in zip(weights, per_module, strict=True) for _ in range(heads))


class Guard:
    """Notices steps whose loss or gradient is not finite, on the device, and lets them change nothing.

    In such a step `found_inf` is 1: weights, optimizer, moving average and saved buffers stay as they were. Once more
    than `allowed` of them have been met, `found_inf` stays 1 (the guard is frozen): the state is then that before the
    last of `steps` until the host looks (when a line is logged) and does what the recipe says. All ranks notice the
    same steps.

    Args:
        capacity: how many steps are kept in mind, one at least.
        allowed: how many are passed over before all is frozen; 0: none.
    """

    def __init__(
        self, device: torch.device, world: World = SINGLE_PROCESS, capacity: int = 1, allowed: int = 0
    ) -> None:
        self.world = world
        self.found_inf = torch.zeros((), device=device)
        self.bad_values = torch.zeros((), dtype=torch.int64, device=device)
        self.set([], capacity, allowed)

    def set(self, steps: Sequence[int], capacity: int, allowed: int) -> None:
        """Goes on behind these bad steps, fewer than `capacity`."""
        device = self.found_inf.device
        padded = [*steps, *[-1] * (capacity - len(steps))]
        self.steps = torch.tensor(padded, dtype=torch.int64, device=device)
        self.allowed = torch.full((), allowed, dtype=torch.int64, device=device)
        self._places = torch.arange(capacity, device=device)

    @torch.no_grad()
    def check(self, step: int, *values: Tensor) -> None:
        """`found_inf` for this step; `bad_values` has bit i set where the i-th of `values` was the last bad one's."""
        bad_V = self.world.sum((~torch.stack([value.detach().isfinite() for value in values])).long()) > 0
        count = (self.steps >= 0).sum()
        frozen = count > self.allowed
        new = bad_V.any() & ~frozen
        self.steps.copy_(torch.where(new & (self._places == count), step, self.steps))
        bits = (bad_V << torch.arange(len(bad_V), device=bad_V.device)).sum()
        self.bad_values.copy_(torch.where(new, bits, self.bad_values))
        self.found_inf.copy_(new | frozen)

    @property
    def first_bad(self) -> Tensor:
        """The first bad step, -1 while there is none: on the device."""
        return self.steps[0]

    def read(self) -> tuple[list[int], bool]:
        """The bad steps so far, oldest first; whether all is frozen since the last of them. Waits for the device."""
        *steps, allowed = torch.cat([self.steps, self.allowed[None]]).tolist()
        steps = [step for step in steps if step >= 0]
        return steps, len(steps) > allowed


class Buffers:
    """The buffers of a module that are saved (batch norms' statistics, MINE's average): a forward pass may change them,
    and where its step turns out not to be finite they must be as before."""

    def __init__(self, module: nn.Module) -> None:
        saved = module.state_dict(keep_vars=True)
        self.live = [buffer for name, buffer in module.named_buffers() if name in saved]
        self.before = [buffer.clone() for buffer in self.live]

    @torch.no_grad()
    def keep(self) -> None:
        if self.live:
            torch._foreach_copy_(self.before, self.live)

    @torch.no_grad()
    def put_back(self, found_inf: Tensor) -> None:
        """As they were at the last `keep`, if `found_inf` is 1."""
        if self.live:
            pairs = zip(self.before, self.live, strict=True)
            torch._foreach_copy_(self.live, [torch.where(found_inf > 0, old, new) for old, new in pairs])


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
    average: EMA | None
    guard: Guard
    meters: Meters
    autocast: Callable[[], contextlib.AbstractContextManager]
    clip: float
    seed: int
    world: World = SINGLE_PROCESS
    depth: Callable[..., DropPathMask] = residual_scales  # or what `kept_rows` gives
    watch: Stopwatch = field(default_factory=lambda: Stopwatch(torch.device("cpu")))

    snapshot: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        psi = self.student.training_only()
        named = [(name, p) for name, p in self.student.named_parameters() if p.requires_grad]
        self.student_parameters = [p for name, p in named if name not in psi]
        self.psi_parameters = [p for name, p in named if name in psi]
        self.buffers = Buffers(self.student)

    def step(
        self, mixed: TrainBatch, targets: TeacherTargets | None, step: int, lr: float, psi_lr: float, with_mine: bool
    ) -> None:
        """Learns from one batch; `step` counts from 1 over the whole training. Figures go to the meters."""
        set_learning_rates(self.optimizer, lr, psi_lr)
        began = self.watch.now()
        self.buffers.keep()
        with self.autocast():
            out = self.forward(mixed.images, self.stochastic_depth(mixed, step), with_mine)
            losses = self.objective(out, mixed, targets)
        pauses = self.world.size > 1 and bool(self.psi_parameters) and losses.information is None
        total = losses.total + no_gradient(self.psi_parameters) if pauses else losses.total
        total.backward()
        if pauses:  # as on one process, where the optimizer passes over psi
            for parameter in self.psi_parameters:
                parameter.grad = None

        backward_end = self.watch.now()
        norm = gradient_norm(self.student_parameters)
        psi_norm = [gradient_norm(self.psi_parameters)] if losses.information is not None else []
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(self.student_parameters, self.clip, norm)
        self.guard.check(step, losses.total, norm, *psi_norm)
        self.optimizer.found_inf = self.guard.found_inf  # read by every optimizer: 1 leaves everything as it is
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.buffers.put_back(self.guard.found_inf)
        if self.average is not None:
            self.average.update(step, self.guard.found_inf)
        self.watch.note(student=(began, backward_end), optimizer=(backward_end, self.watch.now()))
        self.meters.add(figures(losses, norm, targets), self.guard.found_inf)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: weights, optimizer, moving average, and what was put aside to go back to."""
        average = self.average.state() if self.average is not None else {}
        tensors = training_tensors(self.student, self.optimizer, average)
        return tensors | {f"snapshot.{name}": tensor for name, tensor in self.snapshot.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`, from any device."""
        device = self.guard.found_inf.device
        self.snapshot = {
            n.removeprefix("snapshot."): t.to(device) for n, t in tensors.items() if n.startswith("snapshot.")
        }
        self._put_in_place({name: tensor for name, tensor in tensors.items() if not name.startswith("snapshot.")})

    def take_snapshot(self) -> None:
        """Keeps a copy of the present state on the device, for `rollback`."""
        self.snapshot = {}
        self.snapshot = {name: tensor.detach().clone() for name, tensor in self.state().items()}

    def rollback(self) -> None:
        """To the state that was put aside."""
        self._put_in_place(self.snapshot)

    def _put_in_place(self, tensors: dict[str, Tensor]) -> None:
        average = restore(tensors, self.student, self.optimizer)
        if self.average is not None:
            self.average.load(average)

    def stochastic_depth(self, mixed: TrainBatch, step: int) -> DropPathMask:
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
def figures(losses: Losses, norm: Tensor, targets: TeacherTargets | None) -> dict[str, Tensor]:
    """Scalars on the device for the log."""
    values = {"loss": losses.total, "loss_class": losses.classes, "grad_norm": norm}
    if losses.distilled is not None and targets is not None:
        values["loss_distill"] = losses.distilled
        for i, weight in enumerate(confidence_weights(targets.confidence).mean(0)):
            values[f"teacher_weight_{i}"] = weight
    if losses.information is not None:
        values["information"] = losses.information
        values["loss"] = losses.total + losses.information  # the student's objective without the opposed term
    return values
