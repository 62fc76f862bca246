"""Untrusted files, read with bounds: regular files only, no more bytes than a reader expects, and third-party native
parsers in a child process.

A crafted file can make a parser allocate all memory, run for ever, or crash (scipy's reader of .mat files does). In a
child process with limits it does no other harm, and the user gets an error of one line.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

from pipelines.errors import UserError

MAX_JSON = 1 << 26  # bytes; the manifest of a dataset with a million faults is smaller
MEMORY = 4 << 30  # limit of a confined reader, bytes
SECONDS = 600  # limit of its processor time


class Refused(Exception):
    """A confined reader failed on a file; the message is the reason."""


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a file for reading. Raises OSError for anything but a regular file: reading a pipe
    would block for ever."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file")
    return file


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """A regular file of at most so many bytes. Raises OSError, also for a larger one."""
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"more than {most} bytes, which no such file needs")
    return data


def read_json(path: str | os.PathLike[str]) -> Any:
    """The document in a JSON file. Raises OSError, and ValueError for text that is not JSON or nested too deeply."""
    try:
        return json.loads(read_bytes(path, MAX_JSON).decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def confined(function: Callable[..., Any], *args: Any, memory: int = MEMORY, seconds: int = SECONDS) -> Any:
    """`function(*args)` in a child process with limited memory and processor time. Arguments and result are JSON.

    function: a module's, under its own name there.
    Raises Refused with the reason when it raises, crashes or needs more; UserError or OSError when it raises one.
    """
    call = {"module": function.__module__, "function": function.__name__, "args": args, "limits": [memory, seconds]}
    # -c and not -m: the module is imported under its own name, once
    command = [sys.executable, "-c", "from pipelines.untrusted import _child; _child()"]
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment = os.environ | {"PYTHONPATH": paths, "ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        command,
        input=json.dumps(call).encode(),
        capture_output=True,
        env=environment,
        start_new_session=True,  # Ctrl-C is the parent's affair: it may wait for the file
    )
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        limit = f": it took more than {seconds} s" if -child.returncode in (signal.SIGXCPU, signal.SIGKILL) else ""
        raise Refused(f"reading it ended with {name}{limit}")
    try:
        reply = json.loads(child.stdout)
    except ValueError:
        last = child.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise Refused(f"reading it ended with exit code {child.returncode} {' '.join(last)}") from None
    if "errno" in reply:
        raise OSError(reply["errno"], os.strerror(reply["errno"]))
    if "mistake" in reply:
        raise UserError(reply["mistake"])
    if "refused" in reply:
        raise Refused(reply["refused"])
    return reply["result"]


def _child() -> None:
    """Main function of the child process: reads the call from standard input, writes the reply to standard output."""
    import importlib

    call = json.loads(sys.stdin.buffer.read())
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print goes to standard error
    memory, seconds = call["limits"]
    function = getattr(importlib.import_module(call["module"]), call["function"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    reply: dict[str, Any]
    try:
        reply = {"result": function(*call["args"])}
    except UserError as error:
        reply = {"mistake": str(error)}
    except MemoryError:
        reply = {"refused": f"it needs more than {memory >> 20} MiB of memory"}
    except Exception as error:  # third-party parsers raise errors of many kinds
        number = getattr(error, "errno", None)
        reply = {"refused": f"{type(error).__name__}: {error}"} if number is None else {"errno": number}
    with output:
        output.write(json.dumps(reply).encode())
