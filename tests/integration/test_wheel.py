"""A wheel in an environment of its own: what it brings, and that its commands run."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Python and site-packages of an environment that holds the wheel; its dependencies are this environment's."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
    source.mkdir()
    for name in files:
        shutil.copy(ROOT / name, source)
    for name in ("std_fast", "pipelines", "benchmarks", "tests"):
        ignore = shutil.ignore_patterns("__pycache__", "results", "data", "corpus")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("std_fast-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel]
    subprocess.run(install, check=True, capture_output=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    # by PYTHONPATH, after the wheel's own packages: as if pip had installed them too
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "venv" / "bin", site, wheel


def run(installed, *words, folder):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [installed[0] / "std-fast", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def test_a_wheel_brings_two_packages_and_the_recipes(installed):
    names = zipfile.ZipFile(installed[2]).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"std_fast", "pipelines"}
    assert "std_fast/recipes/mixer_s16_std.yaml" in names
    assert "std_fast/_benchmarks/benchmarks/harness.py" in names


def test_its_commands_run(installed, tmp_path):
    recipes = run(installed, "recipes", folder=tmp_path)
    assert recipes.returncode == 0 and "mixer_s16_std" in recipes.stdout, recipes.stderr
    bench = run(installed, "bench", "students", "--help", folder=tmp_path)
    assert bench.returncode == 0 and "usage" in bench.stdout, bench.stderr
