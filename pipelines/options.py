"""Fields of configuration dataclasses: a default together with the text that `std-fast train --help` prints."""

from __future__ import annotations

import dataclasses
from typing import Any


def opt(default: Any, text: str) -> Any:
    """A dataclass field with its default and its help text. A default that could be changed is given out by a factory:
    lists and dictionaries are copied, frozen dataclasses are shared."""
    metadata = {"help": text}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    if dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
