"""The processes that read, decode, resize and encode, and the parent's hold on them.

They are plain child processes on a socket each, not multiprocessing's, so that the user's main module is not imported
again (no torch in them, no `if __name__` needed), the death of one is noticed at once and with the image it was at, and
none outlives its parent: each ends when its socket closes. Imports: numpy and PIL only.
"""

from __future__ import annotations

import collections
import hashlib
import mmap
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.errors import UserError, printable
from pipelines.read.image_prep import ConvertSettings, prepare, prepare_cifar
from pipelines.read.turbojpeg import BadImage

SAMPLE_TYPE = np.dtype(
    [("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("size", "<i8"), ("source", "<i8"), ("digest", "V16")]
)
"""One converted sample: its metadata, bytes stored, number in the source's listing, digest of the source's bytes"""
HANG_SECONDS = 120
AHEAD_BYTES = 1 << 29  # results that wait for an earlier one
_BEAT = struct.Struct("<q")
_START = "import sys; from pipelines.convert.workers import work; work(*map(int, sys.argv[1:]))"


class ConvertTask(NamedTuple):
    """Samples to convert, in the order in which they are stored."""

    number: int
    sources: list[int]
    """numbers in the listing"""
    places: list[tuple[int, str, int, int]]
    """see Listing.place"""
    raw: list[bool]
    failed: tuple[str, ...] = ()
    """why an image could not be fetched, "" where it was; () where none had to be"""


class DoneTask(NamedTuple):
    number: int
    samples: npt.NDArray[Any]
    """SAMPLE_TYPE [converted]"""
    payload: bytes
    """their bytes, one after the other"""
    sha256: str
    """of the payload"""
    faults: list[tuple[int, str]]
    """number in the listing, and reason"""
    how: dict[str, int]
    """how many samples were kept, encoded, turned, ..."""


class Workers:
    """A number of processes that convert tasks. A context manager: on leaving it they are gone."""

    def __init__(
        self, count: int, settings: ConvertSettings, files: list[str], is_cifar: bool, names: list[str], folder: str
    ) -> None:
        """files: what the places of tasks refer to.  is_cifar: the images are CIFAR's, not encoded.  names: of the
        listing, for messages.  folder: for their log and their signs of life."""
        self._names = names
        self._beats_file: IO[bytes] = tempfile.TemporaryFile(dir=folder)
        # room that is really there: in a file with holes, on a full disk, the first sign of life would be a SIGBUS
        os.posix_fallocate(self._beats_file.fileno(), 0, _BEAT.size * count)
        self._beats = mmap.mmap(self._beats_file.fileno(), _BEAT.size * count)
        self._log: IO[bytes] = tempfile.TemporaryFile(dir=folder)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        self._seen = [(0, 0.0)] * count  # last sign of life, and when it changed
        self._queues: list[collections.deque[int]] = [collections.deque() for _ in range(count)]
        paths = [path or os.getcwd() for path in sys.path]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        try:
            for index in range(count):
                ours, theirs = socket.socketpair()
                descriptors = (theirs.fileno(), self._beats_file.fileno())
                command = [sys.executable, "-c", _START, *map(str, descriptors), str(index)]
                self._pipes.append(Connection(ours.detach()))
                with theirs:
                    self._processes.append(
                        subprocess.Popen(
                            command,
                            pass_fds=descriptors,
                            env=environment,
                            stdin=subprocess.DEVNULL,
                            stdout=subprocess.DEVNULL,
                            stderr=self._log,
                            start_new_session=True,  # Ctrl-C is the parent's affair
                        )
                    )
            for index in range(count):
                self._send(index, (settings, files, is_cifar))
        except BaseException:
            self.close()
            raise

    def run(self, tasks: Iterable[ConvertTask]) -> Iterator[DoneTask]:
        """The tasks' results, in the tasks' order. Raises UserError when a worker dies or hangs: it names the image."""
        todo = enumerate(tasks)
        ready: dict[int, DoneTask] = {}
        following = 0  # the next result to hand out
        more = True
        while True:
            while more and sum(len(done.payload) for done in ready.values()) < AHEAD_BYTES:
                index = min(range(len(self._pipes)), key=lambda i: len(self._queues[i]))
                if len(self._queues[index]) == 2:  # one at work, one waiting for it
                    break
                item = next(todo, None)
                if item is None:
                    more = False
                    break
                self._send(index, item[1])
                self._queues[index].append(item[0])
                if len(self._queues[index]) == 1:
                    self._seen[index] = (self._beat(index), time.monotonic())
            if not any(self._queues):
                return
            for pipe in wait(self._pipes, timeout=1):
                index = self._pipes.index(pipe)  # type: ignore[arg-type]
                result = self._receive(index)
                ready[self._queues[index].popleft()] = result
            self._check_progress()
            while following in ready:
                yield ready.pop(following)
                following += 1

    def _send(self, index: int, message: Any) -> None:
        try:
            self._pipes[index].send(message)
        except OSError:
            raise self._dead(index) from None

    def _receive(self, index: int) -> DoneTask:
        try:
            result = self._pipes[index].recv()
        except (EOFError, OSError):
            raise self._dead(index) from None
        if isinstance(result, str):
            raise RuntimeError(f"a converting process failed:\n{result}")
        self._seen[index] = (self._beat(index), time.monotonic())  # it may have waited long for us
        return result

    def _beat(self, index: int) -> int:
        return _BEAT.unpack_from(self._beats, _BEAT.size * index)[0]

    def _check_progress(self) -> None:
        now = time.monotonic()
        for index, queue in enumerate(self._queues):
            beat, since = self._seen[index]
            if not queue or beat != self._beat(index):
                self._seen[index] = (self._beat(index), now)
            elif now - since > HANG_SECONDS:
                raise UserError(
                    f"a converting process has made no progress for {HANG_SECONDS} s at {self._at(index)}; look at "
                    "that image and the disk, then run the same command: it continues where it stopped"
                )

    def _at(self, index: int) -> str:
        beat = self._beat(index)
        return printable(self._names[beat - 1]) if beat else "its start"

    def _dead(self, index: int) -> UserError:
        process = self._processes[index]
        try:
            code = process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        way = "run the same command: it continues where it stopped"
        if code == -signal.SIGKILL:
            way = f"if memory was short, use fewer workers; {way}"
        self._log.seek(0)
        last = "".join(f" ({line})" for line in self._log.read().decode("utf-8", "replace").strip().splitlines()[-1:])
        return UserError(f"a converting process {how} at {self._at(index)}{last}; {way}")

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.wait()
        self._beats.close()
        self._beats_file.close()
        self._log.close()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def read_place(path: str, offset: int, size: int, is_file: bool, max_bytes: int) -> bytes:
    """Bytes of one image: of a file that is one (`is_file`), or that holds it. Raises BadImage."""
    if size > max_bytes:
        raise BadImage(f"{size} bytes are more than {max_bytes} (max_bytes)")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe put in its place must not block
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or (is_file and status.st_size != size):
                raise BadImage("the file changed while it was converted")
            data = os.pread(fd, size, offset)
        finally:
            os.close(fd)
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror}") from None
    if len(data) != size:
        raise BadImage("the file became shorter while it was converted")
    return data


def convert_task(task: ConvertTask, settings: ConvertSettings, files: list[str], is_cifar: bool, beat: Any) -> DoneTask:
    """Converts a task's samples one by one; `beat` is called with each one's number in the listing."""
    samples, payloads, faults = [], [], []
    how: collections.Counter[str] = collections.Counter()
    failed = task.failed or [""] * len(task.sources)
    for source, place, raw, reason in zip(task.sources, task.places, task.raw, failed, strict=True):
        beat(source)
        number, name, offset, size = place
        path = os.path.join(files[number], name) if name else files[number]
        try:
            if reason:
                raise BadImage(reason)
            data = read_place(path, offset, size, bool(name), settings.max_bytes)
            made = prepare_cifar(data, settings, raw) if is_cifar else prepare(data, settings, raw)
            if len(made.payload) > settings.page_size:
                raise BadImage(f"{len(made.payload)} bytes do not fit a page of {settings.page_size} (--page-size)")
        except BadImage as error:
            faults.append((source, str(error)))
            continue
        digest = hashlib.sha256(data).digest()[:16]
        samples.append((made.mode, made.width, made.height, len(made.payload), source, digest))
        payloads.append(made.payload)
        how.update(made.how)
    payload = b"".join(payloads)
    sha256 = hashlib.sha256(payload).hexdigest()
    return DoneTask(task.number, np.array(samples, SAMPLE_TYPE), payload, sha256, faults, dict(how))


def work(socket_fd: int, beats_fd: int, index: int) -> None:
    """Runs a converting process until the parent closes its socket."""
    import traceback

    pipe = Connection(socket_fd)
    beats = mmap.mmap(beats_fd, 0)

    def beat(source: int) -> None:
        _BEAT.pack_into(beats, _BEAT.size * index, source + 1)

    try:
        settings, files, is_cifar = pipe.recv()
        while True:
            task = pipe.recv()
            try:
                result: DoneTask | str = convert_task(task, settings, files, is_cifar, beat)
            except Exception:  # a fault of this program: the parent shows it
                result = traceback.format_exc()
            pipe.send(result)
    except (EOFError, ConnectionError):
        return  # the parent is gone, or has no more work
