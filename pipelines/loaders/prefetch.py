"""Batches made ahead of their use by threads: the part that the ffcv and the torch backend share.

Each batch is cut into parts of a few samples that any thread may take, so that threads never wait for each other at
the end of a batch, only for the consumer. At most `ahead` batches are in the making beyond the one in use: with the
decoder's scratch (one largest image per thread) this bounds the memory.

Shapes: B batch (of this shard), S image size.
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipelines.errors import UserError
from pipelines.read.batch import Batch, LoaderSpec
from pipelines.read.corrupt import CorruptTracker
from pipelines.read.crops import Boxes
from pipelines.read.order import indices_at
from pipelines.read.source import Integers, Source


def available_cores() -> int:
    """Cores for this process: those it may run on, shared with the other processes that torchrun started here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@dataclass
class Job:
    """One batch in the making. Places past the end (position -1) come last."""

    epoch: int
    step: int
    positions: Integers
    indices: Integers
    images: npt.NDArray[np.uint8]
    """[B, S, S, 3], to be filled"""
    host: torch.Tensor
    """the same memory"""
    count: int
    """places before the end"""
    heights: Integers
    widths: Integers
    boxes: Boxes
    """of the stored images [count], int32 [count, 4]"""
    parts: list[Future[None]] = field(default_factory=list)
    left: int = 0
    """parts not yet done"""
    encoded: dict[int, torch.Tensor] = field(default_factory=dict)
    """rows that are left to `_complete`, and their bytes, uint8 [number of bytes]"""
    batch: Batch | None = None
    ready: torch.cuda.Event | None = None
    """on a GPU: the copy is done"""


class ThreadedLoader(ABC):
    """A `batch.Loader` whose samples are decoded by a pool of threads; backends say how (`_decode`).

    The pool's threads live from the first epoch to `close`, idle between epochs. A part that fails makes the step that
    it belongs to raise its error; steps before it are delivered. On a GPU each finished batch is copied from pinned
    memory on a stream of its own; the consumer's stream, that is the one current when a batch is taken, waits for it on
    the device, and the batch's memory is marked as used by that stream.
    """

    def __init__(self, spec: LoaderSpec, source: Source) -> None:
        self.spec = spec
        self.source = source
        self.plan = spec.plan(source.num_samples)
        self.num_classes = source.num_classes
        self.steps_per_epoch = self.plan.steps_per_epoch
        self.wait_seconds = 0.0
        self.threads = spec.threads or available_cores()
        self.device = torch.device(spec.device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(self.threads, thread_name_prefix="std_fast-loader")
        self._lock = threading.Lock()
        # A folder's images must be opened to know their sizes: work for the threads. Otherwise a whole batch at a time.
        self._sizes_known = source.kind == "beton"
        self.intact = CorruptTracker(spec, source)
        self.corrupt = self.intact.found

    @abstractmethod
    def _decode(self, job: Job, start: int, stop: int) -> None:
        """Fills job.images[start:stop] from the boxes of these samples: zero where there is none, another for a corrupt
        one. Runs in a thread of the pool. Raises DataError with the sample's name.
        """

    def _complete(self, job: Job, images: torch.Tensor) -> None:
        """For backends whose `_decode` leaves some rows in job.encoded: fills them in images [B, S, S, 3], which is on
        the device, in its current stream. Raises DataError with the sample's name.
        """
        raise NotImplementedError

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """See `batch.Loader`. Raises UserError when `start_step` lies outside the epoch or the loader is closed."""
        if self._pool is None:
            raise UserError("this loader is closed: open another one")
        if not 0 <= start_step <= self.steps_per_epoch:
            raise UserError(f"start_step {start_step} must lie in 0..{self.steps_per_epoch}")
        return self._run(self._pool, epoch, start_step)

    def _run(self, pool: ThreadPoolExecutor, epoch: int, start_step: int) -> Iterator[Batch]:
        order = self.plan.order(epoch)
        steps = iter(range(start_step, self.steps_per_epoch))
        jobs: deque[Job] = deque()

        def fill_up(count: int) -> None:
            while len(jobs) < count and (step := next(steps, None)) is not None:
                jobs.append(self._start(pool, order, epoch, step))

        try:
            while True:
                fill_up(self.spec.ahead)
                if not jobs:
                    return
                started = time.perf_counter()
                wait(jobs[0].parts, return_when=FIRST_EXCEPTION)
                self.wait_seconds += time.perf_counter() - started
                if self._pool is None:
                    raise UserError("this loader was closed in the middle of an epoch: close it after the last batch")
                for part in jobs[0].parts:
                    if part.done():
                        part.result()
                fill_up(self.spec.ahead + 1)  # before the consumer goes to work
                yield self._deliver(jobs.popleft())  # no name here keeps the batch alive
        finally:
            # Not waiting for what was cancelled: after `close` nobody would tell.
            wait([part for job in jobs for part in job.parts if not part.cancel()])

    def _start(self, pool: ThreadPoolExecutor, order: Integers, epoch: int, step: int) -> Job:
        positions = self.plan.positions(step)
        indices = self.intact.settle(indices_at(order, positions))
        count = int((positions >= 0).sum())
        shape = (len(indices), self.spec.image_size, self.spec.image_size, 3)
        if self._stream is None:
            images = np.empty(shape, np.uint8)  # numpy's, not torch's: it asks for huge pages
            host = torch.from_numpy(images)
        else:
            host = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            images = host.numpy()
        images[count:] = 0
        sides = np.empty(count, np.int64)
        job = Job(
            epoch, step, positions, indices, images, host, count, sides, sides.copy(), np.empty((count, 4), np.int32)
        )
        if self._sizes_known:
            self.intact.measure(job, 0, count)
        size = min(max(-(-count // (4 * self.threads)), 4), 32)
        cuts = [*range(0, count, size), count] if count else [0, 0]
        job.left = len(cuts) - 1
        job.parts = [pool.submit(self._part, job, *cut) for cut in zip(cuts[:-1], cuts[1:], strict=True)]
        return job

    def _part(self, job: Job, start: int, stop: int) -> None:
        if self._pool is None:  # closed meanwhile
            return
        if not self._sizes_known:
            self.intact.measure(job, start, stop)
        self._decode(job, start, stop)
        with self._lock:
            job.left -= 1
            last = job.left == 0
        if last:
            self._finish(job)

    def _finish(self, job: Job) -> None:
        """Makes the batch of a filled job; on a GPU, starts its copy. Runs in the thread that filled the last part."""
        empty = job.indices < 0
        labels = np.where(empty, -1, self.source.labels[job.indices])
        keys = torch.from_numpy(np.stack([labels, np.where(empty, -1, job.positions)]))
        images = job.host
        if self._stream is None:
            if job.encoded:
                self._complete(job, images)
        else:
            with torch.cuda.stream(self._stream):
                # The pinned memory is torch's: its allocator does not hand it out again before the copy is done.
                images = images.to(self.device, non_blocking=True)
                keys = keys.pin_memory().to(self.device, non_blocking=True)
                if job.encoded:
                    self._complete(job, images)
                job.ready = torch.cuda.Event()
                job.ready.record(self._stream)
        job.batch = Batch(images.permute(0, 3, 1, 2), keys[0], keys[1], job.indices, job.epoch, job.step)

    def _deliver(self, job: Job) -> Batch:
        assert job.batch is not None
        if job.ready is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(job.ready)
            for tensor in (job.batch.images, job.batch.labels):  # positions share the memory of labels
                tensor.record_stream(stream)
        return job.batch

    def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True)

    def __enter__(self) -> ThreadedLoader:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()
