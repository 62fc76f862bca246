"""A process for each contestant of `std-fast bench loader`, and what it measures: time, CPU time and memory.

`drop_from_cache` makes the kernel forget files, for the epochs that read from the disk.
"""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loader_contestants import CONTESTANTS, Settings
from pipelines.errors import UserError


def _of_tree(read: Callable[[int], int]) -> int:
    """Sum of a number over this process and its descendants."""
    total, todo = 0, [os.getpid()]
    while todo:
        pid = todo.pop()
        try:
            total += read(pid)
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                todo += [int(child) for child in task.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            pass
    return total


def _cpu_seconds() -> float:
    def ticks(pid: int) -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 0 if pid == os.getpid() else int(fields[11]) + int(fields[12])  # user, system

    return time.process_time() + _of_tree(ticks) / os.sysconf("SC_CLK_TCK")


def _memory() -> float:
    """MiB that the process tree holds, without pages of files."""

    def kilobytes(pid: int) -> int:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)

    return _of_tree(kilobytes) / 1024


def _serve(connection: Any, name: str, settings: Settings) -> None:
    """A contestant's process: takes epoch numbers, returns the measurements of each."""
    import torch

    try:
        before, started = _memory(), time.perf_counter()
        epoch = CONTESTANTS[name](settings)
        opened: float | None = None
        while (number := connection.recv()) is not None:
            cpu, began = _cpu_seconds(), time.perf_counter()
            sizes, most, first = [], 0.0, 0.0
            for size in epoch(number):
                first = first or time.perf_counter()
                sizes.append(size)
                most = max(most, _memory())
            if settings.device != "cpu":
                torch.cuda.synchronize()
            ended = time.perf_counter()
            opened = opened or first - started
            connection.send(
                {
                    "images_per_second": sum(sizes) / (ended - began),
                    "after_first_batch": sum(sizes[1:]) / (ended - first),
                    "cpu_us_per_image": 1e6 * (_cpu_seconds() - cpu) / sum(sizes),
                    "first_batch_seconds": opened,
                    "memory_mib": most - before,
                }
            )
    except Exception as error:  # reported by the parent, with the contestant's name
        connection.send(f"{type(error).__name__}: {error}")


class Contestant:
    """A contestant, in a process that is started here."""

    def __init__(self, name: str, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._connection, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, name, settings))
        self._process.start()
        child.close()

    def run(self, number: int) -> dict[str, float]:
        self._connection.send(number)
        try:
            reply = self._connection.recv()
        except EOFError:
            reply = f"its process ended with code {self._process.exitcode}"
        if isinstance(reply, str):
            raise UserError(f"{self.name} failed ({reply}); leave it out with --backends")
        return reply

    def close(self) -> None:
        try:
            self._connection.send(None)
        except OSError:
            pass
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def drop_from_cache(paths: list[str]) -> float:
    """Drops files from the kernel's page cache.

    Returns the share of their pages that are still there.
    """
    libc = ctypes.CDLL(None)
    held = pages = 0
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as view:
                data = np.frombuffer(view, np.uint8)
                count = -(-data.size // mmap.PAGESIZE)
                there = (ctypes.c_ubyte * count)()
                libc.mincore(ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(data.size), there)
                del data
                held += sum(byte & 1 for byte in there)
                pages += count
    return held / pages
