"""The evaluations of a run: of the moving average where there is one, timed for the budget, the best one kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

from std_fast.runtime.budget import Clock, Ledger
from std_fast.runtime.distributed import World
from std_fast.training.build import Parts
from std_fast.training.evaluate import evaluate
from std_fast.training.run_log import RunLog


class Evaluator:
    """Evaluates the student of `parts` on its validation data.

    Args:
        stop: called before each batch; True abandons the evaluation. All ranks must get the same.
        best: of an earlier part of the run.
    """

    def __init__(
        self,
        parts: Parts,
        clock: Clock,
        ledger: Ledger,
        log: RunLog,
        stop: Callable[[], bool],
        world: World,
        best: dict[str, float],
    ) -> None:
        self.parts, self.clock, self.ledger = parts, clock, ledger
        self.log, self.stop, self.world, self.best = log, stop, world, best

    def __call__(self, step: int, part: str = "evaluate", record: bool = True) -> dict[str, float]:
        """Accuracy after `step` steps; empty without validation data. Its time belongs to `part` of the ledger.

        Raises:
            Abandoned: `stop` returned True.
        """
        parts, student = self.parts, self.parts.trainer.student
        if parts.val_loader is None:
            return {}
        if parts.device.type == "cuda":
            torch.cuda.synchronize(parts.device)  # the steps under way are training
        began = time.perf_counter()
        with self.ledger.during(part):
            ema = parts.trainer.ema
            with ema.applied() if ema is not None else nullcontext():
                self.world.share_buffers(student)
                normalise = parts.augment.normalise_only
                result = evaluate(
                    student,
                    parts.val_loader,
                    normalise,
                    parts.trainer.autocast,
                    parts.recipe.distill.predict,
                    self.world,
                    self.stop,
                )
            student.train()
        self.clock.cost("evaluate", self.world.broadcast(time.perf_counter() - began))
        if record:
            if result["top1"] >= self.best.get("top1", -1.0):
                self.best = {"step": step, "top1": result["top1"]}
            self.log.evaluation(step, result)
        return result

    def time_evaluation(self, step: int) -> None:
        """Evaluates before the first step, so that the clock of a budget has the cost of the last evaluation."""
        self(step, "start")
        if self.clock.costs.get("evaluate", 0.0) > 0.01 * (self.clock.hours or 0.0):
            self(step, "start", record=False)  # the first one is slower than the last will be
