"""Parameters and multiply-accumulates of a model, with and without STD."""

from __future__ import annotations

from dataclasses import replace

from std_fast.config.recipe import Recipe
from std_fast.config.schema import from_dict
from std_fast.runtime.flops import count_macs
from std_fast.training.build import build_student


def describe_model(
    name: str, teachers: int = 0, classes: int = 1000, image_size: int = 224, options: dict | None = None
) -> dict:
    """Sizes and costs of a student as it is deployed; MINE's statistics networks are counted separately.

    Args:
        name: a student of this project or any timm model; timm's own take no teachers.
        teachers: how many teachers its STD modules serve; 0 for the plain model.
        classes, image_size: K, and the side of the images in pixels.
        options: of the backbone's builder.

    Returns, Raises: as `describe_student`.
    """
    recipe = from_dict(
        Recipe,
        {
            "data": {"image_size": image_size},
            "student": {"name": name, "options": options or {}},
            "distill": {
                "mode": "std" if teachers else "none",
                "teachers": [{"name": f"teacher {i}"} for i in range(teachers)],
            },
        },
    )
    return describe_student(recipe, classes)


def describe_student(recipe: Recipe, classes: int = 1000) -> dict:
    """Sizes and costs of a recipe's student as it is deployed, for data of so many classes.

    Returns:
        `parameters_millions`, `gmacs` (multiply-accumulates of one forward of one image, in 10^9),
        `training_only_millions` (statistics networks), `dim`, `patches`, `depth` and `taps` where the model has them.

    Raises:
        UserError: unknown name or options.
    """
    recipe = replace(recipe, student=replace(recipe.student, weights=""))  # which need not be here
    student = build_student(recipe, classes).eval()
    extra = student.training_only()
    count = {key: sum(p.numel() for n, p in student.named_parameters() if (n in extra) == key) for key in (True, False)}
    data = {
        "model": recipe.student.name,
        "teachers": len(recipe.distill.teachers),
        "classes": classes,
        "image_size": recipe.data.image_size,
        "parameters_millions": round(count[False] / 1e6, 3),
        "gmacs": round(count_macs(student, recipe.data.image_size) / 1e9, 3),
        "training_only_millions": round(count[True] / 1e6, 3),
    }
    backbone = student.backbone
    if hasattr(backbone, "forward_taps"):
        data |= {"dim": backbone.dim, "patches": backbone.patches, "depth": backbone.depth, "taps": list(student.taps)}
    return data
