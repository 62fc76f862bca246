"""What a terminal, a scheduler or a pipe does to this process: its signals and its standard streams.

Imports nothing heavy: `std-fast` uses it before torch is there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn, TextIO

STOP_SIGNALS = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU
)  # fmt: skip
"""each asks a run to save and stop; schedulers send the last three before a limit"""
INTERRUPTED = 130  # exit code of a process that Ctrl-C ended
SAME_PRESS = 0.2  # seconds; a launcher may forward the Ctrl-C that the terminal has sent to all processes already,
SAME_PRESS_TORCHRUN = 2.0  # and torchrun does, once it has noticed it


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """`handler` gets STOP_SIGNALS. Signals that were set to be ignored, as SIGHUP is by nohup, stay ignored.

    Outside the main thread, where Python sets no handlers, nothing changes.
    """
    kept = {}
    with contextlib.suppress(ValueError):
        for signum in STOP_SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                kept[signum] = signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, before in kept.items():
            signal.signal(signum, signal.SIG_DFL if before is None else before)


@contextlib.contextmanager
def leave_on_signal(code: int) -> Iterator[None]:
    """STOP_SIGNALS end the process at once, with this exit code: for the seconds before and after a training.

    Not by an exception, which would be lost where a module is compiled, and the training would begin.
    """

    def leave(_signum: int, _frame: object) -> NoReturn:
        with contextlib.suppress(Exception):  # a reader that has left, or the signal came in the middle of a write
            sys.stdout.flush()
        _write_at_once("\nstd-fast: stopped; no step was under way\n")
        os._exit(code)

    with handled(leave):
        yield


@contextlib.contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """STOP_SIGNALS ask a run to save and stop after the present step: they are put into the list.

    A second Ctrl-C ends the process at once, with exit code 130; what was saved before is valid.
    """
    asked: list[int] = []
    pressed: list[float] = []

    def ask(signum: int, _frame: object) -> None:
        asked.append(signum)
        if signum != signal.SIGINT:
            return
        pressed.append(time.monotonic())
        if len(pressed) == 1:
            _write_at_once("\nstopping after this step; Ctrl-C again leaves at once, without saving\n")
        elif pressed[-1] - pressed[0] > (SAME_PRESS_TORCHRUN if "TORCHELASTIC_RUN_ID" in os.environ else SAME_PRESS):
            _write_at_once("\x1b[?25h\n" if os.isatty(2) else "")  # the progress bar hides the cursor
            os._exit(INTERRUPTED)

    with handled(ask):
        yield asked


def _write_at_once(text: str) -> None:
    """On rank 0's standard error, past Python's buffers, which the signal may have interrupted."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, text.encode())


def open_streams() -> None:
    """Standard streams that were closed at the start lead to the null device.

    Otherwise the next files that are opened get their descriptors, and what a library prints would be written into
    them.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))


def settle(stream: TextIO) -> OSError | None:
    """Flushes a standard stream; returns why it cannot be written, None where it can.

    It then leads to the null device: the interpreter flushes it again at its end, and would change the exit code.
    """
    try:
        stream.flush()
    except OSError as error:
        fd = os.open(os.devnull, os.O_WRONLY)
        os.dup2(fd, stream.fileno())
        os.close(fd)
        return error
    return None


def say(line: str) -> None:
    """A line on standard error, lost where that cannot be written."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


class LogHandler(logging.StreamHandler):
    """Log lines on standard error, lost where that cannot be written."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
