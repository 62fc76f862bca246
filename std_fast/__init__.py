"""std_fast: spatial-channel token distillation (STD) of vision MLPs, fast on the hardware at hand.

Importing it does no work: `from std_fast import create_student` loads torch when it is asked for that name, and the
students register with timm (`timm.create_model("std_mixer_s16_224")`) when timm is imported, before or after.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.1.0"

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


class _WhenTimmIsImported:
    """Finder that registers the students as soon as timm has been imported, by whomever.

    timm has no plugins, and importing it here would cost every `std-fast --help` its seconds.
    """

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "timm":
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)  # type: ignore
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            importlib.import_module("std_fast.registry")

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


if "timm" in sys.modules:
    importlib.import_module("std_fast.registry")
else:
    sys.meta_path.insert(0, _WhenTimmIsImported())
