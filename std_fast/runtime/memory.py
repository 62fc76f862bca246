"""Out of memory: the errors that mean it, and the message to the user. Does not import torch."""

from __future__ import annotations

import re

_SHORT = re.compile(
    r"out of memory|(can't|cannot|not enough|unable to) allocate|not enough memory|bad_alloc|ALLOC_FAILED"
)


def ran_out(error: BaseException) -> bool:
    """Whether an error means that the host or a device ran out of memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and bool(_SHORT.search(str(error)))


def out_of_memory_line(error: BaseException, batch: int, micro_batch: int | str) -> str:
    """The message for a training with `batch` images per step that ran out of memory: what to change."""
    reason = " ".join(str(error).split())[:200]
    pieces = (
        "" if micro_batch == "auto" else "lower run.micro_batch, " if micro_batch else "set run.micro_batch: auto, "
    )
    if type(error).__name__ == "OutOfMemoryError":  # torch's; of the host's memory torch raises RuntimeError
        return (
            f"run.batch: {batch} does not fit in the device's memory ({reason}); lower it, {pieces}take a smaller "
            "student, teacher or data.image_size, or end what else uses the device"
        )
    return (
        f"run.batch: memory was short with {batch} images a step ({reason}); lower it, {pieces}"
        "or lower data.ahead, data.threads"
    )
