"""From disk to an augmented batch on the device. `open_loader` is the entry point.

Importing this package imports neither torch nor numpy: the names that need them are loaded at their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pipelines.errors import DataError, UserError

if TYPE_CHECKING:
    from pipelines.loaders.factory import BACKENDS, open_loader

__all__ = ["BACKENDS", "DataError", "UserError", "open_loader"]


def __getattr__(name: str) -> Any:
    if name in ("BACKENDS", "open_loader"):
        return getattr(importlib.import_module("pipelines.loaders.factory"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
