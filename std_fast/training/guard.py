"""Detects on the device that a step is not finite, and lets such a step change nothing: no host synchronisation.

Shapes: V checked values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from std_fast.runtime.distributed import SINGLE_PROCESS, World


class Guard:
    """Detects steps whose loss or gradient is not finite, on the device; such a step changes nothing.

    `found_inf` is 1 in such a step: weights, optimizer, moving average and saved buffers stay as they were. After more
    than `allowed` bad steps `found_inf` stays 1 (the guard is frozen): the state remains that before the last of
    `steps` until the host reads the guard (not_finite.py). All ranks detect the same steps.
    """

    def __init__(self, device: torch.device, world: World = SINGLE_PROCESS) -> None:
        self.world = world
        self.found_inf = torch.zeros((), device=device)
        self.bad_values = torch.zeros((), dtype=torch.int64, device=device)
        self.set([], 1, 0)

    def set(self, steps: Sequence[int], capacity: int, allowed: int) -> None:
        """Starts from these earlier bad steps.

        Args:
            capacity: how many bad steps are recorded, one more than `steps` at least.
            allowed: how many bad steps are skipped before the guard freezes; 0: none.
        """
        device = self.found_inf.device
        padded = [*steps, *[-1] * (capacity - len(steps))]
        self.steps = torch.tensor(padded, dtype=torch.int64, device=device)
        self.allowed = torch.full((), allowed, dtype=torch.int64, device=device)
        self._places = torch.arange(capacity, device=device)

    @torch.no_grad()
    def check(self, step: int, *values: Tensor) -> None:
        """Sets `found_inf` for this step, and in `bad_values` bit i where the i-th of `values` is not finite."""
        bad_V = self.world.sum((~torch.stack([value.detach() for value in values]).isfinite()).long()) > 0
        count = (self.steps >= 0).sum()
        frozen = count > self.allowed
        new = bad_V.any() & ~frozen
        self.steps.copy_(torch.where(new & (self._places == count), step, self.steps))
        bits = (bad_V << torch.arange(len(bad_V), device=bad_V.device)).sum()
        self.bad_values.copy_(torch.where(new, bits, self.bad_values))
        self.found_inf.copy_(new | frozen)

    def read(self) -> tuple[list[int], bool]:
        """The bad steps so far, oldest first, and whether the guard is frozen. Waits for the device."""
        *steps, allowed = torch.cat([self.steps, self.allowed[None]]).tolist()
        steps = [step for step in steps if step >= 0]
        return steps, len(steps) > allowed


class Buffers:
    """Copies of a module's saved buffers (batch norms' statistics, MINE's average), to undo what the forward pass of a
    step that is not finite has changed in them."""

    def __init__(self, module: nn.Module) -> None:
        saved = module.state_dict(keep_vars=True)
        self.live = [buffer for name, buffer in module.named_buffers() if name in saved]
        self.before = [buffer.clone() for buffer in self.live]

    @torch.no_grad()
    def save(self) -> None:
        if self.live:
            torch._foreach_copy_(self.before, self.live)

    @torch.no_grad()
    def restore(self, found_inf: Tensor) -> None:
        """Puts the copies of the last `save` back if `found_inf` is 1."""
        if self.live:
            pairs = zip(self.before, self.live, strict=True)
            torch._foreach_copy_(self.live, [torch.where(found_inf > 0, old, new) for old, new in pairs])
