"""The API reference is built from the docstrings without a warning."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(importlib.util.find_spec("pdoc") is None, reason="pdoc is not installed: pip install pdoc")
def test_the_reference_is_built_without_warnings(tmp_path):
    command = [ROOT / "scripts" / "docs.sh", tmp_path]
    done = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    pages = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.html")}
    assert {"std_fast/training/step.html", "std_fast/method/tokens.html", "pipelines/read/source.html"} <= pages
