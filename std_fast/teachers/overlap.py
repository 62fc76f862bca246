"""From raw batches to batches with the teacher targets, on a GPU while the student learns from the batch before.

The teachers need nothing from the student, so that their targets to batch t+1 can be made on a stream of their own
while the student learns from batch t. What crosses the streams, and why it is right:

- A preparation begins, on the side stream, when all is done that the student's stream had been given before it: what
  it reads (weights, tables, a dataset on the device) is there, and it is never more than one batch ahead.
- The student's stream waits for the event at the end of the preparation before it gets the batch.
- Memory that the side stream or the loader's made, and the student reads, is marked as used by the student's stream
  (`record_stream`), so that it is not given away before the student is done, however early the host forgets it.
- Host code runs in one thread, and nothing in a preparation draws from torch's random state or is changed by a step, so
  that both orders give the same bits, as far as the kernels do.

Beside the other, each of the two is slower; whether together they are faster depends on the models: see `Trial`.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields

import torch
from torch import Tensor

from pipelines.augment.device import Augment, TrainBatch
from pipelines.read.batch import Batch
from std_fast.method.losses import TeacherTargets
from std_fast.runtime.speed import Stopwatch
from std_fast.teachers.teacher import Teachers

log = logging.getLogger("std_fast")
Pair = tuple[TrainBatch, TeacherTargets | None]


class Trial:
    """Takes some steps in each way, in turn, and then says which was faster; both give the same bits.

    After `WARM` steps (compilation, choice of kernels) two blocks of each kind are timed by events, and the medians
    compared, so that a save or an evaluation in between does not decide. The host never waits for it.
    """

    WARM, BLOCK, ROUNDS = 10, 12, 2
    WORTH = 0.99  # a gain below 1 % is noise, and memory is spent for it

    def __init__(self) -> None:
        self.plan = [False] * self.WARM + ([False] * self.BLOCK + [True] * self.BLOCK) * self.ROUNDS
        self.marks: list[torch.cuda.Event] = []
        self.choice: bool | None = None

    def ahead(self) -> bool:
        """Whether this step's successor shall be prepared beside it. Ask once a step, on the student's stream."""
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
        """Milliseconds of the planned steps -> whether working side by side is worth it; says so in the log."""
        known = list(zip(self.plan, times, strict=True))[self.WARM :]
        serial, beside = (statistics.median(ms for way, ms in known if way is kind) for kind in (False, True))
        gain = 100 * (serial / beside - 1)
        worth = beside < self.WORTH * serial
        what = "teachers beside the student" if worth else "run.overlap falls back to serial"
        log.info("overlap: %.2f ms a step in turn, %.2f ms side by side (%+.1f %%): %s", serial, beside, gain, what)
        return worth


class Overlap:
    """How a run orders teachers and student.

    Args:
        mode: "off"; "on"; or "auto", which tries both.
        device: a CPU has no streams: there they always take turns.
        watch: gets the time of a preparation's parts on steps for which it is armed.
    """

    def __init__(self, mode: str, device: torch.device, watch: Stopwatch | None = None) -> None:
        self.watch = watch or Stopwatch(device)
        on_gpu = device.type == "cuda"
        if mode == "on" and not on_gpu:
            log.info("run.overlap: on has no effect on a CPU; teachers and student take turns")
        self.stream = torch.cuda.Stream(device) if on_gpu and mode != "off" else None
        self.trial = Trial() if self.stream is not None and mode == "auto" else None

    def pairs(self, batches: Iterable[Batch], prepare: Callable[[Batch], Pair]) -> Iterator[Pair]:
        """Prepared batches, in order; each preparation is given to the device before the step before it, or after."""
        side = self.stream
        assert side is not None
        source = iter(batches)

        def start() -> tuple[Pair, torch.cuda.Event] | None:
            side.wait_stream(torch.cuda.current_stream(side.device))
            with torch.cuda.stream(side):  # the loader's copies too are waited for by this stream
                batch = next(source, None)
                if batch is None:
                    return None
                pair = prepare(batch)
                ready = torch.cuda.Event()
                ready.record(side)
            return pair, ready

        coming = start()
        while coming is not None:
            pair, ready = coming
            main = torch.cuda.current_stream(side.device)
            main.wait_event(ready)
            for tensor in tensors_of(pair):
                tensor.record_stream(main)
            ahead = self.trial is None or self.trial.ahead()
            coming = start() if ahead else None
            yield pair
            if not ahead:
                coming = start()


def tensors_of(pair: Pair) -> list[Tensor]:
    """Everything on the device that a step gets."""
    mixed, targets = pair
    values = [getattr(mixed, field.name) for field in fields(mixed)] + list(targets or ())
    return [value for value in values if isinstance(value, Tensor)]


def taught(
    batches: Iterable[Batch],
    augment: Augment,
    teachers: Teachers | None,
    autocast: Callable,
    overlap: Overlap | None = None,
) -> Iterator[Pair]:
    """Augments each batch and asks the teachers, who see exactly the images that the student will see.

    Without `overlap` (or where it has no effect) batch t+1 is touched only after the caller asks for it. With it, the
    loader is one batch further than the caller, who may stop at any time: what was prepared is then dropped.
    """
    watch = Stopwatch(torch.device("cpu")) if overlap is None else overlap.watch

    @torch.no_grad()
    def prepare(batch: Batch) -> Pair:
        began = watch.now()
        mixed = augment(batch)
        augmented = watch.now()
        if teachers is None:
            watch.note(augment=(began, augmented))
            return mixed, None
        with autocast():
            targets = teachers(mixed.images)
        watch.note(augment=(began, augmented), teacher=(augmented, watch.now()))
        return mixed, targets

    if overlap is None or overlap.stream is None or teachers is None:
        for batch in batches:
            yield prepare(batch)
    else:
        yield from overlap.pairs(batches, prepare)
