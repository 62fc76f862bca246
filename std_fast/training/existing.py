"""What a folder holds of a run, by its small files alone: read before torch is imported and data is opened, which may
take a minute."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.untrusted import MAX_JSON, open_regular, read_json
from std_fast.config.recipe import Recipe, loads, read_saved
from std_fast.config.schema import difference

SUMMARY_TYPES = {"result": dict, "seconds": dict, "gpu_hours": float, "device": str, "steps": int, "seed": int}
"""of what is read of a finished run's summary"""

# fields that a resumed run may change: they decide where and how fast, not what is computed, or, the last ones, what
# becomes of a run that would otherwise end
RESUMABLE_CHANGES = (
    "run.out", "run.log_every", "run.save_every", "run.keep_checkpoints", "run.timeout", "run.trackers",
    "data.on_corrupt", "data.corrupt_limit", "run.not_finite", "run.not_finite_limit", "run.rollback_every",
    "data.one_part", "data.threads", "data.ahead", "data.hw_decoder_load", "run.eval_batch", "run.eval_every",
    "distill.target_cache", "summary", "name", "run.overlap", "run.micro_batch", "run.profile",
)  # fmt: skip
EVALUATED = ("data.val", "data.eval_crop.", "data.eval_resample")
"""or what these names begin: what is evaluated, so that accuracies from before are of other pixels"""


def changed_fields(one: Recipe, two: Recipe) -> list[str]:
    """Fields in which two recipes differ, and which a resumed run may not change."""
    return [name for name in difference(one, two) if name not in RESUMABLE_CHANGES and not name.startswith(EVALUATED)]


def unused_beside(folder: Path) -> Path:
    """FOLDER-2, or the next that does not exist."""
    folder = folder.resolve() if folder.name in ("", "..") else folder
    return next(path for i in itertools.count(2) if not os.path.lexists(path := Path(f"{folder}-{i}")))


def checkpoints(folder: Path) -> list[Path]:
    """Those in a run's folder, the newest last."""
    return sorted((folder / "checkpoints").glob("step-*.safetensors"))


def is_complete(folder: Path) -> bool:
    """Whether a run has ended in the folder, though its checkpoints may have been deleted since."""
    return (folder / "summary.json").is_file()


def of_new_run(folder: Path) -> str:
    """Options of a new run beside the folder's own; where that is complete, also to start from its weights."""
    weights = f", from its weights with --student.weights {folder}"
    return f"--run.out {unused_beside(folder)}{weights if is_complete(folder) and checkpoints(folder) else ''}"


def complete_line(folder: Path) -> str:
    return f"{folder} is complete; a longer training is a new run with {of_new_run(folder)}"


def stored_recipe(checkpoint: Path) -> Recipe:
    """The recipe in the header of a complete run's last checkpoint. UserError where it holds none."""
    try:
        with open_regular(checkpoint) as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, MAX_JSON)))
            length = os.fstat(file.fileno()).st_size
        meta = json.loads(header.pop("__metadata__")["std_fast"])  # as runtime/checkpoint.py writes it
        if length != 8 + size + max(tensor["data_offsets"][1] for tensor in header.values()):
            raise UserError(f"{checkpoint}: is cut short")
        if meta["complete"] is not True:
            raise UserError(f"{checkpoint}: its run is not complete")
        return loads(meta["recipe"], str(checkpoint))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{checkpoint}: holds no recipe ({error})") from None


def check_unused(recipe: Recipe, folder: Path) -> None:
    """UserError where the folder holds a run: it says to resume it, if it is this one, else to take another folder."""
    other = of_new_run(folder)
    if is_complete(folder):
        raise UserError(f"{folder}: holds a complete run; start a new one with {other}")
    if not checkpoints(folder):
        return
    way_on = f"add --resume to continue it, or start a new one with {other}"
    try:
        saved = read_saved(folder)
        data = replace(recipe.data, train=saved.data.train)  # its content is compared when it is resumed
        if differing := changed_fields(replace(recipe, data=data), saved):
            way_on = f"it has another {', '.join(differing)}, so start this one with {other}"
    except UserError:  # no recipe beside the checkpoints
        way_on = f"start this one with {other}"
    raise UserError(f"{folder}: already holds a run; {way_on}")


def read_summary(folder: Path, seed: int) -> dict[str, Any] | None:
    """What a run of this seed wrote at its end; None where it has not, or is damaged."""
    try:
        found = read_json(folder / "summary.json")
    except (OSError, ValueError):
        return None
    typed = isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in SUMMARY_TYPES.items())
    if not typed or found["seed"] != seed:
        return None
    numbers = [*found["result"].values(), *found["seconds"].values()]
    return found if all(isinstance(number, (int, float)) for number in numbers) else None


def finished(recipe: Recipe, folder: Path) -> dict[str, Any] | None:
    """The summary of the recipe's run, where it is complete and nothing is to be read or computed for it again.

    None also where that is not known before the data is read, as where `data.train` is another path.
    """
    summary = read_summary(folder, recipe.run.seed)
    if summary is None or not (folder / "recipe.yaml").is_file():
        return None
    try:
        last = folder / "checkpoints" / f"step-{summary['steps']:08d}.safetensors"
        differing = difference(recipe, stored_recipe(last) if last.exists() else read_saved(folder))
    except UserError:
        return None
    return None if {*differing} - {*RESUMABLE_CHANGES} else summary
