"""What every loader does in the same way: construction, the checks of `epoch`, delivery to the consumer, closing.

Shapes: B batch (of this shard), S image size.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import torch

from pipelines.errors import DataError, UserError
from pipelines.read.base import Integers, Source
from pipelines.read.batch import Batch, BatchSlots, LoaderSpec
from pipelines.read.corrupt import CorruptTracker
from pipelines.read.settings import Resample


def available_cores() -> int:
    """Cores for this process: those it may run on, shared with the other processes that torchrun started here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // process_count("LOCAL_WORLD_SIZE"))


def process_count(variable: str) -> int:
    """The number of processes in a variable that torchrun sets, 1 without it. UserError where it is none."""
    value = os.environ.get(variable, "1")
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"{variable}: {value!r} in the environment is no number of processes; unset it")
    return int(value)


def threads_on(device: torch.device, count: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads work on this device.

    CUDA's current device is each thread's own, and GPU 0 in a new one: threads of a process whose GPU is another would
    come back to GPU 0 after each `torch.cuda.stream`, and take memory there for a context of their process.
    """
    if device.type == "cpu":
        return ThreadPoolExecutor(count, name)
    index = torch.cuda.current_device() if device.index is None else device.index
    return ThreadPoolExecutor(count, name, torch.cuda.set_device, (index,))


class LoaderBase(ABC):
    """A `batch.Loader`. A backend implements `_run`, and extends `close` where it holds threads or memory.

    Raises UserError for a resample that the backend lacks.
    """

    backend: str
    """its name in `data.backend`"""
    resamples: ClassVar[tuple[Resample, ...]] = ("bilinear", "bicubic")
    """values of `resample` that the backend offers; `auto` is the first of them"""

    def __init__(self, spec: LoaderSpec, source: Source) -> None:
        self.resample: Resample = self.resamples[0] if spec.resample == "auto" else spec.resample
        if self.resample not in self.resamples:
            raise UserError(
                f"data.resample: {spec.resample!r} is not in the {self.backend} backend; "
                f"choose one of auto, {', '.join(self.resamples)}"
            )
        self.spec = spec
        self.source = source
        self.sampler = spec.sampler(source.num_samples)
        self.num_classes = source.num_classes
        self.steps_per_epoch = self.sampler.steps_per_epoch
        self.wait_seconds = 0.0
        self.fault: DataError | None = None
        self.threads = spec.threads or available_cores()
        self.device = torch.device(spec.device)
        self.tracker = CorruptTracker(spec, source)
        self.corrupt = self.tracker.corrupt
        self._closed = False

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Batch]:
        """See `batch.Loader`. Raises UserError when `start_step` lies outside the epoch or the loader is closed."""
        if self._closed:
            raise UserError("this loader is closed: open another one")
        if not 0 <= start_step <= self.steps_per_epoch:
            raise UserError(f"start_step {start_step} must lie in 0..{self.steps_per_epoch}")
        return self._run(epoch, start_step)

    @abstractmethod
    def _run(self, epoch: int, start_step: int) -> Generator[Batch]:
        """The generator behind `epoch`."""

    def _check_open(self) -> None:
        if self._closed:
            raise UserError("this loader was closed in the middle of an epoch: close it after the last batch")

    def _slots(self, order: Integers, epoch: int, step: int) -> BatchSlots:
        """The rows of a step, corrupt samples that are known already replaced."""
        slots = BatchSlots.at(self.sampler, order, epoch, step)
        slots.indices = self.tracker.replace_known(slots.indices)
        return slots

    def _copy_to_device(self, values: Integers) -> torch.Tensor:
        """Numbers from the host; on a GPU a copy from pinned memory in the current stream, without waiting."""
        host = torch.from_numpy(values)
        return host if self.device.type == "cpu" else host.pin_memory().to(self.device, non_blocking=True)

    def _deliver(self, batch: Batch, ready: torch.cuda.Event | None) -> Batch:
        """Hands a batch to the consumer. On a GPU the consumer's stream, that is the one current now, waits on the
        device for `ready`, and the batch's memory is marked as used by that stream."""
        if ready is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(ready)
            for tensor in (batch.images, batch.labels):  # positions share the memory of labels
                tensor.record_stream(stream)
        return batch

    def close(self) -> None:
        self._closed = True

    def __enter__(self) -> LoaderBase:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()


def assemble(images: torch.Tensor, keys: torch.Tensor, slots: BatchSlots) -> Batch:
    """A batch from images uint8 [B, S, S, 3] and keys int64 [2, B] (see `BatchSlots.keys`), both on the device."""
    return Batch(images.permute(0, 3, 1, 2), keys[0], keys[1], slots.indices, slots.epoch, slots.step)
