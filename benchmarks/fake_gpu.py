"""Where the fake GPU is: a tool beside the project that shows torch a GPU without one, for rehearsing what needs it.

Nothing of this project needs it. STD_FAST_FAKE_GPU names its script; otherwise `../shared/tools/fake-gpu/fake-gpu`
beside the checkout is taken.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.harness import ROOT

NAMED_BY = "STD_FAST_FAKE_GPU"
BESIDE = ROOT.parent / "shared" / "tools" / "fake-gpu" / "fake-gpu"


def find() -> Path | None:
    """The tool's script; None where it is not."""
    path = Path(os.environ[NAMED_BY]) if os.environ.get(NAMED_BY) else BESIDE
    return path if os.access(path, os.X_OK) and path.is_file() else None


def missing() -> str:
    """Why `find` gives None, in one line."""
    named = os.environ.get(NAMED_BY)
    return f"{NAMED_BY}: {named} is no script" if named else f"no fake GPU: neither {NAMED_BY} nor {BESIDE} is there"


def active() -> bool:
    """Whether this process runs under it."""
    return "FAKE_GPU_HOME" in os.environ and "libcudart" in os.environ.get("LD_PRELOAD", "")


def computes() -> bool:
    """Whether the results of this process's kernels are true: not where the tool compiles, or gives no values."""
    return not active() or os.environ.get("FAKE_GPU_VALUES") == "1"


def command(words: Sequence[str], tool: Path) -> list[str]:
    """`python WORDS` under the tool."""
    return [str(tool), sys.executable, *words]


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with the tool's settings (FAKE_GPU_...) and none inherited."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FAKE_GPU_")}
    home = {"FAKE_GPU_HOME": os.environ["FAKE_GPU_HOME"]} if "FAKE_GPU_HOME" in os.environ else {}
    return kept | home | dict(settings)
