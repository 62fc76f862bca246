"""std_fast: spatial-channel token distillation (STD) of vision MLPs, fast on a CPU or on GPUs.

Importing the package loads nothing heavy: `from std_fast import create_student` imports torch.
`import std_fast.registry` registers the students with timm (`timm.create_model("std_mixer_s16_224")`).
"""

from __future__ import annotations

import importlib

__version__ = "0.2.0"

_API = {
    "std_fast.library": ("create_student", "create_teachers"),
    "std_fast.method.student": ("Student", "StudentOutput", "predict"),
    "std_fast.method.tokens": ("STDModule", "TokenOutput"),
    "std_fast.method.mine": ("MutualInformation", "StatisticsNetwork", "mutual_information"),
    "std_fast.method.losses": (
        "TeacherTargets", "targets_from_logits", "class_loss", "confidence_weights", "distillation_loss",
    ),
    "std_fast.teachers.teacher": ("Teachers",),
    "std_fast.config.recipe": ("TeacherSpec",),
    "std_fast.commands.export": ("export_run",),
    "pipelines.errors": ("UserError",),
}  # fmt: skip
_HOME = {name: module for module, names in _API.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
