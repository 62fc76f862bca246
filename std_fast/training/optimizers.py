"""Optimizers beside torch's AdamW: SGD, Muon for matrices, and apex's two. None makes the host wait for the device.

All read `found_inf` as the fused AdamW does: a scalar tensor, 1.0 to change neither weights nor state in this step.

Shapes: N matrices of one shape, A rows, B columns.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pipelines.errors import UserError

APEX = (
    "conda install -c conda-forge nvidia-apex, or APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation "
    "git+https://github.com/NVIDIA/apex (not the apex on PyPI, which is another project)"
)


class SGD(torch.optim.SGD):
    """torch's fused SGD with momenta that are zeros before the first step.

    torch makes them in the first step, uninitialised, and leaves them so where `found_inf` skips that step. The update
    is the same: the first momentum is the gradient.
    """

    def __init__(self, groups: list[dict], device: torch.device, momentum: float, nesterov: bool) -> None:
        groups = [group | {"lr": torch.zeros((), device=device)} for group in groups]
        super().__init__(groups, lr=0.0, momentum=momentum, nesterov=nesterov, fused=True)
        for group in self.param_groups if momentum else ():
            for p in group["params"]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the groups with `muon: True`, AdamW for all others.

    Muon's update is the momentum, made orthogonal: `W -= lr 0.2 sqrt(max(A, B)) O(momentum)`, with decoupled decay. The
    factor gives it the size of an AdamW update (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2), so
    that a recipe keeps AdamW's learning rate and decay. 1x1 convolutions are matrices too.

    The same update as `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, which goes matrix by matrix, needs its
    learning rate on the host and does not read `found_inf`. Here the matrices of one shape (one or two from each
    block) are orthogonalised together, in bfloat16 on a GPU: for Mixer-S16 118 operations a step instead of 738, for
    ResMLP-S24 89 instead of 1658. Every process of many does all of them.

    Gradients of the `muon` groups are used up: `step` leaves None.
    """

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            if group.get("muon"):
                by_shape: dict[tuple, list[Tensor]] = {}
                for p in group["params"]:
                    if p.grad is not None:
                        by_shape.setdefault(tuple(p.shape), []).append(p)
                for same in by_shape.values():
                    self._step_matrices(same, group)
        return super().step(closure)

    def _step_matrices(self, params: list[Tensor], group: dict) -> None:
        """One update of N parameters `[A, B]` or `[A, B, 1, 1]`."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        grad_NAB = torch.stack([p.grad.flatten(1) for p in params])  # type: ignore[union-attr]
        momentum_NAB = torch.stack([buffer.flatten(1) for buffer in buffers])
        lr, momentum = group["lr"], group["momentum"]
        if self.found_inf is not None:
            bad = self.found_inf > 0
            grad_NAB = torch.where(bad, momentum_NAB, grad_NAB)  # lerp then leaves the momentum as it is
            lr = torch.where(bad, torch.zeros_like(lr), lr)
        momentum_NAB.lerp_(grad_NAB, 1 - momentum)
        torch._foreach_copy_(buffers, [m.view(p.shape) for m, p in zip(momentum_NAB, params, strict=True)])
        update_NAB = orthogonal(grad_NAB.lerp(momentum_NAB, momentum))  # Nesterov's momentum
        update_NAB = update_NAB * (lr * (-0.2 * math.sqrt(max(update_NAB.shape[1:]))))
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, [u.view(p.shape) for u, p in zip(update_NAB, params, strict=True)])
        for p in params:
            p.grad = None


def orthogonal(x_NAB: Tensor) -> Tensor:
    """Each matrix with its singular values pushed to about 1 (0.7 to 1.2), its singular vectors kept: `[N, A, B]`.

    Five steps of the quintic Newton-Schulz iteration with Keller Jordan's coefficients (github.com/KellerJordan/Muon),
    in bfloat16 on a GPU and in the matrix's own type on a CPU; the result has the type of the input.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x_NAB.shape[1] > x_NAB.shape[2]
    x = x_NAB.bfloat16() if x_NAB.is_cuda else x_NAB
    x = x.mT if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(x_NAB.dtype)


def build_apex(
    name: str, groups: list[dict], betas: tuple[float, float], eps: float, clip: float = 0.0
) -> torch.optim.Optimizer:
    """apex's LAMB (You et al. 2020) or AdamW with learning rate and step number on the device.

    `lamb` is `FusedMixedPrecisionLamb`: the kernels of FusedLAMB, which alone of the two can skip a step by
    `found_inf`. `apex_adam` is `FusedAdam(capturable=True)`.

    Args:
        clip: largest norm, for LAMB, of all gradients together, psi's too: LAMB clips them, so the step must not; 0:
            never.

    Raises:
        UserError: no apex, an apex without its kernels, or parameters on a CPU.
    """
    if not groups[0]["params"][0].is_cuda:
        raise UserError(f"optim.name: {name} is apex's, which needs a GPU; set it to adamw or muon")
    try:
        import amp_C  # noqa: F401 - its kernels: without them apex imports, and fails in the first step
        from apex.optimizers import FusedAdam, FusedMixedPrecisionLamb
    except ImportError as error:
        raise UserError(f"optim.name: {name} needs NVIDIA's apex with its kernels ({error}); {APEX}") from None
    base: Any = FusedMixedPrecisionLamb if name == "lamb" else FusedAdam
    own: dict[str, Any] = {"max_grad_norm": clip or math.inf} if name == "lamb" else {"capturable": True}
    return _on_device(base)(groups, betas=betas, eps=eps, **own)


def _on_device(base: Any) -> Any:
    """apex's optimizer class `base` with `found_inf` in the place of a gradient scaler."""

    class OnDevice(base):
        """Keeps apex's step count of a group in the state of its parameters, where checkpoints look."""

        found_inf: Tensor
        param_groups: list[dict]

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            every: list[dict] = self.param_groups
            # apex calls LAMB's kernel also for a group without gradients (psi where MINE pauses), which is an error,
            # and counts a step of Adam's that is none
            self.param_groups = [g for g in every if any(p.grad is not None for p in g["params"])]
            self.param_groups_full_precision: list = []  # LAMB makes it anew, for these groups
            for group in self.param_groups:
                restored = self.state.get(group["params"][0], {}).get("step")
                if restored is not None:
                    group["step"] = restored
                elif "step" in group:  # no state: a rollback to before the first step has removed it
                    group["step"] = torch.zeros_like(group["step"])
            try:
                return super().step(closure, grad_scaler=self)
            finally:
                for group in self.param_groups:
                    for p in group["params"]:
                        if self.state.get(p):
                            self.state[p]["step"] = group["step"]
                self.param_groups = every

        def zero_grad(self, set_to_none: bool = True) -> None:
            """FusedAdam's own takes no argument."""
            torch.optim.Optimizer.zero_grad(self, set_to_none)

        # the interface of a gradient scaler that apex calls
        def _check_inf_per_device(self, _: Any) -> dict[torch.device, Tensor]:
            return {self.found_inf.device: self.found_inf}

        def _get_scale_async(self) -> Tensor:
            return torch.ones(1, device=self.found_inf.device)

    return OnDevice
