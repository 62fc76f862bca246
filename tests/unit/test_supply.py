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


def locked(supply, part) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in re.split(r"\n(?=\S)", (supply.LOCKS / f"{part}.lock").read_text(encoding="utf-8").strip()):
        if entry.strip() and not entry.startswith("#"):
            pin, *hashes = entry.split(" \\\n    ")
            assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", h.strip()) for h in hashes), entry
            name, _, rest = pin.partition("==")
            found.setdefault(name, []).append(rest.partition(" ; ")[0])
    return found


@pytest.fixture
def as_tested(supply):
    """What is installed is what constraints.txt holds: not so under `make test-oldest` and `make test-newest`."""
    if metadata.version("torch").partition("+")[0] not in {version for version, _ in supply.pins()["torch"]}:
        pytest.skip("this is not the torch of constraints.txt")


def is_installed(name: str) -> bool:
    """Not counting what setuptools brings for itself, which is on the path once it was imported."""
    return any("_vendor" not in str(found.locate_file("")) for found in metadata.distributions(name=name))


SOME = {
    "demo": {"torch", "timm", "numpy", "safetensors", "nvidia-cuda-runtime", "pip", "setuptools"},
    "ffcv": {"ffcv", "numba"},
    "dali": {"nvidia-dali-cuda120"},
    "dev": {"pytest", "onnx"},
}


@pytest.mark.parametrize("part", SOME)
def test_a_lock_holds_what_its_part_needs_at_the_versions_of_the_constraints(supply, as_tested, part):
    found, pinned = locked(supply, part), supply.pins()
    assert SOME[part] <= found.keys()
    assert all({version for version, _ in pinned[name]} >= set(found[name]) for name in found), (
        "run scripts/supply.py lock"
    )
    installed = set(filter(is_installed, supply.needed_on_top(part)))
    assert installed <= found.keys(), "run scripts/supply.py lock"


def test_each_part_has_its_lock(supply):
    assert set(supply.parts()) == set(SOME) == {path.stem for path in supply.LOCKS.glob("*.lock")}


def test_the_licences_of_all_dependencies_are_listed(supply, as_tested):
    listed = set(re.findall(r"^\| ([a-z0-9-]+) \|", supply.LICENCES.read_text(encoding="utf-8"), re.M))
    installed = {name for part in supply.parts() for name in filter(is_installed, supply.needed_on_top(part))}
    assert installed <= listed, "run scripts/supply.py licences"
    assert "| not said |" not in supply.LICENCES.read_text(encoding="utf-8")


ADVISORY = """
id: PYSEC-0
details: breaks
modified: 2024-01-02T00:00:00Z
aliases: [CVE-0]
affected:
- package: {{name: Pillow, ecosystem: PyPI}}
  ranges:
  - type: GIT
    events: [{{introduced: "0"}}]
  - type: ECOSYSTEM
    events: {events}
  versions: {versions}
"""


@pytest.mark.parametrize(
    "events, versions, applies",
    [
        ('[{introduced: "0"}, {fixed: "4.0"}]', "[]", False),
        ('[{introduced: "0"}, {fixed: "4.0"}, {introduced: "4.9"}]', "[]", True),
        ('[{introduced: "4.10"}, {last_affected: "5.0"}]', "[]", True),
        ('[{introduced: "4.10"}, {fixed: "5.0"}]', "[]", False),
        ("[]", '["4.9", "5.0"]', True),
        ("[]", '["4.9"]', False),
    ],
)
def test_an_audit_names_the_advisories_that_apply(supply, tmp_path, monkeypatch, capsys, events, versions, applies):
    (tmp_path / "vulns" / "pillow").mkdir(parents=True)
    (tmp_path / "vulns" / "pillow" / "0.yaml").write_text(ADVISORY.format(events=events, versions=versions))
    monkeypatch.setattr(supply, "pins", lambda: {"pillow": [("5.0", "")], "torch": [("2.0", "")]})
    with pytest.raises(SystemExit) as ended:
        supply.audit(tmp_path)
    printed = capsys.readouterr().out
    assert bool(ended.value.code) == applies == ("pillow 5.0: PYSEC-0 CVE-0: breaks" in printed)
    assert f"{int(applies)} of 1 advisories apply; the newest of these files: 2024-01-02" in printed


def test_an_audit_of_no_advisories_is_no_audit(supply, tmp_path):
    with pytest.raises(SystemExit) as ended:
        supply.audit(tmp_path)
    assert ended.value.code == 1
