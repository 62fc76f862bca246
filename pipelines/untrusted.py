"""Files from elsewhere, read with bounds: regular files only, no more bytes than a reader expects, and other people's
native parsers in a process of their own.

A crafted file may make a parser ask for all memory, never end, or crash (scipy's reader of .mat files does). What such
a file can reach is then a child process with limits, and the user gets one line.
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

MAX_JSON = 1 << 26  # bytes: the manifest of a dataset with a million faults has fewer
MEMORY = 4 << 30  # of a confined reader, bytes
SECONDS = 600  # of processor time, likewise


class Refused(Exception):
    """A confined reader did not get through a file; the message says why."""


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a file for reading. Raises OSError for what is no regular file: a pipe would keep us waiting for ever."""
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
    """The document in a JSON file. Raises OSError, and ValueError for one that is none or nested too deeply."""
    try:
        return json.loads(read_bytes(path, MAX_JSON).decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def confined(function: Callable[..., Any], *args: Any, memory: int = MEMORY, seconds: int = SECONDS) -> Any:
    """`function(*args)` in a child process that has so much memory and processor time. Arguments and result are JSON.

    function: of a module, under its own name there.
    Raises Refused with the reason when it raises, crashes or needs more; UserError or OSError when it raises one.
    """
    call = {"module": function.__module__, "function": function.__name__, "args": args, "limits": [memory, seconds]}
    # -c and not -m: the module is imported under its own name, once
    command = [sys.executable, "-c", "from pipelines.untrusted import _child; _child()"]
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment = os.environ | {"PYTHONPATH": paths, "ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(command, input=json.dumps(call).encode(), capture_output=True, env=environment)
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        limit = f": it took more than {seconds} s" if -child.returncode in (signal.SIGXCPU, signal.SIGKILL) else ""
        raise Refused(f"reading it ended with {name}{limit}")
    try:
        answer = json.loads(child.stdout)
    except ValueError:
        last = child.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise Refused(f"reading it ended with exit code {child.returncode} {' '.join(last)}") from None
    if "errno" in answer:
        raise OSError(answer["errno"], os.strerror(answer["errno"]))
    if "mistake" in answer:
        raise UserError(answer["mistake"])
    if "refused" in answer:
        raise Refused(answer["refused"])
    return answer["result"]


def _child() -> None:
    """The whole life of a confined reader: the call comes by standard input, the answer goes to standard output."""
    import importlib

    call = json.loads(sys.stdin.buffer.read())
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    memory, seconds = call["limits"]
    function = getattr(importlib.import_module(call["module"]), call["function"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    answer: dict[str, Any]
    try:
        answer = {"result": function(*call["args"])}
    except UserError as error:
        answer = {"mistake": str(error)}
    except MemoryError:
        answer = {"refused": f"it needs more than {memory >> 20} MiB of memory"}
    except Exception as error:  # the libraries' errors are of many kinds
        number = getattr(error, "errno", None)
        answer = {"refused": f"{type(error).__name__}: {error}"} if number is None else {"errno": number}
    with answers:
        answers.write(json.dumps(answer).encode())
