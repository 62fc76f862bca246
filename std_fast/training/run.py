"""The training loop."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from std_fast.config.recipe import Duration, Recipe, parse_seconds
from std_fast.runtime.budget import Clock, Ledger, Pace, in_words
from std_fast.runtime.compiling import compile_time
from std_fast.runtime.distributed import SINGLE_PROCESS, Agreement, World, init_distributed
from std_fast.runtime.memory import out_of_memory_line, ran_out
from std_fast.runtime.process import stop_on_signal
from std_fast.runtime.trace import open_trace
from std_fast.runtime.trackers import check_trackers
from std_fast.training.build import build, resolved, uses_gpu
from std_fast.training.evaluate import Abandoned
from std_fast.training.evaluator import Evaluator
from std_fast.training.micro_batch import micro_batch_of
from std_fast.training.not_finite import NonFiniteMonitor, NotFinite
from std_fast.training.run_folder import RunFolder, locked
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
                monitor.check()             # waits for the device; a step that was not finite: roll back or end
            if now.log:       log.train()
            if now.snapshot:  monitor.take_snapshot()
            if now.evaluate:  evaluator()
            agree()                         # with the other ranks: whether to stop, the share of a budget that is spent
            if now.save:      save()

    Every rank runs it; only rank 0 writes files.

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
        self.step = 0
        self.complete = False  # whether the checkpoint that the run was resumed from is of a finished run
        self.evaluation_pending = False  # an evaluation was abandoned, and is still to be done
        self.stop_wanted = False
        self.folder = RunFolder(self.recipe, world, self.ledger, resume)
        self._closing = ExitStack()
        self._closing.callback(lambda: self.folder.close(self.step))
        try:
            self._build(quiet)
        except BaseException:
            self.close()
            raise

    def _build(self, quiet: bool) -> None:
        recipe, run, world = self.recipe, self.recipe.run, self.world
        self.parts = parts = build(self.folder.pinned(recipe), world, self.ledger, self.folder.check_data)
        parts.recipe = recipe
        self._closing.callback(parts.close)
        self.trainer, self.stream = parts.trainer, parts.stream
        self.per_epoch = parts.train_loader.steps_per_epoch
        self.clock = Clock(Duration.parse(run.length, "run.length"), self.per_epoch, run.batch, self.ledger)
        self.folder.add_validation(parts.val_loader)
        meta = self._restore() if self.folder.found is not None else {}
        self.schedule = build_schedule(recipe, self.clock, self.per_epoch, world)
        self.trace = open_trace(run.profile, self.folder.path, parts.device, parts.stream.watch) if world.main else None
        if self.trace is not None:
            self._closing.callback(self.trace.close)
        self.agreement = Agreement(world)
        self.pace = Pace() if parts.device.type == "cuda" and self.clock.hours else None
        self.folder.write_recipe()
        self.log = RunLog(self.folder.path, parts, self.clock, self.ledger, world, self.step, run.batch, quiet)
        self._closing.callback(self.log.close)
        snapshots, best = self.schedule.snapshot_every > 0, meta.get("best", {})
        self.monitor = NonFiniteMonitor(run, self.trainer.guard, parts.state, self.log, meta, snapshots)
        self.evaluator = Evaluator(parts, self.clock, self.ledger, self.log, self.agree, world, best)
        if not self.clock.hours or "checkpoint" in self.clock.costs:  # else the first save of a budget is made early,
            self.schedule.saved_at = time.perf_counter()  # so that the cost of the last one is known

    def _restore(self) -> dict[str, Any]:
        """Continues from the checkpoint that was found; returns its metadata."""
        meta = self.folder.restore(self.parts.state)
        self.step, self.clock.costs = meta["step"], dict(meta.get("costs", {}))
        self.complete = meta.get("complete", False)
        self.evaluation_pending = meta.get("evaluation_pending", False)
        self.trainer.micro_batch = micro_batch_of(self.recipe, self.world, meta.get("micro_batch", 0))
        return meta

    def loop(self, on_step: Callable[[Run], None] | None = None) -> dict[str, float]:
        """Trains to the end; returns the last evaluation. `on_step` is called after each step."""
        try:
            with compile_time(self.ledger) if self.parts.backend else nullcontext():
                result = self._start()
                if not self._finished():
                    result = self._loop(on_step)
                return result
        finally:
            self.stream.close()

    def _loop(self, on_step: Callable[[Run], None] | None) -> dict[str, float]:
        result: dict[str, float] = {}
        while not self.clock.done(self.step):
            now = self.schedule.at(self.step + 1)
            if self.trace is not None:
                self.trace.begin_step(now.step)
            batch = next(self.stream)
            self.trainer.step(batch, now)
            self.step = now.step
            if self.pace is not None:
                self.pace()
            self.log.update(self.step)

            if (now.log or now.evaluate or now.snapshot) and self._rolled_back() and not self.clock.done(self.step):
                continue
            if now.log:
                self.log.train(self.step, now, len(self.monitor.steps))
            if now.snapshot:
                self.monitor.take_snapshot(self.step)
            if now.evaluate:
                self.evaluation_pending = True
                with suppress(Abandoned):
                    result, self.evaluation_pending = self.evaluator(self.step), False
            if on_step is not None:
                on_step(self)

            stop = self.agree() or self.evaluation_pending
            if stop:
                self._rolled_back()  # a bad step must not be saved as the last
            if now.last or stop or (now.save and self.world.main and not self.monitor.frozen()):
                self.save(complete=now.last)
            if stop and (self.evaluation_pending or not now.last):
                raise Stopped(f"stopped at step {self.step}, saved in {self.folder.path}; continue with --resume")
        return result

    def _start(self) -> dict[str, float]:
        """What comes before the first step; returns the evaluation of a run that has no step left."""
        result: dict[str, float] = {}
        try:
            if self.evaluation_pending or self._finished():
                result, self.evaluation_pending = self.evaluator(self.step), False
            if self._finished():
                return result
            if self.clock.hours and "evaluate" not in self.clock.costs:
                self.evaluator.time_evaluation(self.step)
        except Abandoned:
            raise Stopped(f"stopped in an evaluation; continue {self.folder.path} with --resume") from None
        self.clock.share = self.world.broadcast(self._read_clock())
        if self.clock.share >= 1:
            length, spent = self.recipe.run.length, in_words(self.ledger.read())
            log.warning("run.length: %s are spent before the first step (%s): there will be one", length, spent)
        self.stream.seek(self.step)
        self.ledger.switch("train")
        self.log.start()
        return result

    def _finished(self) -> bool:
        return self.complete or self.clock.done(self.step)

    def _rolled_back(self) -> bool:
        """Whether the monitor rolled back: the run is then at an earlier state, and the next batch behind the bad one.

        Raises:
            NotFinite: after saving the state before the bad step.
        """
        try:
            step = self.monitor.check()
        except NotFinite as error:
            self.step = error.step - 1
            self.save()
            self.folder.writer.wait()
            raise
        if step is None:
            return False
        self.step = step
        self.stream.seek(step)
        return True

    def agree(self) -> bool:
        """Whether any rank was asked to stop; all ranks also get rank 0's share of a budget (see `Agreement`)."""
        stop, self.clock.share = self.agreement(self.stop_wanted or bool(self.signals), self._read_clock())
        return stop

    def _read_clock(self) -> float:
        if self.folder.save_seconds is not None:
            self.clock.cost("checkpoint", self.folder.save_seconds)
        return self.clock.read()

    def save(self, complete: bool = False) -> None:
        """A checkpoint of this moment; the file is written by another thread."""
        self.schedule.saved_at = time.perf_counter()
        if not self.world.main:
            return
        meta = {
            "best": self.evaluator.best,
            "costs": self.clock.costs,
            "complete": complete,
            "evaluation_pending": self.evaluation_pending,
            "micro_batch": self.trainer.micro_batch.size,
            **self.monitor.meta(),
        }
        self.folder.save(self.step, self.parts.state, meta)

    def close(self) -> None:
        """Closes everything that the run holds, and records how long it was held."""
        self._closing.close()


def finish(run: Run, result: dict[str, float]) -> dict[str, Any]:
    """Waits for the last checkpoint and writes `summary.json`; returns it."""
    with run.ledger.during("checkpoint"):
        run.folder.writer.wait()
    return run.log.summary(run.step, result, run.evaluator.best, run.monitor.steps)


def train(
    recipe: Recipe,
    resume: bool = False,
    quiet: bool = False,
    on_step: Callable[[Run], None] | None = None,
    already: float = 0.0,
) -> dict[str, Any]:
    """Trains a recipe to its end; returns the summary that is also written to the run's folder.

    Args:
        resume: continue from the newest complete checkpoint of the run's folder, if it has one.
        quiet: no progress on standard error.
        on_step: called after each step; it may set `run.stop_wanted`.
        already: seconds that count as held before the call. The command line passes those since its process started;
            a process that trains many runs leaves it at 0.

    Raises:
        UserError: something that the user can fix, a batch too large for the memory too.
        Stopped: SIGTERM, SIGUSR1, SIGINT (Ctrl-C), SIGHUP or `stop_wanted`; the run is saved.
        NotFinite: a loss or gradient was not finite, and the recipe says to stop; the state before it is saved.
        PeerLost: started by torchrun, and another process has died or hangs.
    """
    limit = parse_seconds(recipe.run.timeout, "run.timeout")
    with init_distributed(uses_gpu(recipe.run.device), limit) as world, locked(Path(resolved(recipe).run.out), world):
        try:
            return _train(recipe, resume, quiet, world, on_step, already)
        except OSError as error:  # those of data and target cache are UserErrors already
            out = Path(resolved(recipe).run.out)
            what = f"{os.fsdecode(error.filename or out)}: {error.strerror or error}"
            raise UserError(f"{out}: the run cannot be written ({what}); fix that and resume") from error
        except Exception as error:
            if not ran_out(error):
                raise
            line = out_of_memory_line(error, recipe.run.batch, recipe.run.micro_batch)
        raise UserError(line)  # outside of `except`: the error is forgotten, and with it the memory its frames hold


def _train(
    recipe: Recipe, resume: bool, quiet: bool, world: World, on_step: Callable[[Run], None] | None, already: float
) -> dict[str, Any]:
    with stop_on_signal() as asked:  # to the end: a second signal must not cut the save short
        run = Run(recipe, resume, quiet, world, asked, already)
        try:
            return finish(run, run.loop(on_step))
        except (Stopped, NotFinite):  # all ranks alike: they stay until rank 0 has saved, or torchrun would end it
            run.folder.writer.wait()
            world.wait_for_all()
            raise
        finally:
            try:
                run.folder.writer.wait()
            finally:
                run.close()
