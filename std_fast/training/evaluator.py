"""The evaluations of a run: of the moving average where there is one, timed for the budget, the best one kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from typing import Any

import torch

from pipelines.errors import quantity
from std_fast.runtime.budget import Clock
from std_fast.runtime.distributed import World
from std_fast.runtime.metrics import LINE_SECONDS
from std_fast.training.build import Parts
from std_fast.training.evaluate import Abandoned, evaluate
from std_fast.training.run_log import RunLog


class Evaluator:
    """Evaluates the student of `parts` on its validation data.

    Args:
        stop: called before each batch; True abandons the evaluation. All ranks must get the same.
        deferred: whether the run begins with an evaluation.
        meta: metadata of the checkpoint that the run continues from.

    Attributes:
        result: metrics of the last evaluation; empty without validation data.
        best: step and accuracy of the best evaluation.
        deferred: the last evaluation was abandoned, or never begun, and is still to be made.
    """

    def __init__(
        self,
        parts: Parts,
        clock: Clock,
        log: RunLog,
        stop: Callable[[], bool],
        world: World,
        deferred: bool,
        meta: Mapping[str, Any],
    ) -> None:
        self.parts, self.clock, self.log, self.stop, self.world = parts, clock, log, stop, world
        self.result: dict[str, float] = meta["result"]
        self.best: dict[str, float] = meta["best"]
        self.deferred = deferred

    def meta(self) -> dict[str, Any]:
        """For a checkpoint of this moment."""
        return {"result": self.result, "best": self.best, "evaluation_pending": self.deferred}

    def start(self, step: int, finished: bool) -> None:
        """Before the first step: makes a deferred evaluation. Else a budget times one, so that its clock has the cost
        of the last evaluation."""
        if self.deferred:
            self(step)
        elif not finished and self.clock.hours and "evaluate" not in self.clock.costs:
            self(step, "start")
            large = self.clock.costs.get("evaluate", 0.0) > 0.01 * self.clock.hours
            if not self.deferred and large and self.clock.fits("evaluate"):
                self.log.progress.say("evaluating once more, for the time that one takes: the first is slower")
                self(step, "start", record=False)

    def __call__(self, step: int, part: str = "evaluate", record: bool = True) -> None:
        """Evaluates after `step` steps, unless `stop` returns True: then it is deferred.

        Args:
            part: what the time counts as in the ledger.
            record: whether it is logged, and counts for `best`.
        """
        self.deferred = True
        with suppress(Abandoned):
            self.result = self._evaluate(step, part, record)
            self.deferred = False

    def _evaluate(self, step: int, part: str, record: bool) -> dict[str, float]:
        parts, student, ema = self.parts, self.parts.trainer.student, self.parts.trainer.ema
        if parts.val_loader is None:
            return {}
        if parts.device.type == "cuda":
            torch.cuda.synchronize(parts.device)  # the steps under way are training
        total, began = parts.val_loader.source.num_samples, time.perf_counter()
        self.log.progress.say(f"evaluating {quantity(total, 'image')}")
        said = began

        def stop(images: int) -> bool:
            nonlocal said
            if time.perf_counter() > said + LINE_SECONDS:
                said = time.perf_counter()
                self.log.progress.say(f"evaluated {min(images * self.world.size, total):,} of {total:,} images")
            return self.stop()

        with self.clock.ledger.during(part):
            with ema.applied() if ema is not None else nullcontext():
                self.world.share_buffers(student)
                normalise, autocast = parts.augment.normalise_only, parts.trainer.autocast
                how = parts.recipe.distill.predict
                result = evaluate(student, parts.val_loader, normalise, autocast, how, self.world, stop)
            student.train()
        self.clock.cost("evaluate", self.world.broadcast(time.perf_counter() - began))
        if record:
            if result["top1"] >= self.best.get("top1", -1.0):
                self.best = {"step": step, "top1": result["top1"]}
            self.log.evaluation(step, result)
        return result
