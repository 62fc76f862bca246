"""The training loop."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from pipelines.augment.device import TrainBatch
from pipelines.errors import UserError
from pipelines.files import write_atomic
from std_fast.config.recipe import Duration, Recipe, dump, parse_seconds, unkept_durations
from std_fast.method.losses import TeacherTargets
from std_fast.method.student import smaller
from std_fast.runtime.budget import Clock, Ledger, Pace, Timed, in_words, process_seconds, productive_seconds
from std_fast.runtime.compiling import counted
from std_fast.runtime.distributed import SINGLE_PROCESS, Agreement, World, init_distributed
from std_fast.runtime.memory import out_of_memory_line, ran_out
from std_fast.runtime.metrics import Journal, Progress
from std_fast.runtime.speed import peak_memory, speed_in_words
from std_fast.teachers.overlap import taught
from std_fast.teachers.teacher import Teachers
from std_fast.training.build import Parts, build, resolved, uses_gpu
from std_fast.training.evaluate import Abandoned, evaluate
from std_fast.training.not_finite import NonFiniteMonitor, NotFinite
from std_fast.training.optim import peak_learning_rate, schedule
from std_fast.training.run_folder import RunFolder, locked, versions

log = logging.getLogger("std_fast")


class Stopped(Exception):
    """The run was asked to stop; all that it had learned is saved, and it can be resumed."""


class Run:
    """A training run: its folder, what it is made of, and how far it is. Of many processes only rank 0 writes files."""

    def __init__(
        self,
        recipe: Recipe,
        resume: bool = False,
        quiet: bool = False,
        world: World = SINGLE_PROCESS,
        asked: Sequence[int] = (),
    ) -> None:
        self.recipe, self.world = resolved(recipe), world
        recipe = self.recipe
        self.ledger = Ledger(world.size, already=process_seconds())
        self.step = 0
        self.complete = False  # whether the checkpoint that the run goes on from is of its end
        self.evaluation_pending = False  # a run that was stopped in an evaluation begins with it
        self.best: dict[str, float] = {}
        self._batches: Generator[tuple[TrainBatch, TeacherTargets | None], None, None]
        self.stop_wanted, self.asked = False, asked  # by whoever drives the run; by signals
        self.early_until = recipe.student.early_share if recipe.student.early_size else 0.0  # share of the training
        self.folder = RunFolder(recipe, world, self.ledger, resume)
        self._closing = ExitStack()
        self._closing.callback(lambda: self.folder.close(self.step))
        try:
            self._build(quiet)
        except BaseException:
            self.close()
            raise

    def _build(self, quiet: bool) -> None:
        recipe, world = self.recipe, self.world
        self.parts: Parts = build(recipe, world)
        self._closing.callback(self.parts.close)
        self.per_epoch = self.parts.train_loader.steps_per_epoch
        self.clock = Clock(recipe, self.per_epoch, self.ledger)
        for line in unkept_durations(recipe, self.per_epoch) if world.main else ():
            log.warning(line)
        meta: dict[str, Any] = {}
        if self.folder.found is not None:
            meta = self.folder.restore(self.parts.trainer)
            self.step, self.best = meta["step"], meta["best"]
            self.complete, self.clock.costs = meta.get("complete", False), dict(meta.get("costs", {}))
            self.evaluation_pending = meta.get("evaluation_pending", False)
        self.agree = Agreement(world)
        on_gpu, teachers = self.parts.device.type == "cuda", self.parts.teachers
        self.pace = Pace() if on_gpu and self.clock.hours else None
        self.teachers = Timed(teachers, "teacher", self.ledger, on_gpu) if teachers is not None else None
        self.journal: Journal | None = None
        if world.main:
            write_atomic(self.folder.path / "recipe.yaml", dump(recipe))
            self.journal = Journal(self.folder.path, self.step)
            self._closing.callback(self.journal.close)
        what, total, unit = ("hour", self.clock.hours, "GPU-h") if self.clock.hours else ("step", self.clock.steps, "")
        self.progress = Progress(what, total or 0, unit, quiet or not world.main)
        self._closing.callback(self.progress.close)
        self._logged = self.ledger.read()  # at the last line of the log
        # the first save of a budget is made early, so that the cost of the last one is known
        save_now = self.clock.hours and "checkpoint" not in self.clock.costs
        self._saved_at = -float("inf") if save_now else time.perf_counter()
        self._save_every = parse_seconds(recipe.run.save_every, "run.save_every")
        self._eval_every = self._steps_between(recipe.run.eval_every)
        self._mine_every = max(1, self._steps_between(recipe.distill.mine.every))
        snapshot_every = 0
        if recipe.run.not_finite == "rollback":
            snapshot_every = max(1, self._steps_between(recipe.run.rollback_every))
        folder = self.folder.path if world.main else None
        self.bad = NonFiniteMonitor(recipe, self.parts.trainer, self.parts.train_loader, meta, snapshot_every, folder)

    # -- how far --------------------------------------------------------------------------------------------------

    @property
    def samples(self) -> int:
        return self.step * self.recipe.run.batch

    def _steps_between(self, text: str) -> int:
        return Duration.parse(text).steps(self.per_epoch, self.recipe.run.batch)

    def save(self, complete: bool = False) -> None:
        """A checkpoint of this moment; the file is written by another thread."""
        self._saved_at = time.perf_counter()
        if not self.world.main:
            return
        loader = self.parts.train_loader
        meta = {
            "best": self.best,
            "costs": self.clock.costs,
            "complete": complete,
            "evaluation_pending": self.evaluation_pending,
            **self.bad.meta(),
            "num_classes": loader.num_classes,
            "class_names": loader.source.class_names,
        }
        self.folder.save(self.step, self.parts.trainer, meta)

    # -- log and evaluation ---------------------------------------------------------------------------------------

    def log_line(self, lr: float) -> None:
        """Reads the meters (the only wait for the device) and writes a record."""
        meters = self.parts.trainer.meters
        steps, figures = meters.steps, meters.read()
        if self.teachers is not None:
            self.teachers.settle()
        before, self._logged = self._logged, self.ledger.read()
        busy = productive_seconds(self._logged) - productive_seconds(before)
        images = steps * self.recipe.run.batch
        speed = self.parts.speed.read(images, busy, busy / max(steps, 1), self._logged["data"] - before["data"])
        rate = images / busy
        seconds = {part: round(value, 3) for part, value in self._logged.items()}
        faults = {name: count for name, count in self._faults().items() if count}
        record = {"lr": lr, "images_per_second": round(rate, 1), **figures, **faults, **speed, "seconds": seconds}
        self._record("train", self._where() | record)
        text = (
            f"loss {figures.get('loss', float('nan')):.4f}  lr {lr:.2e}  {rate:.0f} images/s  {speed_in_words(speed)}"
        )
        self.progress.note(self._done_amount(), text)

    def _faults(self) -> dict[str, int]:
        """What was passed over so far. Corrupt images are those of this process, each rank's own added up."""
        corrupt = torch.tensor(len(self.parts.train_loader.corrupt), device=self.parts.device)
        return {"bad_steps": len(self.bad.steps), "corrupt_images": int(self.world.sum(corrupt))}

    def rolled_back(self) -> bool:
        """Waits for the device, and does what the recipe says about steps that were not finite: all ranks alike.

        Returns:
            Whether the run is now at an earlier state, and behind the bad batch.

        Raises:
            NotFinite: after saving the state before the bad step.
        """
        step = self.bad.check(self.on_bad_step, self._save_at)
        if step is None:
            return False
        self.step = step
        self._batches.close()
        self._batches = self.batches()
        return True

    def on_bad_step(self, step: int, text: str) -> None:
        self.progress.say(text)
        self._record("not_finite", self._where(step) | {"bad_steps": len(self.bad.steps)})

    def _save_at(self, step: int) -> None:
        self.step = step
        self.save()
        self.folder.writer.wait()

    def evaluate(self, part: str = "evaluate", record: bool = True) -> dict[str, float]:
        """Accuracy now, of the moving average where there is one; its time belongs to `part` of the ledger.

        Raises:
            Abandoned: the run was asked to stop meanwhile.
        """
        parts, trainer = self.parts, self.parts.trainer
        if parts.val_loader is None:
            return {}
        if parts.device.type == "cuda":
            torch.cuda.synchronize(parts.device)  # steps that are under way are training
        began = time.perf_counter()
        with self.ledger.during(part):
            with trainer.average.applied() if trainer.average is not None else nullcontext():
                self.world.share_buffers(trainer.student)
                result = evaluate(
                    trainer.student,
                    parts.val_loader,
                    parts.augment.normalise_only,
                    trainer.autocast,
                    self.recipe.distill.predict,
                    self.world,
                    lambda: self._to_stop()[0],
                )
            trainer.student.train()
        spent = self.world.broadcast(time.perf_counter() - began)
        self.clock.cost("evaluate", spent)
        if not record:
            return result
        if result["top1"] >= self.best.get("top1", -1.0):
            self.best = {"step": self.step, "top1": result["top1"]}
        self._record("eval", self._where() | result)
        self.progress.say(f"step {self.step}: top-1 {result['top1']:.2f} %  loss {result['loss']:.4f}")
        return result

    def time_evaluation(self) -> None:
        """Evaluates before the first step, so that a budget knows what the last evaluation will cost."""
        self.evaluate("start")
        if self.clock.costs.get("evaluate", 0.0) > 0.01 * (self.clock.hours or 0.0):
            self.evaluate("start", record=False)  # the first one is slower than the last will be

    def _record(self, kind: str, record: dict) -> None:
        if self.journal is not None:
            self.journal.write(kind, record)

    def _where(self, step: int | None = None) -> dict:
        step = self.step if step is None else step
        return {
            "step": step,
            "samples": step * self.recipe.run.batch,
            "epoch": round(step / self.per_epoch, 4),
            "gpu_hours": round(self.ledger.gpu_hours, 6),
        }

    def _done_amount(self) -> float:
        return self.step if self.clock.steps else round(self.ledger.gpu_hours, 4)

    # -- the loop -------------------------------------------------------------------------------------------------

    def batches(self) -> Generator[tuple[TrainBatch, TeacherTargets | None], None, None]:
        """Batches with the teacher targets from the present step on, epoch after epoch."""
        p, views = self.parts, self.recipe.distill.views
        epoch, start = divmod(self.step, self.per_epoch)
        while True:
            shown = epoch % views if views else epoch  # the epoch whose images are seen; see recipe.py
            raw: Any = p.train_loader.epoch(shown, start)
            data = self.ledger.waiting(raw)
            ask = (p.augment, cast(Teachers | None, self.teachers), p.trainer.autocast, p.overlap)
            pairs: Any = taught(data, *ask) if p.target_cache is None else p.target_cache.taught(shown, data, *ask)
            try:
                for mixed, targets in pairs:
                    yield replace(mixed, epoch=epoch), targets  # stochastic depth draws anew
            finally:
                pairs.close()
                raw.close()
            epoch, start = epoch + 1, 0

    def loop(self, on_step: Callable[[Run], None] | None = None) -> dict[str, float]:
        """Trains to the end; returns the last evaluation."""
        self._batches = self.batches()
        try:
            with counted(self.ledger) if self.parts.backend else nullcontext():
                return self._loop(on_step)
        finally:
            self._batches.close()

    def _loop(self, on_step: Callable[[Run], None] | None) -> dict[str, float]:
        r, trainer = self.recipe, self.parts.trainer
        peak = peak_learning_rate(r)
        result: dict[str, float] = {}
        try:
            if self.evaluation_pending or self.complete or self.clock.done(self.step):
                result, self.evaluation_pending = self.evaluate(), False
            if self.complete or self.clock.done(self.step):
                return result
            if self.clock.hours and "evaluate" not in self.clock.costs:
                self.time_evaluation()
        except Abandoned:
            raise Stopped(f"stopped in an evaluation; continue {self.folder.path} with --resume") from None
        share = self.world.broadcast(self._share())
        if share >= 1:
            spent = in_words(self.ledger.read())
            log.warning("run.length: %s are spent before the first step (%s): there will be one", r.run.length, spent)
        self.ledger.switch("train")
        self._logged = self.ledger.read()
        while not self.clock.done(self.step):
            trainer.watch.armed = (self.step + 1) % r.run.log_every == 0
            mixed, targets = next(self._batches)
            self.step += 1
            progress = self.clock.progress(self.step, share)
            if progress < self.early_until:
                mixed = replace(mixed, images=smaller(mixed.images, r.student.early_size))
            lr = schedule(progress, peak, r.optim.min_lr, self.clock.warmup)
            psi_lr = schedule(progress, r.distill.mine.lr, 0.0, self.clock.warmup)
            with_mine = r.distill.uses_mine and (self.step - 1) % self._mine_every == 0
            trainer.step(mixed, targets, self.step, lr, psi_lr, with_mine)
            if self.pace is not None:
                self.pace()

            last = self.clock.done(self.step)
            self.progress.update(self._done_amount())
            to_log = last or self.step % r.run.log_every == 0
            to_evaluate = last or (self._eval_every and self.step % self._eval_every == 0 and self._fits_eval())
            take_snapshot = self.bad.snapshot_due(self.step)
            if (to_log or to_evaluate or take_snapshot) and self.rolled_back() and not self.clock.done(self.step):
                continue
            if to_log:
                self.log_line(lr)
            if take_snapshot:
                self.bad.take_snapshot(self.step)
            if to_evaluate:
                self.evaluation_pending = True
                with suppress(Abandoned):
                    result, self.evaluation_pending = self.evaluate(), False
            if on_step is not None:
                on_step(self)
            stop, share = self._to_stop()
            stop = stop or self.evaluation_pending  # which was given up because somebody was asked
            if last or stop:
                if stop:
                    self.rolled_back()
                self.save(complete=last)
            elif self._save_is_due():
                self.save()
            if stop and (self.evaluation_pending or not last):
                raise Stopped(f"stopped at step {self.step}, saved in {self.folder.path}; continue with --resume")
        return result

    def _to_stop(self) -> tuple[bool, float]:
        """Whether any rank was asked to stop, and rank 0's share: all ranks alike, see `Agreement`."""
        return self.agree(self.stop_wanted or bool(self.asked), self._share())

    def _share(self) -> float:
        if self.folder.save_seconds is not None:
            self.clock.cost("checkpoint", self.folder.save_seconds)
        return self.clock.share()

    def _fits_eval(self) -> bool:
        """Whether an evaluation leaves enough of a budget for the last one; all ranks alike."""
        return self.clock.hours is None or self.world.broadcast(self.clock.fits("evaluate"))

    def _save_is_due(self) -> bool:
        """By rank 0's clock alone; so a frozen guard is left to the next line of the log, where all ranks look."""
        due = time.perf_counter() - self._saved_at > self._save_every and self.clock.fits("checkpoint")
        return self.world.main and due and not self.parts.trainer.guard.read()[1]

    def finish(self, result: dict[str, float]) -> dict:
        """Writes `summary.json`; returns it."""
        with self.ledger.during("checkpoint"):
            self.folder.writer.wait()
        seconds = self.ledger.read()
        busy = productive_seconds(seconds)
        student, source, corrupt = (
            self.parts.trainer.student,
            self.parts.train_loader.source,
            self.parts.train_loader.corrupt,
        )
        summary = {
            "name": self.recipe.name,
            "seed": self.recipe.run.seed,
            "steps": self.step,
            "samples": self.samples,
            "epochs": round(self.step / self.per_epoch, 4),
            "result": result,
            "best": self.best,
            **self._faults(),
            "bad_steps": self.bad.steps,
            "corrupt_names": [source.name(index) for index in sorted(corrupt)],
            "images_per_second": round(self.samples / busy, 1) if busy else None,
            "peak_memory_gib": round(peak_memory(self.parts.device) / 2**30, 3),
            "ceiling_tflops": round(self.parts.speed.limit / 1e12, 3),
            "gpu_hours": round(self.ledger.gpu_hours, 6),
            "seconds": {k: round(v, 3) for k, v in seconds.items()},
            "parameters": sum(p.numel() for p in student.parameters()),
            "versions": versions(),
            "device": torch.cuda.get_device_name()
            if self.parts.device.type == "cuda"
            else f"cpu x{torch.get_num_threads()}",
        }
        self._record("end", {"step": self.step, "gpu_hours": summary["gpu_hours"]})
        if self.world.main:
            write_atomic(self.folder.path / "summary.json", json.dumps(summary, indent=1))
        return summary

    def close(self) -> None:
        """Closes what the run holds and leaves word of how long it was held."""
        self._closing.close()


def train(
    recipe: Recipe, resume: bool = False, quiet: bool = False, on_step: Callable[[Run], None] | None = None
) -> dict:
    """Trains a recipe to its end; returns the summary that is also written to the run's folder.

    Args:
        resume: go on from the newest whole checkpoint of the run's folder, if it has one.
        quiet: no progress on standard error.
        on_step: called after each step; it may set `run.stop_wanted`.

    Raises:
        UserError: something that the user can mend, a batch too large for the memory too.
        Stopped: SIGTERM, SIGUSR1 or `stop_wanted`; the run is saved.
        NotFinite: a loss or gradient was not finite, and the recipe says to stop; the state before it is saved.
        PeerLost: started by torchrun, and another process has died or hangs.
    """
    limit = parse_seconds(recipe.run.timeout, "run.timeout")
    with init_distributed(uses_gpu(recipe), limit) as world, locked(Path(resolved(recipe).run.out), world):
        try:
            return _train(recipe, resume, quiet, world, on_step)
        except OSError as error:  # of data and stored targets there are words already
            out = Path(resolved(recipe).run.out)
            what = f"{os.fsdecode(error.filename or out)}: {error.strerror or error}"
            raise UserError(f"{out}: the run cannot be written ({what}); mend that and resume") from error
        except Exception as error:
            if not ran_out(error):
                raise
            line = out_of_memory_line(error, recipe.run.batch)
        raise UserError(line)  # outside of `except`: the error is forgotten, and with it the memory its frames hold


def _train(
    recipe: Recipe, resume: bool, quiet: bool, world: World, on_step: Callable[[Run], None] | None
) -> dict[str, Any]:
    with stop_on_signal() as asked:  # to the end: a second signal must not cut the save short
        run = Run(recipe, resume, quiet, world, asked)
        try:
            return run.finish(run.loop(on_step))
        except (Stopped, NotFinite):  # all ranks alike: they stay until rank 0 has saved, or torchrun would end it
            run.folder.writer.wait()
            world.wait_for_all()
            raise
        finally:
            try:
                run.folder.writer.wait()
            finally:
                run.close()


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """SIGTERM and SIGUSR1 ask a run to save and stop after the present step: they are put into the list.

    Nothing where signals cannot be set.
    """
    asked: list[int] = []

    def ask(signum: int, _frame: object) -> None:
        asked.append(signum)

    kept = {}
    try:
        for signum in (signal.SIGTERM, signal.SIGUSR1):
            kept[signum] = signal.signal(signum, ask)
    except ValueError:  # not the main thread
        pass
    try:
        yield asked
    finally:
        for signum, handler in kept.items():
            signal.signal(signum, handler)
