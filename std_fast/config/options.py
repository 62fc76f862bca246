"""Options of a model's builder that a recipe may not set."""

from __future__ import annotations

from std_fast.config.schema import require

OWN_PLACE = ("num_classes", "image_size", "drop_path", "name")
"""arguments that the data or other fields decide"""
LOADERS = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""arguments of timm's builders that load or download a file, which may be a pickle; ours is `weights`"""


def check_options(options: dict, where: str, *decided: str) -> None:
    """UserError if a builder's options hold what has its own place, what is `decided` elsewhere, or load a file."""
    for key in (*OWN_PLACE, *decided):
        require(key not in options, f"{where}.{key}", "has its own place; leave it out here")
    refuse_loaders(options, where)


def refuse_loaders(options: dict, where: str) -> None:
    """UserError if a builder's options would have it load something by itself."""
    for key in LOADERS:
        require(
            key not in options, f"{where}.{key}", "would load a file past all checks; use `weights` and leave it out"
        )
