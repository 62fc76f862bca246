"""What the study compares, and how large it is: settings and sizes; see evidence.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Overrides = dict[str, Any]
LARGE, BOTH = ("large",), ("small", "large")


@dataclass(frozen=True)
class Setting:
    """A way to teach; the teachers' weights are filled in."""

    distill: Overrides
    teachers: tuple[str, ...] = BOTH
    cost_of_std: str = ""
    """how this one's length is found: "" the study's epochs; "alone", "with teachers": what STD's run cost"""
    pushed: bool = False
    """with the size's `push` on top, for each of its `push_minutes`, one seed"""


SETTINGS = {
    "plain": Setting({"mode": "none"}, ()),
    "no tokens": Setting({"tokens": "none", "mine": {"weight": 0.0}}),
    "DeiT token": Setting({"tokens": "deit", "mine": {"weight": 0.0}}),
    "STD": Setting({}),
    "STD, last module": Setting({"taps": [-1], "assign": [[0, 1]]}),
    "STD, MINE in each step": Setting({"mine": {"every": "1 step"}}),
    "STD, MINE in each step at 0.1": Setting({"mine": {"every": "1 step", "weight": 0.1}}),
    "STD, no MINE": Setting({"mine": {"weight": 0.0}}),
    "STD, no reweighting": Setting({"reweight": False}),
    "STD, one teacher": Setting({"assign": [[0], [0]]}, LARGE),
    "plain, STD's cost": Setting({"mode": "none"}, (), "alone"),
    "plain, STD's and its teachers' cost": Setting({"mode": "none"}, (), "with teachers"),
    "DeiT token, STD's cost": Setting({"tokens": "deit", "mine": {"weight": 0.0}}, BOTH, "alone"),
    "plain, pushed": Setting({"mode": "none"}, (), pushed=True),
    "STD, pushed": Setting({"mine": {"weight": 0.0}}, pushed=True),
}
PUSHED = tuple(name for name, setting in SETTINGS.items() if setting.pushed)


@dataclass(frozen=True)
class Size:
    """How large the study is."""

    common: Overrides
    teachers: dict[str, Overrides]
    students: dict[str, Overrides]
    epochs: int
    settings: tuple[str, ...] = tuple(name for name in SETTINGS if name not in PUSHED)
    budget: bool = True
    """equal cost by budgets of GPU-hours; else by samples, from the measured costs"""
    cost_turns: int = 31
    """how often a step of each setting is timed, in turns, where costs are measured"""
    seeds: tuple[int, ...] = (0, 1, 2)
    push_minutes: tuple[float, ...] = ()
    """budgets: minutes of a GPU, or of a processor where `budget` is not set"""
    push: Overrides = field(default_factory=dict)
    """nothing that the teacher targets depend on: the stored ones are cycled"""


def mixer(dim: int, depth: int) -> Overrides:
    options = {"patch_size": 4, "dim": dim, "depth": depth, "token_dim": dim // 2, "channel_dim": 4 * dim}
    return {"name": "mixer", "options": options}


def narrow_resnet(layers: list[int], channels: list[int]) -> Overrides:
    return {"name": "resnet18", "options": {"layers": layers, "channels": channels}, "drop_path": 0.0}


LIGHT = {"mix_prob": 0.5}  # half of the samples are mixed: few epochs leave a small student underfitted as it is
PUSH: Overrides = {"optim": {"name": "muon"}}
SIZES = {
    "gpu": Size(
        common={"base": "cifar10_mixer"},
        teachers={
            "small": {"base": "cifar10_teacher_small"},
            "large": {"base": "cifar10_teacher"},
        },
        students={
            "mixer": {},
            "resmlp": {"student": {"name": "resmlp", "options": {"patch_size": 4, "dim": 384, "depth": 12}}},
            "cyclemlp": {
                "student": {
                    "name": "cyclemlp",
                    "options": {
                        "layers": [2, 2, 4, 2],
                        "embed_dims": [64, 128, 320, 512],
                        "mlp_ratios": [4, 4, 4, 4],
                    },
                }
            },
        },
        epochs=100,
        push_minutes=(10, 30, 100),
        push=PUSH,
    ),
    "cpu": Size(
        common={
            "base": "cifar10_mixer",
            "augment": LIGHT,
            "student": mixer(64, 4) | {"drop_path": 0.0},
            "optim": {"lr": 2.0e-3, "lr_batch": 0, "warmup": "5 %"},
            "run": {
                "batch": 128,
                "eval_every": "1 epoch",
                "eval_batch": 500,
                "device": "cpu",
                "save_every": "2 minutes",
            },
            "data": {"threads": 1},
        },
        teachers={
            # at 48 px, so that timm's usual stem leaves 12 x 12 positions: 2 to 4 times the speed of a stem for 32 px
            "small": {
                "student": narrow_resnet([1, 1, 1, 1], [32, 64, 128, 256]),
                "data": {"image_size": 48},
                "augment": {"mix_prob": 0.2},
                "run": {"length": "8 epochs", "eval_every": "2 epochs"},
            },
            "large": {
                "student": narrow_resnet([2, 2, 2, 2], [32, 64, 128, 256]),
                "data": {"image_size": 48},
                "augment": {"mix_prob": 0.2},
                "run": {"length": "8 epochs", "eval_every": "2 epochs"},
            },
        },
        students={"mixer": {}},
        epochs=3,
        settings=(
            "plain",
            "DeiT token",
            "STD",
            "plain, STD's cost",
            "DeiT token, STD's cost",
            "STD, no MINE",
            "STD, MINE in each step",
            "STD, MINE in each step at 0.1",
        ),
        budget=False,
        push_minutes=(1.5, 4.5, 13.5),
        push=PUSH,
    ),
    "smoke": Size(
        common={
            "base": "cifar10_mixer",
            "data": {"image_size": 16, "threads": 1},
            "student": mixer(16, 3) | {"drop_path": 0.0},
            "optim": {"lr_batch": 0},
            "run": {"batch": 8, "eval_every": "1 epoch", "log_every": 1, "device": "cpu"},
        },
        teachers={
            name: {"student": narrow_resnet([1, 1, 1, 1], [8, 8, 8, 8]), "run": {"length": "2 steps"}} for name in BOTH
        },
        students={"mixer": {}},
        epochs=1,
        settings=("plain", "STD", "plain, STD's cost"),
        budget=False,
        cost_turns=2,
        seeds=(0,),
        push_minutes=(0.001,),
        push=PUSH,
    ),
}
