"""The conditions that a benchmark's result carries: machine, versions, commit, date, load."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from std_fast.commands.doctor_probes import cpu_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "timm", "triton", "ffcv", "nvidia-dali-cuda120", "numba", "numpy", "pillow")


def conditions(device: str = "cpu") -> dict[str, Any]:
    """Plain values for the `conditions` of a result on `device` (cpu or cuda)."""
    import torch

    gpu = None
    if device != "cpu":
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "gpu": gpu,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _git("rev-parse", "HEAD") or "none",
        "uncommitted_changes": None if changed is None else bool(changed),
    }


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def hardware(found: dict[str, Any]) -> str:
    """The machine of some `conditions`, in the form that a file's name takes."""
    name = found["gpu"]["name"] if found["gpu"] else f"{found['cpu']} x{found['cores']}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
