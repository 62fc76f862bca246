"""The lock and the list of licences are those of what the project needs now."""

import importlib.util
import re
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def supply():
    spec = importlib.util.spec_from_file_location("supply", ROOT / "scripts" / "supply.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def locked(supply) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for entry in re.split(r"\n(?=\S)", supply.LOCK.read_text(encoding="utf-8").strip()):
        if entry.strip() and not entry.startswith("#"):
            pin, *hashes = entry.split(" \\\n    ")
            assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", h.strip()) for h in hashes), entry
            name, _, rest = pin.partition("==")
            version, _, marker = rest.partition(" ; ")
            found.setdefault(name, []).append((version, marker))
    return found


def is_installed(name: str) -> bool:
    """Not counting what setuptools brings for itself, which is on the path once it was imported."""
    return any("_vendor" not in str(found.locate_file("")) for found in metadata.distributions(name=name))


def test_the_lock_holds_what_the_demo_needs_at_the_versions_of_the_constraints(supply):
    found, pinned = locked(supply), supply.pins()
    assert {"torch", "timm", "numpy", "ffcv", "numba", "safetensors"} <= found.keys()
    assert found == {name: pinned[name] for name in found}, "run scripts/supply.py lock"
    installed = set(filter(is_installed, supply.needed(supply.demo_requirements())))
    assert installed <= found.keys(), "run scripts/supply.py lock"


def test_the_licences_of_all_dependencies_are_listed(supply):
    listed = set(re.findall(r"^\| ([a-z0-9-]+) \|", supply.LICENCES.read_text(encoding="utf-8"), re.M))
    installed = set(filter(is_installed, supply.needed(supply.demo_requirements())))
    assert installed <= listed, "run scripts/supply.py licences"
    assert "| not said |" not in supply.LICENCES.read_text(encoding="utf-8")
