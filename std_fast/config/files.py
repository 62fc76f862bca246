"""Recipe files as plain values: which file a name means, what its `base` adds, what the command line changes, and
whether the files that a recipe names are there.

Imports nothing heavy; recipe.py validates.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.errors import UserError, did_you_mean
from pipelines.read.remote import is_url
from pipelines.untrusted import read_bytes
from std_fast.config.legacy import FIELDS, upgrade_recipe, without_removed
from std_fast.config.schema import MAX_YAML, merge, read_yaml, set_dotted

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
LONGEST_NAME = 255  # bytes of a file's name
OUT = "runs/{name}"
"""default of run.out"""


def find(name: str, beside: Path | None = None) -> Path:
    """The file of a recipe: a path, the folder of a run, or the name of a built-in one. UserError with the nearest name
    otherwise."""
    for path in (Path(name), (beside or Path(".")) / name, RECIPES / f"{name}.yaml", Path(name) / "recipe.yaml"):
        if path.is_file() and path.suffix != ".beton":
            return path
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    hint = did_you_mean(name, names) or "; `std-fast recipes` lists them"
    if os.path.isdir(name) or name.endswith(".beton"):
        raise UserError(f"{name}: is no recipe; give it as --data.train {name}, or name the folder of a run")
    raise UserError(f"{name}: no such recipe file, nor a built-in recipe{hint}")


def read_text(path: Path) -> str:
    """A recipe's text. UserError for a file that cannot be read, or is far larger than any recipe."""
    try:
        return read_bytes(path, MAX_YAML).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({error})") from None


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict:
    data = read_yaml(read_text(path), str(path), words=True)
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, not a {type(data).__name__}")
    data = upgrade_recipe(data)
    base = data.pop("base", None)
    if base is None:
        return data
    base_path = find(str(base), path.parent).resolve()
    if base_path in seen:
        raise UserError(f"{path}: base {base!r} leads back to itself")
    return merge(_read(base_path, (*seen, path.resolve())), data)


def read(name: str, overrides: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    """A recipe by path or built-in name, with `(dotted key, text)` overrides; nothing is validated.

    Raises:
        UserError: the file is missing or no YAML.
    """
    path = find(name)
    data = _read(path)
    for dotted, text in overrides:
        if dotted == "budget.gpu_hours":  # how one says it
            dotted, text = "run.length", f"{text} gpu-hours"
        set_dotted(data, FIELDS.get(dotted, dotted), text)
    data = without_removed(data)
    data.setdefault("name", path.stem)
    return data


def filled_in(out: str, name: str, seed: object) -> Path:
    """`run.out` with the run's name and seed. UserError when it holds other braces, or what no file system takes."""
    if not out:
        raise UserError("run.out: is empty; name the folder of the run, e.g. --run.out runs/first")
    try:
        path = Path(out.format(name=name or "run", seed=seed))
    except (AttributeError, KeyError, IndexError, ValueError):
        raise UserError(f"run.out: {out!r} may hold {{name}} and {{seed}}, and no other braces") from None
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > LONGEST_NAME or "\0" in out:
        raise UserError(f"run.out: holds a name of {longest} bytes; use at most {LONGEST_NAME}, none of them zero")
    return path


def check_data(train: str, val: str = "", way_on: str = "") -> None:
    """UserError where nothing is at the path of data; way_on: what to do, before the options, by default to convert."""
    paths = {"--data.train": train, "--data.val": val}
    gone = {
        option: os.path.abspath(path)
        for option, path in paths.items()
        if path and not is_url(path) and not os.path.exists(path.partition(",")[0]) and not glob.glob(path)
    }
    if gone:
        maker = "demo" if "/runs/demo/" in min(gone.values()) else "convert"
        part = " (README: Imagenette)" if "imagenette" in min(gone.values()) else ""
        way_on = way_on or f"make it with `std-fast {maker}`{part}, or name other data by"
        raise UserError(
            f"{', '.join(f'{option[2:]}: {path}' for option, path in gone.items())}: not there; {way_on} "
            f"{' '.join(f'{option} PATH' for option in gone)}"
        )
