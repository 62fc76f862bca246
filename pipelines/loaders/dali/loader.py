"""The part of DALI's loader that runs in the consumer's thread: queues steps, waits for batches, delivers them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pipelines.errors import DataError
from pipelines.loaders.base import LoaderBase
from pipelines.loaders.dali.driver import DaliDriver, DaliFailure
from pipelines.loaders.dali.pipeline import import_dali, make_pipeline
from pipelines.loaders.dali.prepare import DaliBatch, Preparer
from pipelines.read.base import Source
from pipelines.read.batch import Batch, LoaderSpec
from pipelines.read.decode import decode_rgb


class DaliLoader(LoaderBase):
    """A `batch.Loader` on NVIDIA DALI 2. Raises UserError when DALI is missing.

    hw_decoder_load None counts as 0 here: `sweep.best_load` finds a better value. One epoch at a time: a new one ends
    the epoch that is under way.
    """

    backend = "dali"

    def __init__(self, spec: LoaderSpec, source: Source) -> None:
        super().__init__(spec, source)
        import_dali()
        spec = replace(spec, resample=self.resample)
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="std_fast-loader")
        self._preparer = Preparer(spec, source, self.tracker)
        self._driver = DaliDriver(spec, self._pool, self._make_pipeline)

    def _make_pipeline(self, feed: Callable[[], Any]) -> Any:
        largest = (0, 0)
        if self.source.kind == "beton":  # a folder's images would have to be opened for it
            heights, widths = self.source.sizes(np.arange(self.source.num_samples))
            largest = (int(heights.max()), int(widths.max()))
        return make_pipeline(feed, self.spec, self.sampler.local_batch, self.threads, largest)

    def _run(self, epoch: int, start_step: int) -> Generator[Batch]:
        order = self.sampler.order(epoch)
        steps = iter(range(start_step, self.steps_per_epoch))
        prepared: deque[Future[DaliBatch]] = deque()
        batches: deque[Future[tuple[Batch, torch.cuda.Event | None]]] = deque()

        def next_batch() -> DaliBatch:
            """Called by DALI, in the driver's thread."""
            while len(prepared) <= self.spec.ahead and (step := next(steps, None)) is not None:
                slots = self._slots(order, epoch, step)
                prepared.append(self._pool.submit(self._preparer.prepare, slots))
            if not prepared:
                raise StopIteration
            return prepared.popleft().result()

        self._check_open()
        self._driver.submit(self._driver.begin, next_batch).result()
        try:
            for step in range(start_step, self.steps_per_epoch):
                self._check_open()
                while len(batches) <= min(self.spec.ahead, self.steps_per_epoch - 1 - step):
                    batches.append(self._driver.submit(self._driver.make, next_batch))
                started = time.perf_counter()
                wait([batches[0]])
                self.wait_seconds += time.perf_counter() - started
                yield self._take(batches.popleft())
        finally:
            wait([future for future in batches if not future.cancel()])
            wait([future for future in prepared if not future.cancel()])
            if not self._closed:
                self._driver.submit(self._driver.end, next_batch).result()

    def _take(self, future: Future[tuple[Batch, torch.cuda.Event | None]]) -> Batch:
        try:
            return self._deliver(*future.result())
        except DaliFailure as error:
            raise self._explained(error) from error

    def _explained(self, failure: DaliFailure) -> DataError:
        """The error of the sample that made DALI fail, found by decoding those that it had been given."""
        for batch in failure.batches:
            for index in batch.slots.indices[batch.slots.indices >= 0].tolist():
                try:
                    decode_rgb(self.source, index)
                except DataError as error:
                    return error
        lines = [line.strip() for line in str(failure).splitlines() if "nvImageCodec" in line or "rror" in line]
        steps = ", ".join(str(batch.slots.step) for batch in failure.batches)
        reason = lines[-1] if lines else failure
        return DataError(
            f"{self.source.path}: DALI failed in one of the steps {steps} ({reason}), but every image there decodes on "
            "the host; choose backend ffcv or torch"
        )

    def close(self) -> None:
        if self._closed:
            return
        super().close()
        self._driver.close()
        self._pool.shutdown(wait=True)
