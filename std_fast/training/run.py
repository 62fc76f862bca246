"""The training loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from pipelines.errors import CorruptImage, DataError
from std_fast.config.recipe import Duration, Recipe
from std_fast.runtime.budget import Clock, Ledger
from std_fast.runtime.compiling import compile_time
from std_fast.runtime.distributed import SINGLE_PROCESS, RankSync, World
from std_fast.runtime.folder_lock import FolderLock
from std_fast.runtime.trackers import check_trackers
from std_fast.training.build import build, resolved
from std_fast.training.evaluator import Evaluator
from std_fast.training.existing import complete_line, finished
from std_fast.training.not_finite import NonFiniteMonitor, NotFinite
from std_fast.training.run_folder import Complete, RunFolder
from std_fast.training.run_log import RunLog
from std_fast.training.schedule import build_schedule

log = logging.getLogger("std_fast")


class Stopped(Exception):
    """The run was asked to stop; everything is saved, and it can be resumed."""


class Run:
    """One training run. `loop` is:

        while not clock.done(step):
            now = schedule.at(step + 1)     # learning rates, MINE, image size, what is due after the step
            batch = next(stream)            # read, augmented, with the teacher targets
            trainer.step(batch, now)        # forward, loss, backward, clip, optimizer, EMA
            if now.log, now.evaluate or now.snapshot:
                check_finite()              # waits for the device; a step that was not finite: roll back or end
            if now.log:       log.train()
            if now.snapshot:  monitor.take_snapshot()
            if now.evaluate:  evaluator()
            sync_ranks()                    # whether to stop; the share of a budget that is spent
            if now.save:      save()

    Every rank runs it; only rank 0 writes files. `train` adds the process group, signals and error messages.

    Attributes:
        step: steps done.
        stop_wanted: set it to save and stop after the present step.
        parts: what the loop drives, see `build`.
    """

    def __init__(
        self,
        recipe: Recipe,
        resume: bool = False,
        quiet: bool = False,
        world: World = SINGLE_PROCESS,
        signals: Sequence[int] = (),
        already: float = 0.0,
    ) -> None:
        """signals: received so far; the caller appends to it. already: see `train`. Raises Complete."""
        self.recipe = recipe = resolved(recipe)
        check_trackers(recipe.run.trackers)
        self.world, self.signals, self.step, self.stop_wanted, self.agreed = world, signals, 0, False, False
        self.ledger = ledger = Ledger(world.size, already=already)
        summary = finished(recipe, Path(recipe.run.out)) if resume and world.main else None
        if (summary := world.broadcast(summary)) is not None:
            raise Complete(summary)
        with ExitStack() as stack:
            lock = stack.enter_context(closing(FolderLock(Path(recipe.run.out)))) if world.main else None
            self.folder = folder = RunFolder(recipe, world, ledger, resume, lock)
            stack.push(lambda kind, error, _: folder.close(self.step, error))
            self.parts = parts = build(folder.pinned(recipe), world, ledger, folder.check_data)
            stack.callback(parts.close)
            self.trainer, self.stream, epoch = parts.trainer, parts.stream, parts.train_loader.steps_per_epoch
            meta = folder.restore(parts.state, parts.val_loader)
            self.step, self.complete = meta["step"], meta["complete"]
            self.trainer.micro_batch.resume(meta["micro_batch"])
            self.clock = Clock(Duration.parse(recipe.run.length), epoch, recipe.run.batch, ledger, meta["costs"])
            self.schedule = build_schedule(recipe, self.clock, epoch, world)
            self.ranks = RankSync(world)
            evaluated = parts.val_loader is None or (self.complete and meta["result"])
            deferred = meta["evaluation_pending"] or (self.finished and not evaluated)
            if self.finished and not deferred and (summary := folder.stored_summary(self.step)) is not None:
                folder.keep()
                raise Complete(summary)
            folder.begin()
            self.log = RunLog(recipe, folder, parts, self.clock, world, self.step, quiet, deferred)
            stack.callback(self.log.close)
            self.monitor = NonFiniteMonitor(recipe.run, self.trainer.guard, parts.state, self.log, meta)
            self.evaluator = Evaluator(parts, self.clock, self.log, self.sync_ranks, world, deferred, meta)
            self._stack = stack.pop_all()

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def loop(self, on_step: Callable[[Run], None] | None = None) -> None:
        """Trains to the end. `on_step` is called after each step. Raises Stopped and NotFinite, see `train`."""
        compiling = compile_time(self.ledger) if self.parts.backend else nullcontext()
        with compiling, closing(self.stream), self._saved_if_data_fails():
            self._start()
            while not self.finished:
                now = self.schedule.at(self.step + 1)
                self.log.begin_step(now.step)
                batch = next(self.stream)
                self.trainer.step(batch, now)
                self.step = now.step
                self.clock.limit_steps_ahead(self.parts.device)
                self.log.update(self.step)

                if now.log or now.evaluate or now.snapshot:
                    self._check_finite()
                    if self.step < now.step and not self.finished:
                        continue  # rolled back: what is due comes after the repeated steps
                if now.log:
                    self.log.train(self.step, now, len(self.monitor.steps))
                if now.snapshot:
                    self.monitor.take_snapshot(self.step)
                if now.evaluate:
                    self.evaluator(self.step)
                if on_step is not None:
                    on_step(self)

                stop = self.sync_ranks()
                if stop:
                    self._check_finite()  # a bad step must not be saved as the last
                if now.last or stop or (now.save and self.world.main and not self.monitor.frozen()):
                    self.save(complete=now.last)
                if stop and (self.evaluator.deferred or not now.last):
                    if fault := self.world.first(self.parts.train_loader.fault):
                        self.agreed = True
                        raise fault
                    raise Stopped(f"stopped at step {self.step}, saved in {self.folder.path}; continue with --resume")

    @contextmanager
    def _saved_if_data_fails(self) -> Iterator[None]:
        """Inside, where data cannot be read, what has been trained is saved, and the error says so.

        Of many ranks all stop before the step, where a loader met the error two steps ahead (`sync_ranks`). Otherwise
        rank 0 saves at its own, and cannot at another's: it already waits for that rank's gradients of the step.
        """
        try:
            yield
        except DataError as error:
            if not self.step:
                raise
            saved = f"step {self.step} is saved, from which the run"
            if not (self.world.main or self.agreed):
                saved = f"steps since the newest checkpoint (run.save_every {self.recipe.run.save_every}) are lost: it"
            elif self.step != self.folder.saved_step:
                self._check_finite()
                self.save()
            if self.agreed:  # torchrun ends them all with the first
                self.folder.writer.wait()
                self.world.wait_for_all()
            way = " --data.on_corrupt skip, the file as it is" if isinstance(error, CorruptImage) else ""
            raise DataError(f"{error}; {saved} continues with --resume{way}") from error

    def _start(self) -> None:
        """What comes before the first step."""
        deferred = self.evaluator.deferred
        self.evaluator.start(self.step, self.finished)
        if self.evaluator.deferred:
            raise Stopped(f"stopped in an evaluation; continue {self.folder.path} with --resume")
        if self.finished and deferred:
            self.save(complete=True)  # with the evaluation's result
        elif self.finished:
            self.log.progress.say(complete_line(self.folder.path))
        else:
            self.clock.start(self.world)
            self.stream.seek(self.step)
            self.ledger.switch("train")
            self.log.begin(self.step)

    @property
    def finished(self) -> bool:
        return self.complete or self.clock.done(self.step)

    def _check_finite(self) -> None:
        """Where a step was not finite: saves the state before it and ends the run, or continues after a rollback."""
        try:
            rolled_back_at = self.monitor.check()
        except NotFinite as error:
            self.step = error.step - 1
            self.save()
            raise
        if rolled_back_at is not None:
            self.step = rolled_back_at
            self.stream.seek(self.step)

    def sync_ranks(self) -> bool:
        """Whether any rank was asked to stop, or its data will fail; all ranks also get rank 0's share of a budget (see
        `RankSync`)."""
        self.clock.cost("checkpoint", self.folder.save_seconds)
        # near the end what was read ahead may never be needed
        near_end = self.clock.steps is not None and self.step + self.recipe.data.ahead >= self.clock.steps
        fails = self.world.size > 1 and not near_end and self.parts.train_loader.fault is not None
        stop, self.clock.share = self.ranks(self.stop_wanted or bool(self.signals) or fails, self.clock.read())
        return stop

    def save(self, complete: bool = False) -> None:
        """A checkpoint of this moment; the file is written by another thread."""
        self.schedule.saved()
        if self.world.main:
            meta = {"complete": complete, "costs": self.clock.costs, "micro_batch": self.trainer.micro_batch.size}
            self.folder.save(self.step, self.parts.state, meta | self.evaluator.meta() | self.monitor.meta())
