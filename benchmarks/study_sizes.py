"""What the study compares, and how large it is: settings and sizes; see evidence.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Overrides = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """A way to train the student; the teachers are filled in."""

    distill: Overrides
    teachers: bool = True
    cost_of: str = ""
    """as many epochs as cost what this setting costs, instead of the study's; the views of the targets are cycled"""
    once: bool = False
    """of the first initialisation alone"""


NO_MINE: Overrides = {"mine": {"weight": 0.0}}
SETTINGS = {
    "plain": Setting({"mode": "none"}, teachers=False),
    "no tokens": Setting({"tokens": "none", **NO_MINE}),
    "DeiT token": Setting({"tokens": "deit", **NO_MINE}),
    "STD": Setting({}),
    "STD, true labels": Setting({"mode": "std", "labels": "ground_truth"}, teachers=False),
    "STD narrow": Setting({"token_mlp_ratio": [0.5, 1.0]}),
    "STD at the last block": Setting({"taps": [-1], "assign": [[0, 1]]}),
    "plain, STD's cost": Setting({"mode": "none"}, teachers=False, cost_of="STD"),
    "no tokens, STD's cost": Setting({"tokens": "none", **NO_MINE}, cost_of="STD"),
    "STD, 5 views": Setting({"views": 5}, once=True),
    "STD, 10 views": Setting({"views": 10}, once=True),
}
FIRST = ("plain", "no tokens", "DeiT token", "STD", "STD narrow", "plain, STD's cost", "no tokens, STD's cost")


@dataclass(frozen=True)
class Size:
    """How large the study is."""

    common: Overrides
    teachers: tuple[str, ...]
    """timm names; their weights are NAME.safetensors in the folder of the teachers"""
    students: dict[str, Overrides]
    inits: dict[str, tuple[int, ...]]
    """initialisations of each student"""
    epochs: int
    settings: tuple[str, ...] = tuple(SETTINGS)
    cost_turns: int = 31
    """how often a step of each setting is timed, in turns"""
    costs: Overrides = field(default_factory=dict)
    """of the recipes whose steps are timed"""


def mixer(dim: int) -> Overrides:
    """Mixer-S16's proportions: token hidden C/2, channel hidden 4 C, 8 blocks."""
    options = {"patch_size": 16, "dim": dim, "depth": 8, "token_dim": dim // 2, "channel_dim": 4 * dim}
    return {"student": {"name": "mixer", "options": options}}


TEACHERS = ("tf_efficientnet_lite0", "tf_efficientnet_lite2")
ON_A_CPU: Overrides = {
    "base": "imagenette_mixer",
    "data": {"threads": 1},
    "run": {"device": "cpu", "eval_every": "2 epochs", "eval_batch": 256, "save_every": "2 minutes"},
}
SIZES = {
    "gpu": Size(
        common={
            "base": "imagenette_mixer",
            "data": {"backend": "resident"},
            "run": {"batch": 256, "eval_every": "2 epochs", "compile": "off"},  # a run has 1,000 steps
        },
        costs={"run": {"compile": "inductor"}},
        teachers=TEACHERS,
        students={"C 512": mixer(512)},
        inits={"C 512": (0, 1, 2, 3)},
        epochs=30,
    ),
    "cpu": Size(
        common=ON_A_CPU,
        teachers=TEACHERS,
        students={"C 64": mixer(64), "C 128": mixer(128)},
        inits={"C 64": (0, 1, 2, 3), "C 128": (0, 1, 2, 3)},
        epochs=30,
    ),
    "short": Size(
        common=ON_A_CPU,
        teachers=TEACHERS,
        students={"C 64": mixer(64)},
        inits={"C 64": (0, 1, 2)},
        epochs=8,
        settings=FIRST,
    ),
    "smoke": Size(
        common={
            "base": "imagenette_mixer",
            "data": {"image_size": 32, "threads": 1, "backend": "torch"},
            "run": {"batch": 4, "eval_every": "1 epoch", "log_every": 1},
        },
        teachers=("test_resnet", "test_efficientnet"),
        students={
            "C 16": {
                "student": {
                    "name": "mixer",
                    "options": {"patch_size": 8, "dim": 16, "depth": 3, "token_dim": 8, "channel_dim": 32},
                }
            }
        },
        inits={"C 16": (0, 1)},
        epochs=1,
        settings=("plain", "no tokens", "STD", "plain, STD's cost"),
        cost_turns=2,
    ),
}
