"""torch.compile, around five regions: the student's forward, its stochastic depth, the objective, the teachers and the
augmentation.

The optimizer is one fused kernel already, and what is left between the regions is small. Every region has fixed shapes
(training drops the last, smaller batch), so that it is compiled once; the student and its objective twice: with MINE
and without. Evaluation runs uncompiled. Order matters: compile, then DDP (distributed.py).

Backends: `inductor` fuses, into Triton kernels on a GPU and C++ on a CPU. `max-autotune` is inductor that also measures
which kernels are best (two runs may differ in them, and in the last bits), without its CUDA graphs, whose
shared memory pool does not suit two models at once. `aot_eager` and `eager` trace the same graphs but run torch's own
kernels: for machines without Triton or a compiler, and to test whether the compiler causes a difference.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from pipelines.errors import UserError
from std_fast.runtime.budget import Ledger

CACHE = "TORCHINDUCTOR_CACHE_DIR"
F = TypeVar("F", bound=Callable)
log = logging.getLogger("std_fast")


def backend_of(chosen: str, device: torch.device) -> str | None:
    """The backend for a value of `run.compile` on this device; None: nothing is compiled.

    `auto` is inductor on a GPU with Triton.

    Raises:
        UserError: inductor on a GPU without Triton, or any backend under python -O.
    """
    if sys.flags.optimize and chosen != "off" and (chosen != "auto" or device.type == "cuda"):
        raise UserError(  # its tracer looks for the instructions of an assertion
            f"run.compile: {chosen} does not work under python -O or PYTHONOPTIMIZE; start without, or set it to off"
        )
    has_triton = importlib.util.find_spec("triton") is not None
    if chosen == "auto":
        if device.type == "cuda" and not has_triton:
            log.warning("run.compile: nothing is compiled, Triton is not installed (pip install triton)")
        return "inductor" if device.type == "cuda" and has_triton else None
    if chosen in ("inductor", "max-autotune") and device.type == "cuda" and not has_triton:
        raise UserError(
            f"run.compile: {chosen} needs Triton on a GPU; pip install triton, or set run.compile to off or aot_eager"
        )
    return None if chosen == "off" else chosen


def options(backend: str, **inductor: Any) -> dict[str, Any]:
    """Arguments of torch.compile for a backend of the recipe; `inductor`: settings that only inductor has."""
    if backend == "max-autotune":
        from torch._inductor import list_mode_options

        backend, inductor = "inductor", {**list_mode_options("max-autotune-no-cudagraphs"), **inductor}
    more = {"options": inductor} if inductor and backend == "inductor" else {}
    return {"backend": backend, "dynamic": False, **more}


def compiled(call: F, backend: str | None, **inductor: Any) -> F:
    """`call` (a function or a module), compiled at its first use; as it is when there is no backend.

    Args:
        inductor: settings of inductor; those that this torch does not have are left out.
    """
    if backend is None:
        return call
    from torch._inductor import list_options

    # With 30, inductor's default, the gradient of an STD module's GELU is written in float32 and read again.
    settings = {"realize_opcount_threshold": 100} | inductor
    known = {name: value for name, value in settings.items() if name in list_options()}
    return cast(F, torch.compile(call, **options(backend, **known)))


def keep_cache() -> None:
    """Compiled kernels stay in ~/.cache/std_fast (or under XDG_CACHE_HOME), so that the next run starts warm.

    A TORCHINDUCTOR_CACHE_DIR of the user's decides instead. Call before anything is compiled.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get(CACHE, default_cache_dir()) != default_cache_dir():  # torch itself sets it to its default
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "std_fast" / "inductor"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[CACHE] = str(folder)
    except OSError as error:
        log.warning("%s: cannot be made (%s); compiled kernels stay in %s", folder, error, default_cache_dir())


@contextmanager
def compile_time(ledger: Ledger) -> Iterator[None]:
    """Inside, the time of every compilation belongs to the ledger's part "compile", whenever and wherever it happens.

    That is tracing and generating code, forward and backward; not what kernels take longer when they first run.
    """
    from torch._dynamo.callback import callback_handler  # takes a second to import

    before: list[str] = []

    def start(_: Any) -> None:
        before.append(ledger.switch("compile"))

    def end(_: Any) -> None:
        ledger.switch(before.pop())

    callback_handler.register_start_callback(start)
    callback_handler.register_end_callback(end)
    try:
        yield
    finally:
        callback_handler.remove_start_callback(start)
        callback_handler.remove_end_callback(end)
