"""Durations of a recipe: epochs, steps, samples, GPU-hours, shares and times, each converted once."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.errors import UserError
from std_fast.config.schema import require

LONGEST = 1e15  # of any unit of a duration: steps stay exact in float64


@dataclass(frozen=True)
class Duration:
    """A length of training: a number and `epochs`, `steps`, `samples` or `gpu-hours`."""

    amount: float
    unit: str

    UNITS = ("epochs", "steps", "samples", "gpu-hours")

    @classmethod
    def parse(cls, text: str | Duration, where: str = "duration") -> Duration:
        """`"300 epochs"`, `"1 epoch"`, `"5e6 samples"`, `"8 gpu-hours"` -> Duration. UserError otherwise."""
        if isinstance(text, Duration):
            return text
        amount, unit = _number_and_unit(text)
        if f"{unit}s" not in cls.UNITS or not 0 <= amount <= LONGEST:
            raise UserError(f"{where}: {text!r} is no duration; write one like '300 epochs' ({', '.join(cls.UNITS)})")
        return cls(amount, f"{unit}s")

    def steps(self, steps_per_epoch: int, global_batch: int) -> int:
        """Steps, rounded to the nearest, at least one of what is more than nothing. Not defined for gpu-hours."""
        return max(1, round(self.exact_steps(steps_per_epoch, global_batch))) if self.amount else 0

    def exact_steps(self, steps_per_epoch: int, global_batch: int) -> float:
        """Steps, not rounded. Not defined for gpu-hours: the budget's clock decides there."""
        per_step = {"epochs": 1 / steps_per_epoch, "steps": 1.0, "samples": float(global_batch)}[self.unit]
        return self.amount / per_step

    def __str__(self) -> str:
        return f"{self.amount:g} {self.unit}"


def _number_and_unit(text: str) -> tuple[float, str]:
    """`"5e6 samples"` -> (5e6, "sample"), `"5%"` -> (5.0, "%"); (-1.0, "") for anything else."""
    words = str(text).replace("%", " %").split()
    try:
        return float(words[0]), words[1].rstrip("s") if len(words) == 2 else ""
    except (ValueError, IndexError):
        return -1.0, ""


def parse_seconds(text: str, where: str) -> float:
    """`"10 minutes"` -> 600.0. UserError for anything but a number and seconds, minutes or hours."""
    amount, unit = _number_and_unit(text)
    seconds = amount * {"second": 1.0, "minute": 60.0, "hour": 3600.0}.get(unit, math.nan)
    require(0 <= seconds <= LONGEST, where, f"{text!r} is no time; write a number and seconds, minutes or hours")
    return seconds


def parse_steps(text: str) -> tuple[int, int] | None:
    """`"steps 20-30"` -> (20, 30), the first and the last; None of an empty text. UserError otherwise."""
    if not text:
        return None
    found = re.fullmatch(r"\s*steps?\s+(\d{1,15})(?:\s*-\s*(\d{1,15}))?\s*", text)
    if found is not None:
        first, last = int(found[1]), int(found[2] or found[1])
        if 1 <= first <= last:
            return first, last
    raise UserError(f"run.profile: {text!r} names no steps; write e.g. `steps 20-30`, counted from 1")


def parse_warmup(text: str) -> Duration | float:
    """A duration, or a share such as `"5 %"` as a float in [0, 1)."""
    amount, unit = _number_and_unit(text)
    if unit == "%":
        require(0 <= amount < 100, "optim.warmup", f"{text!r} must be from 0 % to under 100 %")
        return amount / 100
    duration = Duration.parse(text, "optim.warmup")
    require(duration.unit != "gpu-hours", "optim.warmup", "write a share of the training such as `5 %` instead")
    return duration


def unkept(every: dict[str, str], warmup: str, length: str, steps_per_epoch: int, global_batch: int) -> Iterator[str]:
    """A line for each duration that a run cannot keep.

    Args:
        every: fields of what is done again and again, with their durations.
        warmup, length: `optim.warmup` and `run.length`.
    """
    size = steps_per_epoch, global_batch
    for field, text in every.items():
        if 0 < (exact := Duration.parse(text, field).exact_steps(*size)) < 0.999:
            yield f"{field}: {text} is {exact:.2g} of a step; it is done in every step (of {steps_per_epoch} an epoch)"
    rise, total = parse_warmup(warmup), Duration.parse(length, "run.length")
    if isinstance(rise, Duration) and total.unit != "gpu-hours" and rise.steps(*size) > total.steps(*size):
        yield (
            f"optim.warmup: {warmup} is longer than the training ({length}), which ends before the peak learning rate; "
            "write a share such as '5 %'"
        )
