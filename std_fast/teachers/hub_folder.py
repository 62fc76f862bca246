"""What a model folder states of itself: the config.json that timm, the Hugging Face hub and `std-fast export` write."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.errors import UserError
from pipelines.untrusted import read_json

LARGEST_INPUT = 4096  # pixels of a side, as a folder may ask for it
Triple = tuple[float, ...]  # a number for each of the three colours


class HubFolder(NamedTuple):
    """A model by timm's words."""

    architecture: str
    options: dict[str, Any]  # of `timm.create_model`, without the number of classes
    num_classes: int
    class_names: list[str] | None
    image_size: int | None  # side in pixels of the images that it was trained for
    fixed_size: bool  # whether it takes no other
    mean: Triple | None
    std: Triple | None
    crop_pct: float
    crop_mode: str
    interpolation: str
    precision: str  # `run.precision` of the run that was exported


def is_hub_folder(path: Path) -> bool:
    """Whether it holds a model by timm's words; a run's folder does not."""
    return (path / "config.json").is_file() and not (path / "recipe.yaml").is_file()


def read_hub_folder(path: Path) -> HubFolder:
    """The folder's config.json. Raises UserError where it describes no timm model."""
    try:
        config = read_json(path / "config.json")
        options = dict(config.get("model_args") or {})
        options.pop("num_classes", None)
        own = dict(config.get("pretrained_cfg") or config)
        mean, std = (_triple(own.get(key)) for key in ("mean", "std"))
        if std is not None and min(std) <= 0:
            raise ValueError(f"std {std}")
        return HubFolder(
            architecture=str(config["architecture"]),
            options=options,
            num_classes=int(config.get("num_classes", own.get("num_classes"))),
            class_names=_names(config.get("label_names", own.get("label_names"))),
            image_size=_side(own.get("input_size")),
            fixed_size=bool(own.get("fixed_input_size")),
            mean=mean,
            std=std,
            crop_pct=float(own.get("crop_pct") or 0.875),  # timm's default
            crop_mode=str(own.get("crop_mode") or "center"),
            interpolation=str(own.get("interpolation") or "bilinear"),
            precision=str(config.get("precision", "auto")),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}/config.json: describes no timm model ({error!r}); export the model again") from None


def _side(value: Any) -> int | None:
    """Side of an `input_size` (3, S, S), or None where there is none. Raises ValueError for anything else."""
    if value is None:
        return None
    side = int(value[-1])
    if not 1 <= side <= LARGEST_INPUT:
        raise ValueError(f"input_size {side}")
    return side


def _triple(value: Any) -> Triple | None:
    """Three finite numbers, or None where there is nothing. Raises ValueError or TypeError for anything else."""
    if value is None:
        return None
    numbers = tuple(float(number) for number in value)
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{value} where three numbers are due")
    return numbers


def _names(value: Any) -> list[str] | None:
    """Different class names, or None where there are none. Raises ValueError for anything else."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value) or len(set(value)) < len(value):
        raise ValueError("label_names where different names are due")
    return value
