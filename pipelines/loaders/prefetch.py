"""Batches made ahead of their use by a pool of threads: the common part of the ffcv and the torch backend.

Each batch is cut into parts of a few samples that any thread may take, so that threads never wait for each other at
the end of a batch, only for the consumer. At most `ahead` batches are in the making beyond the one in use: with the
decoder's workspace (one largest image per thread) this bounds the memory.

Shapes: B batch (of this shard), S image size.
"""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Generator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from pipelines.errors import DataError
from pipelines.loaders.base import LoaderBase, assemble, threads_on
from pipelines.read.base import Integers, Source
from pipelines.read.batch import Batch, BatchSlots, LoaderSpec


@dataclass
class PendingBatch:
    """One batch that threads are filling."""

    slots: BatchSlots
    images: npt.NDArray[np.uint8]
    """[B, S, S, 3]"""
    host: torch.Tensor
    """the same memory; pinned for a GPU"""
    parts: list[Future[None]] = field(default_factory=list)
    parts_left: int = 0
    """not yet done"""
    encoded: dict[int, torch.Tensor] = field(default_factory=dict)
    """rows that `_decode_together` fills, and their bytes, uint8 [number of bytes]"""
    batch: Batch | None = None
    ready: torch.cuda.Event | None = None
    """on a GPU: recorded after the copy"""


class ThreadedLoader(LoaderBase):
    """A loader whose samples are decoded by a pool of threads; a backend implements `_decode`.

    The pool's threads live from construction to `close`, idle between epochs. A part that fails makes the step that it
    belongs to raise its error; the steps before it are delivered. On a GPU each finished batch is copied from pinned
    memory in a stream of the loader's own.
    """

    def __init__(self, spec: LoaderSpec, source: Source) -> None:
        super().__init__(spec, source)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._pool = threads_on(self.device, self.threads, "std_fast-loader")
        self._lock = threading.Lock()
        # A folder's images must be opened to learn their sizes, so threads do it; a beton lists all sizes.
        self._sizes_known = source.kind == "beton"

    @abstractmethod
    def _decode(self, pending: PendingBatch, start: int, stop: int) -> None:
        """Fills images[start:stop] from the boxes of these rows: zero where there is no sample, the substitute for a
        corrupt one. Runs in a thread of the pool. Raises DataError with the sample's name.
        """

    def _decode_together(self, pending: PendingBatch, images: torch.Tensor) -> None:
        """For backends whose `_decode` leaves rows in `pending.encoded`: fills them in images [B, S, S, 3], which is on
        the device, in its current stream. Raises DataError with the sample's name.
        """
        raise NotImplementedError

    def _run(self, epoch: int, start_step: int) -> Generator[Batch]:
        order = self.sampler.order(epoch)
        steps = iter(range(start_step, self.steps_per_epoch))
        queue: deque[PendingBatch] = deque()

        def fill_up(count: int) -> None:
            while len(queue) < count and (step := next(steps, None)) is not None:
                queue.append(self._start(self._slots(order, epoch, step)))

        try:
            while True:
                self._check_open()
                fill_up(self.spec.ahead)
                if not queue:
                    return
                started = time.perf_counter()
                wait(queue[0].parts, return_when=FIRST_EXCEPTION)
                self.wait_seconds += time.perf_counter() - started
                self._check_open()
                for part in queue[0].parts:
                    if part.done():
                        part.result()
                fill_up(self.spec.ahead + 1)  # before the consumer goes to work
                yield self._take(queue.popleft())  # no name here keeps the batch alive
        finally:
            # Not waiting for cancelled parts: after `close` no thread would mark them as done.
            wait([part for pending in queue for part in pending.parts if not part.cancel()])

    def _take(self, pending: PendingBatch) -> Batch:
        assert pending.batch is not None
        return self._deliver(pending.batch, pending.ready)

    def _start(self, slots: BatchSlots) -> PendingBatch:
        """Allocates a batch and gives its parts to the pool."""
        count = slots.count
        shape = (len(slots.indices), self.spec.image_size, self.spec.image_size, 3)
        if self._stream is None:
            images = np.empty(shape, np.uint8)  # numpy's memory, not torch's: numpy asks for huge pages
            host = torch.from_numpy(images)
        else:
            host = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            images = host.numpy()
        images[count:] = 0
        pending = PendingBatch(slots, images, host)
        if self._sizes_known:
            self.tracker.measure(slots, 0, count)
        size = min(max(-(-count // (4 * self.threads)), 4), 32)
        cuts = [*range(0, count, size), count] if count else [0, 0]
        pending.parts_left = len(cuts) - 1
        pending.parts = [
            self._pool.submit(self._fill_part, pending, *cut) for cut in zip(cuts[:-1], cuts[1:], strict=True)
        ]
        return pending

    # In the pool's threads

    def _fill_part(self, pending: PendingBatch, start: int, stop: int) -> None:
        if self._closed:
            return
        try:
            if not self._sizes_known:
                self.tracker.measure(pending.slots, start, stop)
            self._decode(pending, start, stop)
            with self._lock:
                pending.parts_left -= 1
                last = pending.parts_left == 0
            if last:
                self._finish(pending)
        except DataError as error:
            self.fault = error
            raise

    def _finish(self, pending: PendingBatch) -> None:
        """Makes the batch of filled memory; on a GPU, starts its copy. Runs in the thread that filled the last part."""
        keys = pending.slots.keys(self.source.labels)
        if self._stream is None:
            self._assemble(pending, pending.host, keys)
            return
        with torch.cuda.stream(self._stream):
            # Pinned memory belongs to torch's allocator, which does not hand it out again before the copy is done.
            images = pending.host.to(self.device, non_blocking=True)
            self._assemble(pending, images, keys)
            pending.ready = torch.cuda.Event()
            pending.ready.record(self._stream)

    def _assemble(self, pending: PendingBatch, images: torch.Tensor, keys: Integers) -> None:
        on_device = self._copy_to_device(keys)
        if pending.encoded:
            self._decode_together(pending, images)
        pending.batch = assemble(images, on_device, pending.slots)

    def close(self) -> None:
        super().close()
        self._pool.shutdown(wait=True)
