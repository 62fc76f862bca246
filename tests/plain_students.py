"""The students in plain words, for the tests: timm's blocks, CycleMLP's release, concatenations (METHOD.md 1, 2, 5).

All read the parameters of the fast student, so that values and gradients can be compared one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import mlp_mixer
from torch import Tensor
from torchvision.ops import deform_conv2d

from benchmarks.naive import std_by_concatenation
from std_fast.method.mine import MutualInformation, partner_rows, reverse_gradient
from std_fast.method.student import Student, StudentOutput


def released_offset(channels: int, kernel: tuple[int, int]) -> Tensor:
    """The release's `CycleFC.gen_offset`, loop and all."""
    offset = torch.empty(1, channels * 2, 1, 1)
    start = (kernel[0] * kernel[1]) // 2
    for i in range(channels):
        offset[0, 2 * i + 0] = 0 if kernel[0] == 1 else (i + start) % kernel[0] - kernel[0] // 2
        offset[0, 2 * i + 1] = (i + start) % kernel[1] - kernel[1] // 2 if kernel[0] == 1 else 0
    return offset


def released_cycle_fc(x_BCHW: Tensor, weight: Tensor, bias: Tensor, kernel: tuple[int, int]) -> Tensor:
    batch, channels, height, width = x_BCHW.shape
    offset = released_offset(channels, kernel).to(x_BCHW).expand(batch, -1, height, width)
    return deform_conv2d(x_BCHW, offset, weight, bias)


def released_forward(
    w: dict[str, Tensor], images: Tensor, layers: Sequence[int], stride: int = 4
) -> tuple[Tensor, list[Tensor]]:
    """Logits of the release's `CycleNet`, from its state dict alone, and the last stage's features [B, P, C]."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def mlp(x: Tensor, name: str) -> Tensor:
        return linear(F.gelu(linear(x, f"{name}.fc1")), f"{name}.fc2")

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def mixing(x: Tensor, name: str) -> Tensor:
        parts = [
            released_cycle_fc(x.permute(0, 3, 1, 2), w[f"{name}.{part}.weight"], w[f"{name}.{part}.bias"], kernel)
            for part, kernel in (("sfc_h", (1, 3)), ("sfc_w", (3, 1)))
        ] + [linear(x, f"{name}.mlp_c").permute(0, 3, 1, 2)]
        blend = mlp(sum(parts).flatten(2).mean(2), f"{name}.reweight")
        blend = blend.reshape(len(x), -1, 3).permute(2, 0, 1).softmax(0)[..., None, None]
        return linear(sum(part * b for part, b in zip(parts, blend, strict=True)).permute(0, 2, 3, 1), f"{name}.proj")

    padding = {4: 2, 2: 3, 1: 3}[stride]
    x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride, padding).permute(0, 2, 3, 1)
    features: list[Tensor] = []
    for stage, count in enumerate(layers):
        if stage:
            down = f"network.{2 * stage - 1}.proj"
            x = F.conv2d(x.permute(0, 3, 1, 2), w[f"{down}.weight"], w[f"{down}.bias"], 2, 1).permute(0, 2, 3, 1)
        for block in range(count):
            name = f"network.{2 * stage}.{block}"
            x = x + mixing(norm(x, f"{name}.norm1"), f"{name}.attn")
            x = x + mlp(norm(x, f"{name}.norm2"), f"{name}.mlp")
            features += [x.flatten(1, 2)] * (stage == len(layers) - 1)
    return linear(norm(x, "norm").flatten(1, 2).mean(1), "head"), features


def timm_forward(w: dict[str, Tensor], images: Tensor, kind: str, options: dict) -> tuple[Tensor, list[Tensor]]:
    """Logits of timm's `MlpMixer` (a Mixer or a ResMLP) with these weights, and every block's features [B, P, C]."""
    o, own = options, {}
    if kind == "resmlp":
        own = {"block_layer": partial(mlp_mixer.ResBlock, init_values=1.0), "norm_layer": mlp_mixer.Affine}
    ratio = (o.get("token_dim", o["dim"] / 2) / o["dim"], o.get("channel_dim", 4 * o["dim"]) / o["dim"])
    ratio = {"mlp_ratio": ratio[1] if kind == "resmlp" else ratio}
    model: Any = mlp_mixer.MlpMixer(
        len(w["head.weight"]), images.shape[-1], 3, o["patch_size"], o["depth"], o["dim"], **ratio, **own
    )
    features: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: features.append(output))
    return torch.func.functional_call(model.eval(), w, (images,), strict=True), features


def plain_mine(mine: MutualInformation, ts_BMC: Tensor, tc_BMP: Tensor) -> Tensor:
    """V by two passes of one network over concatenated pairs, at least in float32."""
    psi, wide = mine.psi, torch.promote_types(ts_BMC.dtype, torch.float32)
    weight = torch.cat([psi.fc1_s.weight, psi.fc1_c.weight], 1)

    def score(s: Tensor, c: Tensor) -> Tensor:
        return psi.fc3(F.gelu(psi.fc2(F.gelu(F.linear(torch.cat([s, c], -1), weight, psi.fc1_s.bias)))))

    with torch.autocast(ts_BMC.device.type, enabled=False):
        ts, tc = (reverse_gradient(t.to(wide), mine.weight) for t in (ts_BMC, tc_BMP))
        return score(ts, tc).mean() - torch.log(torch.mean(torch.exp(score(ts, partner_rows(tc)))))


def plain_student(student: Student, images: Tensor, kind: str, options: dict) -> StudentOutput:
    """What `student` computes in training, without stochastic depth."""
    weights: Any = dict(student.backbone.named_parameters())
    if kind == "cyclemlp":
        logits, features = released_forward(weights, images, options["layers"], options.get("stem_stride", 4))
    else:
        logits, features = timm_forward(weights, images, kind, options)
    modules: Any = student.std
    outputs = [std_by_concatenation(m, features[tap - 1]) for m, tap in zip(modules, student.taps, strict=True)]
    mine: Any = zip(student.mine, outputs, strict=True)
    information = [plain_mine(m, a.spatial, a.channel) for m, a in mine]  # type: ignore[arg-type]
    return StudentOutput(logits, torch.cat([a.logits for a in outputs], 1), information)
