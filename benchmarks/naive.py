"""What a user would otherwise run, as the public code has it: the peers of the benchmarks.

Sources: METHOD.md sections 2, 4 and 5 written out with concatenations; DeiT's `engine.py` and `losses.py` (Touvron et
al. 2021), whose step makes the host wait twice; timm's `train.py`.
Shapes: B batch, P patches, C channels, K classes, M teachers, H distillation heads. The parameters are those of this
project's modules, so that tests can compare the two forms to rounding.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.augment.device import TrainBatch
from std_fast.method.losses import TeacherTargets
from std_fast.method.mine import MutualInformation, reverse_gradient
from std_fast.method.student import Student, StudentOutput
from std_fast.method.tokens import STDModule, TokenOutput, at_least_float32


def std_by_concatenation(module: STDModule, z_BPC: Tensor) -> TokenOutput:
    """The STD module as the paper writes it: tokens appended to the activations, layer norm, MLP, transposes."""
    B = len(z_BPC)
    x = torch.cat([z_BPC, module.token_s.expand(B, -1, -1)], dim=1)  # [B, P+M, C]
    x = module.norm_s(x).transpose(1, 2)
    spatial = module.fc2_s(F.gelu(module.fc1_s(x))).transpose(1, 2) + module.token_s
    y = torch.cat([z_BPC, module.token_c.expand(B, -1, -1)], dim=2)  # [B, P, C+M]
    y = module.norm_c(y)
    channel = (module.fc2_c(F.gelu(module.fc1_c(y))) + module.token_c).transpose(1, 2)
    read = torch.cat([spatial, channel], dim=2)  # [B, M, C+P]
    return TokenOutput(torch.stack([head(read[:, m]) for m, head in enumerate(module.heads)], 1), spatial, channel)


class NaiveMine(nn.Module):
    """V by two passes over concatenated pairs, with the weights of `mine`; gradients reversed as there."""

    def __init__(self, mine: MutualInformation) -> None:
        super().__init__()
        psi, self.weight = mine.psi, mine.weight
        dim_s, dim_c, width = psi.fc1_s.in_features, psi.fc1_c.in_features, psi.fc1_s.out_features
        self.fc1 = nn.Linear(dim_s + dim_c, width)
        self.fc2, self.fc3 = copy.deepcopy(psi.fc2), copy.deepcopy(psi.fc3)
        with torch.no_grad():
            self.fc1.weight.copy_(torch.cat([psi.fc1_s.weight, psi.fc1_c.weight], 1))
            self.fc1.bias.copy_(psi.fc1_s.bias)

    def score(self, s: Tensor, c: Tensor) -> Tensor:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(torch.cat([s, c], -1))))))

    def forward(self, ts_BMC: Tensor, tc_BMP: Tensor) -> Tensor:
        with torch.autocast(ts_BMC.device.type, enabled=False):
            ts, tc = (reverse_gradient(at_least_float32(t), self.weight) for t in (ts_BMC, tc_BMP))
            partner = torch.arange(len(tc), device=tc.device) ^ 2
            joint, marginal = self.score(ts, tc), self.score(ts, tc[partner])
            return joint.mean() - torch.log(torch.mean(torch.exp(marginal)))


class NaiveStudent(nn.Module):
    """A Mixer or ResMLP of timm's with STD by concatenation beside it; the modules are those of `student`."""

    backbone: Any  # timm's MlpMixer
    std: Any

    def __init__(self, backbone: nn.Module, student: Student) -> None:
        super().__init__()
        self.backbone = backbone
        self.taps, self.std = student.taps, student.std
        self.mine = nn.ModuleList(NaiveMine(cast(MutualInformation, mine)) for mine in student.mine)

    def forward(self, images: Tensor) -> StudentOutput:
        b = self.backbone
        x = b.stem(images)
        features = {}
        for number, block in enumerate(b.blocks, 1):
            x = block(x)
            if number in self.taps:
                features[number] = x
        logits = b.forward_head(b.norm(x))
        outputs = [std_by_concatenation(m, features[tap]) for m, tap in zip(self.std, self.taps, strict=True)]
        information = [mine(a.spatial, a.channel) for mine, a in zip(self.mine, outputs, strict=True)]
        return StudentOutput(logits, torch.cat([a.logits for a in outputs], 1), information)


def mixed_target(mixed: TrainBatch, classes: int, smoothing: float) -> Tensor:
    """The target [B, K] that timm's and DeiT's losses take, of mixed and smoothed labels."""
    off = smoothing / classes
    one = [
        torch.full((len(x), classes), off, device=x.device).scatter_(1, x[:, None], 1 - smoothing + off)
        for x in (mixed.labels_a, mixed.labels_b)
    ]
    return mixed.lam[:, None] * one[0] + (1 - mixed.lam[:, None]) * one[1]


def soft_target_loss(logits_BK: Tensor, target_BK: Tensor) -> Tensor:
    """timm's SoftTargetCrossEntropy."""
    return torch.sum(-target_BK * F.log_softmax(logits_BK, dim=-1), dim=-1).mean()


def naive_objective(
    out: StudentOutput, target_BK: Tensor, targets: TeacherTargets, alpha: float, head_teacher: tuple[int, ...]
) -> Tensor:
    """METHOD.md section 4 with hard labels and confidence weights, MINE subtracted."""
    assert out.dist_logits is not None
    assert targets.confidence is not None
    weights = targets.confidence.float().softmax(-1)
    distilled: Tensor | float = 0.0
    for h, teacher in enumerate(head_teacher):
        per_image = F.cross_entropy(out.dist_logits[:, h].float(), targets.labels[:, teacher], reduction="none")
        distilled = distilled + (weights[:, teacher] * per_image).mean()
    total = (1 - alpha) * soft_target_loss(out.class_logits.float(), target_BK) + alpha * distilled
    return total - sum(out.information) if out.information else total


def adamw(model: nn.Module, weight_decay: float, lr: float = 1e-4) -> torch.optim.Optimizer:
    """AdamW as timm makes it by default: decay for matrices only, torch's choice of kernels."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr)


class DeiTStep:
    """DeiT's `train_one_epoch` for one batch, on the naive student: `loss.item()` and a synchronise; see there."""

    def __init__(
        self,
        model: NaiveStudent,
        classes: int,
        smoothing: float,
        alpha: float,
        weight_decay: float,
        ema: float,
        head_teacher: tuple[int, ...],
        autocast: Callable[[], contextlib.AbstractContextManager],
    ) -> None:
        from timm.utils import ModelEma

        self.model, self.classes, self.smoothing, self.alpha = model, classes, smoothing, alpha
        self.head_teacher, self.autocast = head_teacher, autocast
        self.optimizer = adamw(model, weight_decay)
        self.average = ModelEma(model, decay=ema) if ema else None
        self.log: list[float] = []

    def __call__(self, batch: TrainBatch) -> float:
        target = mixed_target(batch, self.classes, self.smoothing)
        with self.autocast():
            loss = naive_objective(self.model(batch.images), target, batch.targets, self.alpha, self.head_teacher)
        loss_value = loss.item()
        if not math.isfinite(loss_value):
            raise RuntimeError(f"loss is {loss_value}")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if batch.images.is_cuda:
            torch.cuda.synchronize()
        if self.average is not None:
            self.average.update(self.model)
        self.log = [*self.log[-19:], loss_value]  # its SmoothedValue
        return loss_value


class TimmStep:
    """timm's `train.py` for one batch of a plain model: its loss, AdamW and ModelEmaV3; no gradient clipping."""

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[Tensor], Tensor],
        classes: int,
        smoothing: float,
        weight_decay: float,
        ema: float,
        autocast: Callable[[], contextlib.AbstractContextManager],
    ) -> None:
        from timm.utils import ModelEmaV3

        self.forward = forward  # the model, or what compiles it
        self.model, self.classes, self.smoothing, self.autocast = model, classes, smoothing, autocast
        self.optimizer = adamw(model, weight_decay)
        self.average = ModelEmaV3(model, decay=ema) if ema else None
        self.steps = 0

    def __call__(self, mixed: TrainBatch) -> None:
        target = mixed_target(mixed, self.classes, self.smoothing)
        with self.autocast():
            loss = soft_target_loss(self.forward(mixed.images), target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        if self.average is not None:
            self.average.update(self.model, step=self.steps)
