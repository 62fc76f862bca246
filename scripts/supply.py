"""What the project stands on: hashes and licences of its dependencies, as files that are kept.

    .venv/bin/python scripts/supply.py lock       requirements-demo.lock from constraints.txt and PyPI's index
    .venv/bin/python scripts/supply.py licences   docs/LICENCES.md from the metadata of what is installed

The lock holds what the demo needs, FFCV included: every version that constraints.txt allows, with the hashes of all its
source archives and of its wheels for Linux on x86-64, so that pip takes nothing else:

    pip install --require-hashes -r requirements-demo.lock && pip install --no-deps -e .
"""

import json
import re
import sys
import urllib.request
from importlib import metadata
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements-demo.lock"
LICENCES = ROOT / "docs" / "LICENCES.md"
PYTHONS = [{"extra": "", "python_version": f"3.{n}", "python_full_version": f"3.{n}.0"} for n in range(10, 14)]
INDEX = "https://pypi.org/simple"
WHEELS = re.compile(r"-(py3|py2\.py3|cp31[0-3]|cp3\d)-(none|abi3|cp31[0-3])-(any|(manylinux|linux)\S*x86_64\S*)\.whl$")


def needed(requirements: list[str]) -> list[str]:
    """Names of all that these require, in turn too, by the metadata of what is installed."""
    todo, seen = [Requirement(text) for text in requirements], set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or (requirement.marker and not any(map(requirement.marker.evaluate, PYTHONS))):
            continue
        seen.add(name)
        try:
            todo += map(Requirement, metadata.requires(name) or [])
        except metadata.PackageNotFoundError:  # another Python's: a leaf, such as exceptiongroup
            continue
    return sorted(seen)


def pins() -> dict[str, list[tuple[str, str]]]:
    """Name -> (version, marker) of each line of constraints.txt."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin, _, marker = line.partition(";")
            name, _, version = pin.partition("==")
            found.setdefault(canonicalize_name(name), []).append((version.strip(), marker.strip()))
    return found


def hashes(name: str, version: str) -> list[str]:
    """SHA-256 of the files of one version, from the index. Raises OSError."""
    request = urllib.request.Request(f"{INDEX}/{name}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        files = json.load(answer)["files"]
    stem = re.compile(rf"{name.replace('-', '[-_.]+')}-{re.escape(version)}(-|\.tar\.gz$|\.zip$)", re.IGNORECASE)
    return sorted(
        {
            file["hashes"]["sha256"]
            for file in files
            if stem.match(file["filename"])
            and (WHEELS.search(file["filename"]) or not file["filename"].endswith(".whl"))
        }
    )


def demo_requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["ffcv"]]


def lock() -> None:
    pinned = pins()
    out = ["# Made by `scripts/supply.py lock` from constraints.txt: do not edit.", ""]
    for name in needed(demo_requirements()):
        if name not in pinned:
            sys.exit(f"{name}: has no line in constraints.txt")
        for version, marker in pinned[name]:
            found = hashes(name, version)
            if not found:
                sys.exit(f"{name} {version}: the index has no file for Linux on x86-64")
            pin = f"{name}=={version}" + (f" ; {marker}" if marker else "")
            out.append(" \\\n    ".join([pin, *(f"--hash=sha256:{digest}" for digest in found)]))
            print(name, version, len(found), file=sys.stderr)
    LOCK.write_text("\n".join(out) + "\n", encoding="utf-8")


ELSEWHERE = {
    "atheris": "Apache-2.0 (its licence file)",
    "ffcv": "Apache-2.0 (its repository's licence file)",
    "torchao": "BSD-3-Clause (its licence file)",
    "cuda-toolkit": "not said; the packages it stands for are NVIDIA's",
}
"""of packages whose metadata say nothing: read where it says"""


def licence(name: str) -> str:
    """As the package's own metadata have it."""
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    about = metadata.metadata(name)
    classified = [
        text.rpartition(" :: ")[2] for text in about.get_all("Classifier") or [] if text.startswith("License")
    ]
    first = (about.get("License") or "").strip().splitlines()[:1]
    return about.get("License-Expression") or ", ".join(classified) or " ".join(first)[:80] or "not said"


def licences() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    groups = {"demo": demo_requirements(), "dali": extras["dali"], "dev": extras["dev"]}
    rows: list[str] = []
    seen: set[str] = set()
    for group, requirements in groups.items():
        for name in needed(requirements):
            if name not in seen and any(metadata.distributions(name=name)):
                seen.add(name)
                rows.append(f"| {name} | {metadata.version(name)} | {licence(name)} | {group} |")
    head = [
        "# Licences of what std_fast stands on",
        "",
        "Made by `scripts/supply.py licences` from the metadata of the installed packages; nothing of them is part of",
        "this repository. demo: needed by `make demo`; dali: the DALI backend; dev: tests and tools.",
        "",
        "| package | version | licence, in its own words | for |",
        "|---|---|---|---|",
    ]
    LICENCES.write_text("\n".join([*head, *sorted(rows)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    goals = {"lock": lock, "licences": licences}
    if len(sys.argv) != 2 or sys.argv[1] not in goals:
        sys.exit(__doc__)
    goals[sys.argv[1]]()
