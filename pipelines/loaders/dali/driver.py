"""The part of DALI's loader that runs in one thread of its own: feeds DALI, runs it and takes its output.

Shapes: B batch (of this shard), S image size, H, W a crop's height and width.
"""

from __future__ import annotations

import gc
import importlib.util
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from pipelines.errors import UserError
from pipelines.loaders.base import assemble, threads_on
from pipelines.loaders.dali.prepare import DaliBatch
from pipelines.loaders.torch import crop_and_resize
from pipelines.read.base import Bytes
from pipelines.read.batch import Batch, LoaderSpec
from pipelines.read.crops import Boxes

_PART = 8  # crops that a thread resizes at a time
Result = TypeVar("Result")
NextBatch = Callable[[], DaliBatch]
"""gives the next batch to feed; raises StopIteration at the end of its epoch"""


class DaliFailure(Exception):
    """DALI's own error, and the batches that it had been given."""

    def __init__(self, error: RuntimeError, batches: list[DaliBatch]) -> None:
        super().__init__(str(error))
        self.batches = batches


class DaliDriver:
    """Owns DALI's pipeline, built at the first epoch. All methods but `submit` and `close` run in its thread.

    One epoch is under way at a time: `begin` ends the one before.
    """

    def __init__(self, spec: LoaderSpec, pool: ThreadPoolExecutor, build: Callable[[Callable[[], Any]], Any]) -> None:
        """pool: threads that resize on a CPU. build: makes the pipeline from the function that feeds it."""
        self.spec, self.pool, self.device = spec, pool, torch.device(spec.device)
        self._build = build
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._resize = _host_resize(spec)
        self._thread = threads_on(self.device, 1, "std_fast-dali")
        self._pipe: Any = None
        self._next: NextBatch | None = None  # None: no epoch is under way
        self._fed: deque[DaliBatch] = deque()

    def submit(self, function: Callable[..., Result], *args: Any) -> Future[Result]:
        """Calls one of the methods below in the driver's thread."""
        return self._thread.submit(function, *args)

    def close(self) -> None:
        self.submit(self.drain).result()
        self._thread.shutdown(wait=True)
        self._pipe = None
        gc.collect()  # a DALI pipeline refers to itself: its memory would stay until some later collection

    # In the driver's thread

    def begin(self, next_batch: NextBatch) -> None:
        """Starts an epoch that is fed from `next_batch`."""
        self.drain()
        if self._pipe is None:
            self._pipe = self._build(self._feed)
            self._pipe.build()
        self._pipe.reset()
        self._next = next_batch

    def end(self, next_batch: NextBatch) -> None:
        """Drains the epoch that is fed from `next_batch`, unless another one has begun."""
        if self._next is next_batch:
            self.drain()

    def drain(self) -> None:
        """Ends the epoch that is under way: lets DALI finish what it was fed, and drops it."""
        self._next = None
        while self._pipe is not None:
            try:
                self._pipe.run()
            except StopIteration:  # DALI notices the end only when it fetches more
                break
            except RuntimeError:  # a corrupt image in a batch that is dropped anyway
                self._pipe = None
        self._fed.clear()

    def make(self, next_batch: NextBatch) -> tuple[Batch, torch.cuda.Event | None]:
        """The next batch and, on a GPU, the event after which it is complete. Raises DaliFailure, and what the batch's
        preparation raised."""
        if self._next is not next_batch:
            raise UserError("this epoch was ended by a later one: with dali, run one at a time")
        try:
            (output,) = self._pipe.run()
        except RuntimeError as error:
            self._pipe = self._next = None  # DALI calls such a pipeline "no longer valid"
            raise DaliFailure(error, list(self._fed)) from error
        batch = self._fed.popleft()
        if batch.error is not None:
            raise batch.error
        if self._stream is None:
            return assemble(self._on_host(batch, output), torch.from_numpy(batch.keys), batch.slots), None
        with torch.cuda.stream(self._stream):
            images = torch.empty(self._shape(batch), dtype=torch.uint8, device=self.device)
            count = batch.slots.count
            images[:count].copy_(torch.from_dlpack(output.as_tensor())[:count])
            _add_odd(images, batch)
            keys = torch.from_numpy(batch.keys).pin_memory().to(self.device, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record(self._stream)
        ready.synchronize()  # then DALI may have its output back; no other thread waits for this one
        return assemble(images, keys, batch.slots), ready

    def _feed(self) -> tuple[list[Bytes], Boxes, Boxes]:
        """DALI's source: the next batch's bytes, box corners and box sizes. Raises StopIteration at the epoch's end."""
        if self._next is None:
            raise StopIteration
        batch = self._next()
        self._fed.append(batch)
        return batch.data, np.ascontiguousarray(batch.boxes[:, :2]), np.ascontiguousarray(batch.boxes[:, 2:])

    def _shape(self, batch: DaliBatch) -> tuple[int, int, int, int]:
        return len(batch.slots.indices), self.spec.image_size, self.spec.image_size, 3

    def _on_host(self, batch: DaliBatch, output: Any) -> torch.Tensor:
        """Images [B, S, S, 3] from DALI's crops of a batch, resized by the pool's threads."""
        images = torch.from_numpy(np.empty(self._shape(batch), np.uint8))  # numpy's memory: it asks for huge pages
        rows = [
            (np.asarray(output.at(row)), images[row].numpy())
            for row in range(batch.slots.count)
            if row not in batch.odd
        ]
        parts = [rows[start : start + _PART] for start in range(0, len(rows), _PART)]
        for _ in self.pool.map(lambda part: [self._resize(*row) for row in part], parts):
            pass
        _add_odd(images, batch)
        return images


def _add_odd(images: torch.Tensor, batch: DaliBatch) -> None:
    """Writes into images [B, S, S, 3] the rows that do not come from DALI."""
    images[batch.slots.count :] = 0
    for row, pixels in batch.odd.items():
        images[row].copy_(torch.from_numpy(pixels))


def _host_resize(spec: LoaderSpec) -> Callable[[npt.NDArray[np.uint8], npt.NDArray[np.uint8]], None]:
    """A function that resizes a crop [H, W, 3] into [S, S, 3]: compiled where numba is installed, else torch's."""
    if importlib.util.find_spec("numba") is not None:
        from pipelines.loaders import native

        cubic = spec.resample == "bicubic"

        def compiled(crop: npt.NDArray[np.uint8], out: npt.NDArray[np.uint8]) -> None:
            height, width, _ = crop.shape
            flat = out.reshape(out.shape[0], -1)
            native.resample(crop.reshape(-1), 3 * width, 0, 0, height, width, flat, cubic)

        return compiled

    def by_torch(crop: npt.NDArray[np.uint8], out: npt.NDArray[np.uint8]) -> None:
        box = np.array([0, 0, *crop.shape[:2]])
        out[:] = crop_and_resize(crop, box, spec.image_size, spec.resample)

    return by_torch
