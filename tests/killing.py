"""Real processes for tests that kill them: `std-fast` as a child that starts at once, and kills at random moments.

The children are forked from a server that has imported torch and this project, so that starting one takes a tenth of a
second instead of several; nothing else is shared with them. Each counts as started by `Child` and ended by the kernel:
its exit code is what a shell would see, a signal as a negative number.

A moment is random in time, not at a step: over the entire life of an undisturbed process, its start and end included.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 120.0  # seconds that any child may take
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    ["tests.killing", "std_fast.training.train", "std_fast.commands.teach", "std_fast.commands.export", "timm"]
)


class Child:
    """`std-fast ARGV`, or `target(*argv)`, in a process of its own; what it says is in `text`."""

    def __init__(
        self,
        argv: Sequence[str],
        log: Path,
        target: Callable[..., object] | None = None,
        before: Callable[[], object] | None = None,
    ) -> None:
        """target, before (called first, in the child): functions of a module, since they are sent by their names."""
        self.log = log
        self.began = time.monotonic()
        self._process = _forks.Process(target=_live, args=(list(argv), str(log), target, before))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def text(self) -> str:
        """Standard output and error so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    @property
    def last(self) -> str:
        """The last line it said."""
        return ([""] + self.text.strip().splitlines())[-1]

    @property
    def running(self) -> bool:
        return self._process.exitcode is None

    def send(self, signum: int) -> None:
        """To a process that may have ended meanwhile."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    def sleep(self, seconds: float) -> None:
        """So long, or until it ends."""
        self._process.join(seconds)

    def wait(self, limit: float = LIMIT) -> int:
        """Its exit code. Kills it, and raises TimeoutError, when it does not end."""
        self._process.join(limit)
        if self._process.exitcode is None:
            self.send(signal.SIGKILL)
            self._process.join()
            raise TimeoutError(f"a child did not end within {limit:g} s; its last words: {self.last}")
        return self._process.exitcode

    def until(self, seen: Callable[[], object], limit: float = LIMIT) -> None:
        """Until `seen()` is true. Raises TimeoutError; RuntimeError when the child has ended before."""
        end = time.monotonic() + limit
        while not seen():
            if not self.running:
                raise RuntimeError(f"a child ended with {self._process.exitcode} too early: {self.text[-2000:]}")
            if time.monotonic() > end:
                raise TimeoutError(f"nothing seen of a child within {limit:g} s; its last words: {self.last}")
            time.sleep(0.002)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.send(signal.SIGKILL)
        self._process.join()


def _live(argv: list[str], log: str, target: Callable[..., object] | None, before: Callable[[], object] | None) -> None:
    """The child's life. Threads are few, and as many in every child: sums in the same order."""
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # a run collects garbage first
    if before is not None:
        before()
    if target is not None:
        target(*argv)
        sys.stdout.flush()
        return
    from std_fast import cli

    cli.entry(argv)


def get_ready(folder: Path) -> None:
    """The server that children are forked from is up: the first one would wait for it, which spoils its times."""
    with Child([], folder / "ready.log", target=_nothing) as child:
        assert child.wait() == 0, child.text


def _nothing() -> None:
    pass


@dataclass
class Kills:
    """What became of a task that was killed again and again."""

    moments: list[float] = field(default_factory=list)
    """of each kill, seconds after the start of its process"""
    finished: int = 0
    """how often the task came to its end"""


def kill_again_and_again(
    start: Callable[[], Child],
    finished: Callable[[], None],
    kills: int,
    duration: float,
    random: np.random.Generator,
    killed: Callable[[], None] = lambda: None,
) -> Kills:
    """Starts the task until it was killed (`kill -9`) `kills` times; it must then always come to its end.

    Args:
        start: starts the task, which continues where it stopped.
        finished: looks at the finished work, and removes it, so that the next start begins anew.
        duration: seconds that an undisturbed process takes; a moment is uniform in them.
        killed: looks at what a kill has left.
    """
    seen = Kills()
    while True:
        with start() as child:
            if len(seen.moments) < kills:
                moment = float(random.uniform(0, duration))
                child.sleep(moment)
                child.send(signal.SIGKILL)
            code = child.wait()
        if code == -signal.SIGKILL:
            seen.moments.append(moment)
            killed()
            continue
        if code != 0:
            raise AssertionError(f"after {len(seen.moments)} kills the task ended with {code}: {child.text[-3000:]}")
        seen.finished += 1
        finished()
        if len(seen.moments) >= kills:
            return seen
