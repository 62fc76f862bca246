"""One target under atheris (libFuzzer, guided by the coverage of our modules and PyYAML): a process of __main__.py.

    python -m tests.fuzz.worker TARGET OUT SEED [libFuzzer's options and corpus folders]

Exceptions, and inputs that take more than HANG seconds of the processor, are written down, and fuzzing goes on; a
crash, a loop without end or too much memory ends the process, and libFuzzer leaves the input behind. OUT/count holds
the executions so far.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path

import atheris

HANG = 10.0  # seconds of the processor for an input of a few kB; the clock also runs while the machine is busy
MEMORY = 3 << 30  # bytes that a reader of a few kB may take on top of the imports
ROOT = Path(__file__).resolve().parents[2]


def place(error: BaseException) -> str:
    """Where an exception came from: its kind and the last line of ours on its way, as a file's name."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(ROOT)]
    frames = [f for f in frames if "/tests/" not in f.filename] or frames
    last = frames[-1]
    return f"{type(error).__name__}-{Path(last.filename).stem}-{last.name}-{last.lineno}"


def main() -> None:
    name, out, seed, *options = sys.argv[1:]
    with atheris.instrument_imports(include=["pipelines", "std_fast", "yaml"], enable_loader_override=False):
        import std_fast.commands.export
        import std_fast.commands.report  # noqa: F401
        from tests.fuzz import targets
    targets.quiet()
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None, prefix="std_fast-fuzz-"))
    target = targets.TARGETS[name](folder)
    _, used = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + MEMORY, used))
    with open(Path(out) / "count", "r+b") as file:
        count = mmap.mmap(file.fileno(), 8)

    for seed_input in target.seeds()[:1]:  # compiles what is compiled at the first call
        targets.execute(target, seed_input)

    def one(data: bytes) -> None:
        struct.pack_into("<q", count, 0, struct.unpack_from("<q", count, 0)[0] + 1)
        began = time.process_time()
        try:
            targets.execute(target, data)
            if time.process_time() - began > HANG:
                raise TimeoutError(f"{time.process_time() - began:.0f} s of the processor")
        except Exception as error:
            found = Path(out) / "findings" / place(error)
            found.mkdir(parents=True, exist_ok=True)
            if len(list(found.iterdir())) < 4:
                (found / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
                (found / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8", errors="replace")

    def mutate(data: bytes, most: int, number: int) -> bytes:
        rng = random.Random(number)
        if target.mutate is not None and rng.random() < 0.5:
            return target.mutate(data, rng)[:most]
        return atheris.Mutate(data, most)

    words = [sys.argv[0], f"-max_len={target.max_bytes}", f"-seed={seed}", *options]
    atheris.Setup(words, one, custom_mutator=mutate)
    atheris.Fuzz()


def _data_bytes() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmData"))


if __name__ == "__main__":
    main()
