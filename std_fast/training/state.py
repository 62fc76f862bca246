"""The state of a training: what a checkpoint holds, and the snapshot on the device that a rollback returns to."""

from __future__ import annotations

import torch
from torch import Tensor

from std_fast.method.student import Student
from std_fast.runtime.checkpoint import restore, training_tensors
from std_fast.training.optim import EMA


class TrainState:
    """Weights, optimizer state and moving average by name, with the snapshot under `snapshot.`."""

    def __init__(self, student: Student, optimizer: torch.optim.Optimizer, ema: EMA | None) -> None:
        self.student, self.optimizer, self.ema = student, optimizer, ema
        self.snapshot: dict[str, Tensor] = {}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors themselves, not copies."""
        return self._present() | {f"snapshot.{name}": tensor for name, tensor in self.snapshot.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`, from any device."""
        device = next(self.student.parameters()).device
        stored = {name: tensor for name, tensor in tensors.items() if name.startswith("snapshot.")}
        self.snapshot = {name.removeprefix("snapshot."): tensor.to(device) for name, tensor in stored.items()}
        self._restore({name: tensor for name, tensor in tensors.items() if name not in stored})

    def take_snapshot(self) -> None:
        """Copies the present state on the device, for `rollback`."""
        self.snapshot = {}  # frees the old copy before the new one is made
        self.snapshot = {name: tensor.detach().clone() for name, tensor in self._present().items()}

    def rollback(self) -> None:
        self._restore(self.snapshot)

    def _present(self) -> dict[str, Tensor]:
        return training_tensors(self.student, self.optimizer, self.ema.state() if self.ema is not None else {})

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        averages = restore(tensors, self.student, self.optimizer)
        if self.ema is not None:
            self.ema.load(averages)
