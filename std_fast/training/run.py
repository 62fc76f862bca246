"""The training loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, nullcontext

from std_fast.config.recipe import Duration, Recipe
from std_fast.runtime.budget import Clock, Ledger, StepsInFlight
from std_fast.runtime.compiling import compile_time
from std_fast.runtime.distributed import SINGLE_PROCESS, RankSync, World
from std_fast.runtime.trace import open_trace
from std_fast.runtime.trackers import check_trackers
from std_fast.training.build import build, resolved
from std_fast.training.evaluator import Evaluator
from std_fast.training.micro_batch import micro_batch_of
from std_fast.training.not_finite import NonFiniteMonitor, NotFinite
from std_fast.training.run_folder import RunFolder
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
        """signals: received so far; the caller appends to it. already: see `train`."""
        self.recipe, self.world, self.signals = resolved(recipe), world, signals
        check_trackers(recipe.run.trackers)
        self.ledger = Ledger(world.size, already=already)
        self.step, self.stop_wanted = 0, False
        self.folder = RunFolder(self.recipe, world, self.ledger, resume)
        with ExitStack() as stack:
            stack.callback(lambda: self.folder.close(self.step))
            self._build(stack, quiet)
            self.close = stack.pop_all().close

    def _build(self, stack: ExitStack, quiet: bool) -> None:
        recipe, world, folder, ledger = self.recipe, self.world, self.folder, self.ledger
        self.parts = parts = build(folder.pinned(recipe), world, ledger, folder.check_data)
        stack.callback(parts.close)
        self.trainer, self.stream, loader = parts.trainer, parts.stream, parts.train_loader
        meta = folder.restore(parts.state, parts.val_loader)
        self.step, self.complete = meta.get("step", 0), meta.get("complete", False)
        self.trainer.micro_batch = micro_batch_of(recipe, world, meta.get("micro_batch", 0))
        length, batch = Duration.parse(recipe.run.length, "run.length"), recipe.run.batch
        self.clock = Clock(length, loader.steps_per_epoch, batch, ledger, meta.get("costs", {}))
        self.schedule = build_schedule(recipe, self.clock, loader.steps_per_epoch, world)
        steps, watch = recipe.run.profile if world.main else "", self.stream.watch
        self.trace = open_trace(steps, folder.path, parts.device, watch, self.step, self.clock.steps)
        stack.callback(self.trace.close)
        self.ranks = RankSync(world)
        self.in_flight = StepsInFlight(parts.device, limited=self.clock.hours is not None)
        folder.write_recipe()
        evaluates = self.finished or meta.get("evaluation_pending", False)
        self.log = RunLog(recipe, folder.path, parts, self.clock, ledger, world, self.step, quiet, evaluates)
        stack.callback(self.log.close)
        snapshots = self.schedule.snapshot_every > 0
        self.monitor = NonFiniteMonitor(recipe.run, self.trainer.guard, parts.state, self.log, meta, snapshots)
        how = recipe.distill.predict
        self.evaluator = Evaluator(parts, how, self.clock, ledger, self.log, self.sync_ranks, world, meta)

    def loop(self, on_step: Callable[[Run], None] | None = None) -> None:
        """Trains to the end. `on_step` is called after each step. Raises Stopped and NotFinite, see `train`."""
        with compile_time(self.ledger) if self.parts.backend else nullcontext(), closing(self.stream):
            self._start()
            while not self.finished:
                now = self.schedule.at(self.step + 1)
                self.trace.begin_step(now.step)
                batch = next(self.stream)
                self.trainer.step(batch, now)
                self.step = now.step
                self.in_flight.limit()
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

                stop = self.sync_ranks() or self.evaluator.pending
                if stop:
                    self._check_finite()  # a bad step must not be saved as the last
                if now.last or stop or (now.save and self.world.main and not self.monitor.frozen()):
                    self.save(complete=now.last)
                if stop and (self.evaluator.pending or not now.last):
                    raise Stopped(f"stopped at step {self.step}, saved in {self.folder.path}; continue with --resume")

    def _start(self) -> None:
        """What comes before the first step."""
        self.evaluator.start(self.step, self.finished)
        if self.evaluator.pending:
            raise Stopped(f"stopped in an evaluation; continue {self.folder.path} with --resume")
        if not self.finished:
            self.clock.start(self.world)
            self.stream.seek(self.step)
            self.ledger.switch("train")
            self.log.start()

    @property
    def finished(self) -> bool:
        return self.complete or self.clock.done(self.step)

    def _check_finite(self) -> None:
        """After a rollback the run is at the bad step, with the weights of the snapshot.

        Raises:
            NotFinite: after saving the state before the bad step.
        """
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
        """Whether any rank was asked to stop; all ranks also get rank 0's share of a budget (see `RankSync`)."""
        self.clock.cost("checkpoint", self.folder.save_seconds)
        stop, self.clock.share = self.ranks(self.stop_wanted or bool(self.signals), self.clock.read())
        return stop

    def save(self, complete: bool = False) -> None:
        """A checkpoint of this moment; the file is written by another thread."""
        self.schedule.saved()
        if self.world.main:
            meta = {"complete": complete, "costs": self.clock.costs, "micro_batch": self.trainer.micro_batch.size}
            self.folder.save(self.step, self.parts.state, meta | self.evaluator.meta() | self.monitor.meta())
