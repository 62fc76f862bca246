"""How long this process has been held, and word of it from before the heavy imports.

Importing torch takes seconds, for which a GPU is held already. A process that is killed in them could not say so:
`starting` therefore keeps a file in the run's folder from the first moments on, until the run's own heartbeat
(budget.py) takes over. What files of processes that are no more say is counted as lost when the run goes on.
Imports nothing heavy.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from pipelines.errors import UserError

STARTING = ".starting-"
EVERY = 0.1  # seconds between words


def _started() -> int | None:
    """Clock ticks from the machine's start to this process's, by the kernel's record; None where there is none."""
    try:
        with open("/proc/self/stat", encoding="ascii") as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def process_seconds() -> float:
    """Seconds since this process was started; 0.0 where nothing records it."""
    ticks = _started()
    if ticks is None:
        return 0.0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def _own(folder: Path) -> Path | None:
    """This process's file: no other process of this machine, or of one started later or elsewhere, has its name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")[:8]
    except OSError:
        return None
    ticks = _started()
    return None if ticks is None else folder / f"{STARTING}{boot}-{os.getpid()}-{ticks}"


@contextmanager
def starting(folder: Path | None) -> Iterator[None]:
    """Inside, a thread keeps in `folder` how many GPU-seconds this process has been held, until `take_over`.

    Of many processes rank 0 speaks for all. A user's mistake leaves nothing behind; any other end leaves the file. A
    folder that cannot be written is the run's to complain about.
    """
    path = _own(folder) if folder is not None and os.environ.get("RANK", "0") == "0" else None
    if folder is None or path is None:
        yield
        return
    world = os.environ.get("WORLD_SIZE", "")
    devices = int(world) if world.isdigit() else 1
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        yield
        return

    def say() -> None:
        with suppress(OSError):  # a full disk
            os.pwrite(fd, f"{devices * process_seconds():<16.6f}".encode("ascii"), 0)  # one length: it is never cut

    end = threading.Event()

    def beat() -> None:
        while not end.wait(EVERY) and os.fstat(fd).st_nlink:
            say()

    with suppress(OSError):  # a file system without locks
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # while this process lives
    say()
    thread = threading.Thread(target=beat, name="std_fast-starting", daemon=True)
    thread.start()
    try:
        yield
    except UserError:
        with suppress(OSError):  # one holds something by now, or is gone
            path.unlink(missing_ok=True)
            for one in new:
                one.rmdir()
        raise
    finally:
        end.set()
        thread.join()
        say()
        os.close(fd)


def _left(folder: Path) -> Iterator[tuple[Path, float]]:
    """Files, and what they say, of processes that were never taken over and are no more."""
    own = _own(folder)
    for path in sorted(folder.glob(f"{STARTING}*")):
        if path == own:
            continue
        try:
            with open(path, "rb") as file:
                if _alive(file):
                    continue
                seconds = float(file.read(16))
        except (OSError, ValueError):  # removed just now, or damaged
            seconds = 0.0
        yield path, seconds


def _alive(file: IO[bytes]) -> bool:
    """Whether the process that wrote it holds it: it is starting now, and will find the run's folder taken."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        pass
    return False


def unheard(folder: Path) -> float:
    """GPU-seconds of processes that died before the run began."""
    return sum(seconds for _, seconds in _left(folder))


def take_over(folder: Path) -> None:
    """The run's heartbeat has begun, and what `unheard` says is in it: the files are removed, this process's too.

    A kill between the heartbeat's first word and this counts some seconds twice; the other order would lose them.
    """
    own = _own(folder)
    for path in [*(path for path, _ in _left(folder)), *([own] if own else [])]:
        with suppress(OSError):
            path.unlink(missing_ok=True)
