"""Out of memory: which errors mean it. No torch is imported here; see `largest_batch` for what then fits."""

from __future__ import annotations

import re

_SHORT = re.compile(
    r"out of memory|(can't|cannot|not enough|unable to) allocate|not enough memory|bad_alloc|ALLOC_FAILED"
)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory was short, the host's or a device's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and bool(_SHORT.search(str(error)))


def of_the_device(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError"  # torch's; of the host torch says RuntimeError
