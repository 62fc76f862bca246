"""What the project stands on: hashes and licences of its dependencies, as files that are kept.

    .venv/bin/python scripts/supply.py lock       scripts/*.lock from constraints.txt and PyPI's index
    .venv/bin/python scripts/supply.py licences   docs/LICENCES.md from the metadata of what is installed
    .venv/bin/python scripts/supply.py audit DIR  known vulnerabilities of what constraints.txt holds, with no network:
                                                  DIR is a clone of https://github.com/pypa/advisory-database

demo.lock holds what the demo needs without FFCV; ffcv.lock, dali.lock and dev.lock what each part needs on top: every
version that constraints.txt allows, with the hashes of all its source archives and of its wheels for Linux on x86-64.
scripts/bootstrap.sh gives them to pip, which takes nothing else then.
"""

import functools
import json
import re
import sys
import urllib.request
from importlib import metadata
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "scripts"
LICENCES = ROOT / "docs" / "LICENCES.md"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
OLDER = {"demo": ["six; python_version < '3.11'"],
         "dev": ["coloredlogs; python_version < '3.11'", "humanfriendly; python_version < '3.11'"]}  # fmt: skip
"""what the last releases for Python 3.10, which are not installed here, need on top of the newer ones' metadata"""
INDEX = "https://pypi.org/simple"
WHEELS = re.compile(r"-(py3|py2\.py3|cp31[0-3]|cp3\d)-(none|abi3|cp31[0-3])-(any|(manylinux|linux)\S*x86_64\S*)\.whl$")


def parts() -> dict[str, list[str]]:
    """The requirements of each part that scripts/bootstrap.sh installs; demo's is in all of them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    tools = ["pip", "setuptools"]  # install the rest
    found = {"demo": project["dependencies"] + tools} | {name: extras[name] for name in ("ffcv", "dali", "dev")}
    return {part: requirements + OLDER.get(part, []) for part, requirements in found.items()}


def applies(marker: Marker | None, python: str, extra: str = "") -> bool:
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": extra}
    return marker is None or marker.evaluate(environment)


@functools.cache
def requirements_of(name: str) -> list[Requirement]:
    """By the metadata of what is installed; what is not is another Python's: a leaf, such as exceptiongroup."""
    try:
        return [Requirement(text) for text in metadata.requires(name) or []]
    except metadata.PackageNotFoundError:
        return []


def needed(requirements: list[str], python: str) -> set[str]:
    """Names of all that these require, in turn too."""
    todo, seen = [Requirement(text) for text in requirements], set()
    todo = [requirement for requirement in todo if applies(requirement.marker, python)]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} - {extra for seen_name, extra in seen if seen_name == name}:
            seen.add((name, extra))
            inner = requirements_of(name)
            todo += [requirement for requirement in inner if applies(requirement.marker, python, extra)]
    return {name for name, _ in seen}


def needed_on_top(part: str) -> dict[str, list[str]]:
    """Name -> the Pythons that need it, of a part without what the demo needs."""
    found: dict[str, list[str]] = {}
    for python in PYTHONS:
        names = needed(parts()[part], python)
        for name in names - (needed(parts()["demo"], python) if part != "demo" else set()):
            found.setdefault(name, []).append(python)
    return dict(sorted(found.items()))


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


def lock() -> None:
    pinned = pins()
    for part in parts():
        out = ["# Made by `scripts/supply.py lock` from constraints.txt: do not edit.", ""]
        for name, pythons in needed_on_top(part).items():
            if name not in pinned:
                sys.exit(f"{name}: has no line in constraints.txt")
            for version, marker in pinned[name]:
                wanted = [python for python in pythons if applies(Marker(marker) if marker else None, python)]
                if not wanted:
                    continue
                found = hashes(name, version)
                if not found:
                    sys.exit(f"{name} {version}: the index has no file for Linux on x86-64")
                pin = f"{name}=={version}"
                if len(wanted) < len(PYTHONS):
                    pin += " ; " + " or ".join(f'python_version == "{python}"' for python in wanted)
                out.append(" \\\n    ".join([pin, *(f"--hash=sha256:{digest}" for digest in found)]))
                print(part, name, version, len(found), file=sys.stderr)
        (LOCKS / f"{part}.lock").write_text("\n".join(out) + "\n", encoding="utf-8")


ELSEWHERE = {
    "atheris": "Apache-2.0 (its licence file)",
    "ffcv": "Apache-2.0 (its repository's licence file)",
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
    rows = []
    for part in parts():
        for name in needed_on_top(part):
            if any(metadata.distributions(name=name)):
                rows.append(f"| {name} | {metadata.version(name)} | {licence(name)} | {part} |")
    head = [
        "# Licences of what std_fast stands on",
        "",
        "Made by `scripts/supply.py licences` from the metadata of the installed packages; nothing of them is part of",
        "this repository. demo: needed by `make demo`; ffcv and dali: the backends; dev: tests and tools.",
        "",
        "| package | version | licence, in its own words | for |",
        "|---|---|---|---|",
    ]
    LICENCES.write_text("\n".join([*head, *sorted(set(rows))]) + "\n", encoding="utf-8")


def affects(version: Version, affected: dict[str, Any]) -> bool:
    """By OSV's rules (https://ossf.github.io/osv-schema): named, or within a range of versions."""
    if str(version) in affected.get("versions", []):
        return True
    for span in affected.get("ranges", []):
        inside = False
        for event in span["events"] if span["type"] == "ECOSYSTEM" else []:
            ((kind, at),) = event.items()
            if kind == "introduced":
                inside = inside or at == "0" or version >= Version(at)
            elif kind == "fixed":
                inside = inside and version < Version(at)
            elif kind == "last_affected":
                inside = inside and version <= Version(at)
        if inside:
            return True
    return False


def audit(database: Path) -> None:
    """Exits with 1 and a line for each advisory that applies."""
    found, files, newest = [], 0, ""
    for name, versions in pins().items():
        for path in sorted((database / "vulns" / name).glob("*.yaml")):
            advisory = yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)
            files, newest = files + 1, max(newest, str(advisory["modified"])[:10])
            for version, _ in versions:
                about = [entry for entry in advisory["affected"] if canonicalize_name(entry["package"]["name"]) == name]
                if "withdrawn" not in advisory and any(affects(Version(version), entry) for entry in about):
                    what = " ".join(advisory["details"].split())[:300]
                    found.append(f"{name} {version}: {advisory['id']} {', '.join(advisory.get('aliases', []))}: {what}")
    print(*found, f"{len(found)} of {files} advisories apply; the newest of these files: {newest or 'none'}", sep="\n")
    sys.exit(bool(found) or not files)


if __name__ == "__main__":
    goals = {("lock", 0): lock, ("licences", 0): licences, ("audit", 1): audit}
    goal = goals.get((sys.argv[1] if sys.argv[1:] else "", len(sys.argv) - 2))
    if goal is None:
        sys.exit(__doc__)
    goal(*map(Path, sys.argv[2:]))
