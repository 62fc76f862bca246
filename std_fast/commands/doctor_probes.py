"""The probes of `std-fast doctor`: each imports a package or queries the machine and returns a `Check`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType

GIB = 2**30
REQUIRED = "torchvision timm numpy scipy pillow scikit-learn pyyaml rich tensorboard matplotlib safetensors"
FFCV_DEBIAN = "sudo apt-get install -y --no-install-recommends g++ pkg-config libopencv-dev libturbojpeg0-dev"
FFCV_CONDA = "conda install -c conda-forge compilers pkg-config opencv libjpeg-turbo"
APEX_BUILD = "APEX_CPP_EXT=1 APEX_CUDA_EXT=1"  # without them apex is built without its kernels
APEX_SOURCE = "git+https://github.com/NVIDIA/apex"


@dataclass(frozen=True)
class Check:
    """One line of the report. `fix` maps a package manager ("debian", "conda", "pip") or "note" to what to do where it
    is not `ok`."""

    name: str
    ok: bool
    version: str = ""
    detail: str = ""
    fix: dict[str, str] = field(default_factory=dict)
    required: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "fix", {} if self.ok else self.fix)

    @property
    def status(self) -> str:
        return "ok" if self.ok else "MISSING" if self.required else "optional"


def probes() -> Iterator[Callable[[], Check]]:
    """All probes, in the order of the report. A probe may raise anything: the report shows it as a finding."""
    yield _python
    yield lambda: _package("torch", conda="pytorch-gpu", required=True, describe=_torch_build)
    yield _cuda_device
    module_of = {"pillow": "PIL", "scikit-learn": "sklearn", "pyyaml": "yaml"}
    for name in REQUIRED.split():
        yield lambda name=name: _package(name, module_of.get(name, ""), required=True)  # type: ignore[misc]
    yield _ffcv
    yield lambda: _package("nvidia-dali-cuda120", "nvidia.dali", conda=None, name="DALI")
    yield _apex
    yield lambda: _package("triton", describe=lambda _: "used by torch.compile on a GPU")
    yield lambda: _package("onnx", describe=lambda _: "used by export")
    yield _compiler
    yield _python_headers
    yield lambda: _for_ffcv("pkg-config", "pkg-config", "pkg-config", "--version")
    yield lambda: _for_ffcv("OpenCV headers", "libopencv-dev", "opencv", "--modversion", "opencv4")
    yield lambda: _for_ffcv("turbojpeg headers", "libturbojpeg0-dev", "libjpeg-turbo", "--modversion", "libturbojpeg")
    yield _cores
    yield _memory
    yield _shared_memory
    yield _disk


# Python packages


def _python() -> Check:
    ok = sys.version_info >= (3, 10)
    fix = {"debian": "sudo apt-get install -y python3 python3-venv", "conda": "conda install python=3.11"}
    return Check("python", ok, platform.python_version(), sys.executable, fix, required=True)


def _package(
    distribution: str,
    module: str = "",
    *,
    name: str = "",
    conda: str | None = "",
    required: bool = False,
    describe: Callable[[ModuleType], str] = lambda _: "",
    fix: dict[str, str] | None = None,
) -> Check:
    """Imports `module` (default: as the distribution). `conda`: its name on conda-forge, "" = the same, None = none."""
    name, module = name or distribution, module or distribution
    version = _version(distribution)
    try:
        imported = importlib.import_module(module)
        version = version or str(getattr(imported, "__version__", ""))
        return Check(name, True, version, describe(imported), required=required)
    except Exception as error:  # a broken package may raise anything while it is imported
        detail = f"does not load: {one_line(error)}" if version else "not installed"
    if fix is None:
        # For an installed package that does not load, a plain install does nothing: reinstall it.
        fix = {"conda": f"conda install -c conda-forge {conda or distribution}"} if conda is not None else {}
        fix["pip"] = _pip_install(distribution, again=bool(version))
    return Check(name, False, version, detail, fix, required)


def _torch_build(torch: ModuleType) -> str:
    if torch.version.cuda is None:
        return "built for the CPU only"
    return f"built for CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"


def _ffcv() -> Check:
    pip = _pip_install("ffcv", again=_version("ffcv") != "")
    fix = {"debian": f"{FFCV_DEBIAN} && {pip}", "conda": f"{FFCV_CONDA} && {pip}", "pip": pip}
    return _package("ffcv", "ffcv.libffcv", describe=lambda _: "native library loads", fix=fix)


def _apex() -> Check:
    """NVIDIA's apex, and not the package of that name on PyPI, which is another project."""
    fix = {
        "conda": "conda install -c conda-forge nvidia-apex",
        "pip": f"{APEX_BUILD} {shlex.quote(sys.executable)} -m pip install --no-build-isolation {APEX_SOURCE}",
    }
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Check("apex", False, detail="not installed: optim.name lamb and apex_adam need it", fix=fix)
    version = _version("apex")
    places = [Path(place) for place in spec.submodule_search_locations or []]
    if not any((place / "optimizers").is_dir() for place in places):
        remove = f"{shlex.quote(sys.executable)} -m pip uninstall -y apex"
        fix = {"note": f"remove it first: {remove}", **fix}
        return Check("apex", False, version, "not NVIDIA's: PyPI's apex is another project", fix)
    try:
        importlib.import_module("apex.optimizers")
        # FusedLAMB's kernels: a build without them can be imported, and fails at the first step
        importlib.import_module("amp_C")
    except Exception as error:
        return Check("apex", False, version, f"built without its CUDA kernels: {one_line(error)}", fix)
    return Check("apex", True, version, "NVIDIA's, with its CUDA kernels")


# GPU


def _cuda_device() -> Check:
    name = "CUDA device"
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0].strip()
    import torch

    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        devices = [f"{d.name} (sm_{d.major}{d.minor}, {d.total_memory / GIB:.0f} GiB)" for d in found]
        return Check(name, True, f"driver {driver}" if driver else "", "; ".join(devices))
    if not driver:
        return Check(name, False, detail="no NVIDIA GPU or driver found: everything runs on the CPU")
    fix = {"conda": "conda install -c conda-forge pytorch-gpu", "pip": _pip_install("torch", again=True)}
    detail = "there is a GPU, but torch is built for the CPU only"
    if torch.version.cuda is not None:
        fix = {"note": f"update the NVIDIA driver to one that runs CUDA {torch.version.cuda}"}
        detail = f"there is a GPU, but torch (CUDA {torch.version.cuda}) cannot use it with this driver"
    return Check(name, False, f"driver {driver}", detail, fix)


# What FFCV and torch.compile are built with


def _compiler() -> Check:
    fix = {"debian": "sudo apt-get install -y g++", "conda": "conda install -c conda-forge compilers"}
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    version = _output(*shlex.split(found), "--version").split("\n")[0] if found else ""
    ok = bool(version)
    return Check("C++ compiler", ok, _number(version), version or "needed by torch.compile and FFCV", fix)


def _python_headers() -> Check:
    header = Path(sysconfig.get_path("include")) / "Python.h"
    ok = header.exists()
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    fix = {"debian": f"sudo apt-get install -y {package}"}
    return Check("Python headers", ok, detail=str(header) if ok else "needed by torch.compile and FFCV", fix=fix)


def _for_ffcv(name: str, debian: str, conda: str, *query: str) -> Check:
    """What pkg-config prints for a query of FFCV's build."""
    version = _output("pkg-config", *query).strip()
    fix = {
        "debian": f"sudo apt-get install -y --no-install-recommends {debian}",
        "conda": f"conda install -c conda-forge {conda}",
    }
    ok = version != ""
    return Check(name, ok, version, "" if ok else "needed to build FFCV", fix)


# The machine


def _cores() -> Check:
    usable = len(os.sched_getaffinity(0))
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    limit = f"; the container is limited to {int(quota[0]) / int(quota[1]):.1f}" if quota and quota[0] != "max" else ""
    return Check("CPU cores", True, str(usable), f"{cpu_name()}, {os.cpu_count()} in the machine{limit}")


def _memory() -> Check:
    sizes = {key: int(kib) * 1024 for key, kib in re.findall(r"(\w+):\s+(\d+) kB", _read("/proc/meminfo"))}
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    total = min(sizes["MemTotal"], int(limit)) if limit.isdigit() else sizes["MemTotal"]
    ok = total >= 4 * GIB
    fix = {"note": "4 GiB at least: smaller batches and fewer loader threads lower the need"}
    return Check("memory", ok, f"{total / GIB:.1f} GiB", f"{sizes['MemAvailable'] / GIB:.1f} GiB available", fix)


def _shared_memory() -> Check:
    size = shutil.disk_usage("/dev/shm")
    ok = size.total >= GIB
    fix = {"note": "NCCL and FFCV's writer use it; in Docker: docker run --shm-size=8g (its default is 64 MB)"}
    return Check("/dev/shm", ok, f"{size.total / GIB:.1f} GiB", f"{size.free / GIB:.1f} GiB free", fix)


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    ok = free >= 5 * GIB
    fix = {"note": "ImageNet as a beton takes 22 to 65 GB, a run with its checkpoints about 1 GB"}
    return Check("disk", ok, f"{free / GIB:.1f} GiB", f"free in {Path.cwd()}", fix)


# Small helpers


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _pip_install(distribution: str, again: bool = False) -> str:
    """The pip command for this interpreter; with the tested versions where the checkout's constraints.txt is there."""
    constraints = Path(__file__).resolve().parents[2] / "constraints.txt"
    words = [sys.executable, "-m", "pip", "install"]
    words += ["-c", str(constraints)] if constraints.exists() else []
    words += ["--force-reinstall", "--no-deps", "--no-cache-dir"] if again else []
    return shlex.join([*words, distribution])


def _output(*command: str) -> str:
    """Standard output of a command; "" when it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def cpu_name() -> str:
    match = re.search(r"model name\s*: (.+)", _read("/proc/cpuinfo"))
    return match[1].strip() if match else platform.machine()


def _number(text: str) -> str:
    match = re.search(r"\d+(\.\d+)+", text)
    return match[0] if match else ""


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0]
