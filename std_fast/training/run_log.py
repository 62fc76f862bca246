"""What a run reports: `metrics.jsonl`, trackers, progress on standard error, a trace of steps, and `summary.json`."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from pipelines.errors import quantity
from pipelines.files import write_atomic
from std_fast.config.recipe import Recipe, dump
from std_fast.config.schema import to_dict
from std_fast.runtime.budget import Clock, duration_in_words, productive_seconds
from std_fast.runtime.distributed import World
from std_fast.runtime.metrics import Journal, Progress, three_digits
from std_fast.runtime.speed import peak_memory, speed_in_words
from std_fast.runtime.trace import open_trace
from std_fast.runtime.trackers import open_trackers
from std_fast.runtime.write_faults import WriteFaults
from std_fast.training.build import Parts
from std_fast.training.run_folder import RunFolder, versions
from std_fast.training.schedule import StepSettings

RATE_SECONDS = 5.0
"""of training, after the first step: what the rate that is reported early is measured over, at least"""


class RunLog:
    """Reads the meters and writes records. Rank 0 writes; every rank must make the same calls.

    Args:
        recipe: goes into trackers and reports as it is.
        folder: the run's.
        step: that the run starts from.
        evaluates: whether it starts with an evaluation of that step.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        parts: Parts,
        clock: Clock,
        world: World,
        step: int,
        quiet: bool,
        evaluates: bool,
    ) -> None:
        self.recipe, self.folder, self.parts = recipe, folder, parts
        self.clock, self.ledger, self.world = clock, clock.ledger, world
        self.batch, self.steps_per_epoch = recipe.run.batch, parts.train_loader.steps_per_epoch
        self._closing = ExitStack()
        steps, watch = recipe.run.profile if world.main else "", parts.speed.watch
        self._trace = open_trace(steps, folder.path, parts.device, watch, step, clock.steps)
        self._closing.callback(self._trace.close)
        self._write_faults = WriteFaults()
        self._journal: Journal | None = None
        if world.main:
            trackers = open_trackers(recipe.run.trackers, folder.path, to_dict(recipe), step, self._write_faults)
            self._journal = Journal(folder.path, step, trackers, self._write_faults, evaluates)
            self._closing.callback(self._journal.close)
        hour = "GPU-hour" if parts.device.type == "cuda" else "hour"
        what, total = (hour, clock.hours) if clock.hours else ("step", clock.steps)
        self.progress = Progress(what, total or 0, "", quiet or not world.main, faults=self._write_faults)
        self._closing.callback(self.progress.close)
        self._first: tuple[int, float] | None = None  # step that was seen finished first, productive seconds then
        self._rate_is_known = bool(clock.hours)  # or of no use: a budget has no time to the end that depends on it
        self._before = self.ledger.read()  # when the steps of the next line of the log began

    def begin(self, step: int) -> None:
        """Before the first step, which may take minutes."""
        source, compiles = self.parts.train_loader.source, self.parts.backend is not None
        images, classes = quantity(source.num_samples, "image"), quantity(source.num_classes, "class")
        text = f"{images} of {classes}, {quantity(self.steps_per_epoch, 'step')} an epoch"
        self.progress.say(f"{text}; step {step + 1}{' compiles, which takes minutes' * compiles}")
        self._before = self.ledger.read()

    def begin_step(self, step: int) -> None:
        """Before every step."""
        self._trace.begin_step(step)

    def update(self, step: int) -> None:
        """After every step: moves the progress bar. Waits for nothing."""
        self.progress.update(self._done(step), "" if self.clock.steps else f"step {step:,}")
        self._report_rate(self.parts.speed.watch.finished())

    def _report_rate(self, finished: int) -> None:
        """Once, as soon as it is known: images per second, and the time to the end. finished: by the device."""
        if self._rate_is_known or not finished:
            return
        busy = productive_seconds(self.ledger.read())
        first, before = self._first = self._first or (finished, busy)
        if finished <= first or busy - before < RATE_SECONDS:
            return
        self._rate_is_known = True
        step_seconds, steps = (busy - before) / (finished - first), self.clock.steps or 0
        rate, left = three_digits(self.batch / step_seconds), duration_in_words(step_seconds * (steps - finished))
        text = f"{rate} images/s, about {left} of training to the end; std-fast plan says what a budget buys"
        self.progress.say(f"step {finished:,}/{steps:,}: {text}")

    def train(self, step: int, now: StepSettings, bad_steps: int) -> None:
        """Reads the meters (the only wait for the device) and writes a record of the steps since the last one."""
        meters = self.parts.trainer.meters
        steps, metrics = meters.steps, meters.read()
        self._report_rate(step)
        before, self._before = self._before, self.ledger.read()
        busy = productive_seconds(self._before) - productive_seconds(before)
        images, waited = steps * self.batch, self._before["data"] - before["data"]
        speed = self.parts.speed.read(now.step, images, busy, waited)
        rate = images / busy
        seconds = {part: round(value, 3) for part, value in self.ledger.read().items()}
        faults = {name: count for name, count in self.faults(bad_steps).items() if count}
        record = {"lr": now.lr, "images_per_second": round(rate, 4), **metrics, **faults, **speed, "seconds": seconds}
        self._record("train", step, record)
        loss = metrics.get("loss", float("nan"))
        text = f"loss {loss:.4f}  lr {now.lr:.2e}  {three_digits(rate)} images/s  {speed_in_words(speed)}"
        self.progress.note(self._done(step), text)

    def evaluation(self, step: int, result: dict[str, float]) -> None:
        self._record("eval", step, result)
        self.progress.say(f"step {step}: top-1 {result['top1']:.2f} %  loss {result['loss']:.4f}")

    def bad_step(self, step: int, text: str, bad_steps: int) -> None:
        """A step that was not finite, and what was done about it."""
        self.progress.say(f"step {step}: loss or gradient not finite, {text}")
        self._record("not_finite", step, {"bad_steps": bad_steps})

    def not_finite(self, bad: int, what: list[str], bad_steps: list[int]) -> Path:
        """Describes the batch and the state of a step that ends the run, in `not_finite.json`; returns its path.

        Args:
            what: the values that were not finite.
            bad_steps: those before it.
        """
        parts, path = self.parts, self.folder.path / "not_finite.json"
        epoch, place = divmod(bad - 1, self.steps_per_epoch)
        report = {
            "step": bad,
            "epoch": epoch,
            "step_in_epoch": place,
            "not_finite": what,
            "bad_steps": bad_steps,
            "metrics": parts.trainer.meters.read(),  # of the steps before it
            "positions": parts.train_loader.sampler.positions(place).tolist(),
            "recipe": dump(self.recipe),
        }
        if self.world.main:
            self.folder.keep()
            with self._write_faults.counted(path.name):  # the state before the step is still to be saved
                write_atomic(path, json.dumps(report, indent=1))
        return path

    def faults(self, bad_steps: int) -> dict[str, int]:
        """Bad steps, and corrupt images: those of each process added up."""
        corrupt = torch.tensor(len(self.parts.train_loader.corrupt), device=self.parts.device)
        return {"bad_steps": bad_steps, "corrupt_images": int(self.world.sum(corrupt))}

    def summary(
        self, step: int, result: dict[str, float], best: dict[str, float], bad_steps: list[int]
    ) -> dict[str, Any]:
        """Writes `summary.json` of a finished run; returns it."""
        parts, recipe = self.parts, self.recipe
        source, corrupt = parts.train_loader.source, parts.train_loader.corrupt
        seconds, samples = self.ledger.read(), step * self.batch
        busy = productive_seconds(seconds)
        on_gpu = parts.device.type == "cuda"
        summary = {
            "name": recipe.name,
            "seed": recipe.run.seed,
            "steps": step,
            "samples": samples,
            "epochs": round(step / self.steps_per_epoch, 4),
            "result": result,
            "best": best,
            **self.faults(len(bad_steps)),
            "bad_steps": bad_steps,
            "lost_writes": self._write_faults.counts,
            "corrupt_names": [source.name(index) for index in sorted(corrupt)],
            "images_per_second": round(samples / busy, 4) if busy else None,
            "peak_memory_gib": round(peak_memory(parts.device) / 2**30, 3),
            "peak_tflops": parts.speed.limit and round(parts.speed.limit / 1e12),
            "gpu_hours": round(self.ledger.gpu_hours, 6),
            "seconds": {part: round(value, 3) for part, value in seconds.items()},
            "parameters": sum(p.numel() for p in parts.trainer.student.parameters()),
            "versions": versions(),
            "device": torch.cuda.get_device_name() if on_gpu else f"cpu x{torch.get_num_threads()}",
        }
        if self._journal is not None:
            self.folder.keep()
            self._journal.write("end", {"step": step, "gpu_hours": summary["gpu_hours"]})
            write_atomic(self.folder.path / "summary.json", json.dumps(summary, indent=1))
        return summary

    def close(self) -> None:
        self._closing.close()

    def _record(self, kind: str, step: int, record: dict[str, Any]) -> None:
        if self._journal is not None:
            try:
                self.folder.keep()
            except OSError as error:  # a log never ends a run
                self._write_faults.add(str(self.folder.path), error)
            about = {
                "step": step,
                "samples": step * self.batch,
                "epoch": round(step / self.steps_per_epoch, 4),
                "gpu_hours": round(self.ledger.gpu_hours, 6),
            }
            self._journal.write(kind, about | record)

    def _done(self, step: int) -> float:
        return step if self.clock.steps else round(self.ledger.gpu_hours, 4)
