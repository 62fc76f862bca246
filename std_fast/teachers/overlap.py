"""Preparing the next batch on a stream of its own, beside the step: on a GPU.

Augmentation and teachers need nothing from the student, so the targets of batch t+1 can be computed while the student
trains on batch t. Why that is correct:

- A preparation starts, on the side stream, after everything that the student's stream was given before it: what it
  reads (weights, tables, a dataset on the device) is there, and it is never more than one batch ahead.
- The student's stream waits for the event at the end of the preparation before it gets the batch.
- Memory that the side stream or the loader's allocated, and the student reads, is marked as used by the student's
  stream (`record_stream`), so that it is not reused before the student is done, however early the host frees it.
- Host code runs in one thread, and nothing in a preparation draws from torch's random state or is changed by a step,
  so both orders give the same bits, as far as the kernels do.

Side by side each of the two is slower; whether together they are faster depends on the models: see `Trial`.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor

from pipelines.augment.device import TrainBatch

log = logging.getLogger("std_fast")


class Trial:
    """Runs some steps serially and some side by side, and chooses the faster; both give the same bits.

    After `WARM` steps (compilation, choice of kernels) two blocks of each kind are timed by events, and the medians
    are compared, so that a save or an evaluation in between does not decide. The host never waits for it.
    """

    WARM, BLOCK, ROUNDS = 10, 12, 2
    WORTH = 0.99  # a gain below 1 % is noise, and memory is spent for it

    def __init__(self) -> None:
        self.plan = [False] * self.WARM + ([False] * self.BLOCK + [True] * self.BLOCK) * self.ROUNDS
        self.marks: list[torch.cuda.Event] = []
        self.choice: bool | None = None

    def ahead(self) -> bool:
        """Whether the next batch is prepared beside this step. Call once a step, on the student's stream."""
        if self.choice is not None:
            return self.choice
        if len(self.marks) <= len(self.plan):
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
            self.marks.append(mark)
        if len(self.marks) <= len(self.plan):
            return self.plan[len(self.marks) - 1]
        if self.marks[-1].query():
            times = [one.elapsed_time(two) for one, two in zip(self.marks[:-1], self.marks[1:], strict=True)]
            self.choice = self.decide(times)
            self.marks.clear()
        return False

    def decide(self, times: list[float]) -> bool:
        """Milliseconds of the planned steps -> whether side by side is faster; logs the choice."""
        known = list(zip(self.plan, times, strict=True))[self.WARM :]
        serial, beside = (statistics.median(ms for way, ms in known if way is kind) for kind in (False, True))
        gain = 100 * (serial / beside - 1)
        worth = beside < self.WORTH * serial
        what = "teachers beside the student" if worth else "run.overlap falls back to serial"
        log.info("overlap: %.2f ms a step in turn, %.2f ms side by side (%+.1f %%): %s", serial, beside, gain, what)
        return worth


class Prepared(NamedTuple):
    """A batch, and the event after which its tensors are there; None: they are on the student's stream."""

    batch: TrainBatch
    ready: torch.cuda.Event | None = None


class Overlap:
    """On which stream batches are prepared, and whether before or after the step before.

    Args:
        mode: "off"; "on"; or "auto", which measures both.
        device: a CPU has no streams: there a batch is always prepared after the step.
    """

    def __init__(self, mode: str, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        if mode == "on" and not on_gpu:
            log.info("run.overlap: on has no effect on a CPU; teachers and student take turns")
        self.stream = torch.cuda.Stream(device) if on_gpu and mode != "off" else None
        self.trial = Trial() if self.stream is not None and mode == "auto" else None

    def prepare(self, make: Callable[[], TrainBatch]) -> Prepared:
        """What `make` returns, computed on the side stream where there is one."""
        side = self.stream
        if side is None:
            return Prepared(make())
        side.wait_stream(torch.cuda.current_stream(side.device))
        with torch.cuda.stream(side):  # the loader's copies too are waited for by this stream
            batch = make()
            ready = torch.cuda.Event()
            ready.record(side)
        return Prepared(batch, ready)

    def receive(self, prepared: Prepared) -> TrainBatch:
        """The batch, which the current stream may use from here on."""
        if prepared.ready is not None and self.stream is not None:
            main = torch.cuda.current_stream(self.stream.device)
            main.wait_event(prepared.ready)
            for tensor in tensors_of(prepared.batch):
                tensor.record_stream(main)
        return prepared.batch

    def ahead(self) -> bool:
        """Whether the next batch is prepared before the step that is about to start. Call once a step."""
        if self.stream is None:
            return False
        ahead = self.trial is None or self.trial.ahead()
        if self.trial is not None and self.trial.choice is False:
            self.stream = None  # nothing is under way on it; in turn, on one stream, the two use the same memory
        return ahead


def tensors_of(batch: TrainBatch) -> list[Tensor]:
    """Everything on the device that a step gets."""
    values = [getattr(batch, field.name) for field in fields(batch)]
    return [value for value in (*values, *(batch.targets or ())) if isinstance(value, Tensor)]
