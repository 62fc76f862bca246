"""Parameter groups, the fused optimizer, and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from std_fast.config.recipe import Optim
from std_fast.method.student import Student
from std_fast.teachers.classifiers import head_names
from std_fast.training.optimizers import SGD, Muon, build_apex


def parameter_groups(student: Student, weight_decay: float, matrices_apart: bool = False) -> list[dict]:
    """Groups, each with `name`: "decay", "no_decay" and "psi" (the statistics networks, never decayed).

    Never decayed are tensors of one dimension (biases, norms, affine scales) and what `student.no_weight_decay()`
    names: the tokens (METHOD.md section 8).

    Args:
        matrices_apart: the matrices inside backbone and STD modules have a group "matrices" of their own: linear layers
            and 1x1 convolutions, but no token, patch embedding or head.
    """
    spared = student.no_weight_decay()
    psi = student.training_only()
    outputs = set(head_names(student))

    def kind(name: str, p: nn.Parameter) -> str:
        if name in psi:
            return "psi"
        if p.ndim <= 1 or name in spared:
            return "no_decay"
        is_matrix = p.ndim == 2 or (p.ndim == 4 and p.shape[2:] == (1, 1))
        inside = name.startswith(("backbone.", "std.")) and name not in outputs
        return "matrices" if matrices_apart and is_matrix and inside else "decay"

    groups: dict[str, list] = {"decay": [], "no_decay": [], "psi": [], "matrices": []}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            groups[kind(name, parameter)].append(parameter)
    decay = {"decay": weight_decay, "no_decay": 0.0, "psi": 0.0, "matrices": weight_decay}
    return [{"name": name, "params": params, "weight_decay": decay[name]} for name, params in groups.items() if params]


def build_optimizer(student: Student, o: Optim, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of a recipe's section `optim`. Each group's learning rate is a tensor, so that a schedule never
    recompiles anything.

    Each reads `found_inf` (a float tensor, 1.0 to change nothing in this step): see step.py.

    Raises:
        UserError: one of apex's without a GPU or without apex.
    """
    groups = parameter_groups(student, o.weight_decay, matrices_apart=o.name == "muon")
    if o.name in ("lamb", "apex_adam"):
        return build_apex(o.name, groups, o.betas, o.eps, o.clip)
    if o.name == "sgd":
        return SGD(groups, device, o.momentum, o.nesterov)
    for group in groups:
        group["lr"] = torch.zeros((), device=device)
        if group["name"] == "matrices":
            group |= {"muon": True, "momentum": o.momentum}
    kind = Muon if o.name == "muon" else torch.optim.AdamW
    return kind(groups, lr=0.0, betas=o.betas, eps=o.eps, fused=True)


def set_learning_rates(optimizer: torch.optim.Optimizer, lr: float, psi_lr: float) -> None:
    """Fills the groups' learning rate tensors; no host synchronisation."""
    for group in optimizer.param_groups:
        group["lr"].fill_(psi_lr if group["name"] == "psi" else lr)


def peak_learning_rate(o: Optim, batch: int) -> float:
    """The peak of the learning rate, scaled linearly with the batch (Goyal et al. 2017) unless `lr_batch` is 0."""
    return o.lr * batch / o.lr_batch if o.lr_batch else o.lr


class EMA:
    """Exponential moving average of a student's weights (parameters and floating buffers that are saved), in float32.

    What only training needs, the statistics networks of MINE, is left out.

    Early on the decay is `(1 + t) / (10 + t)` where that is smaller, so that the average forgets the initial weights
    (the schedule of TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, student: Student, decay: float) -> None:
        self.decay = decay
        self.names, self.live = [], []
        left_out = student.training_only()
        for name, tensor in student.state_dict(keep_vars=True).items():
            if tensor.is_floating_point() and name not in left_out:
                self.names.append(name)
                self.live.append(tensor)
        self.average = [tensor.detach().clone().float() for tensor in self.live]

    @torch.no_grad()
    def update(self, step: int, found_inf: Tensor) -> None:
        """After optimizer step number `step`, counting from 1; nothing where `found_inf` is 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        away = torch._foreach_sub([tensor.detach() for tensor in self.live], self.average)
        torch._foreach_mul_(away, (1 - decay) * (1 - found_inf))
        torch._foreach_add_(self.average, away)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the student holds the average; its own weights come back afterwards, in the same memory."""
        kept = [tensor.detach().clone() for tensor in self.live]
        try:
            self._write(self.average)
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, source: list[Tensor]) -> None:
        for tensor, value in zip(self.live, source, strict=True):
            tensor.copy_(value)

    def state(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.average, strict=True))

    def load(self, state: dict[str, Tensor]) -> None:
        for name, tensor in zip(self.names, self.average, strict=True):
            tensor.copy_(state[name])
