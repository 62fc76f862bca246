"""Values that a recipe's fields may not have: options of a model's builder, URLs where a path is meant; and the fields
that an evaluation sets anew."""

from __future__ import annotations

from pipelines.errors import FieldError
from pipelines.read.remote import is_url

OWN_PLACE = ("num_classes", "image_size", "drop_path", "name")
"""arguments that the data or other fields decide"""
LOADERS = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""arguments of timm's builders that load or download a file, which may be a pickle; ours is `weights`"""

EVAL_FIELDS = ("data.one_part", "data.threads", "data.backend", "run.eval_batch", "run.device")
"""what an evaluation may set anew: where and how fast, not what is computed"""


def check_local(path: str, owner: str, field: str) -> None:
    """FieldError where a field that names a file or folder on a disk holds a URL: a path would be made of it."""
    if is_url(path):
        raise FieldError(owner, field, f"{path} is a URL, which only data may be; name a file or folder on a disk")


def check_options(options: dict, owner: str, *decided: str) -> None:
    """FieldError if a builder's options hold what is `decided` elsewhere, or would have it load something by itself."""
    for key in options:
        if key in decided:
            raise FieldError(owner, f"options.{key}", "has its own place; leave it out here")
        if key in LOADERS:
            raise FieldError(owner, f"options.{key}", "would load a file past all checks; use `weights` instead")
