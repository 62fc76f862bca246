"""Steps whose loss or gradient was not finite, and what `run.not_finite` says about them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from pipelines.files import write_atomic
from pipelines.read.batch import Loader
from std_fast.config.recipe import Recipe, dump
from std_fast.training.step import Trainer

CHECKED = ("loss", "gradient", "MINE's gradient")  # what the trainer's guard checks, in its order


class NotFinite(Exception):
    """Loss or gradient of a step was not finite; the state before it is saved."""


class NonFiniteMonitor:
    """The steps of a run that were not finite, as far as the host knows. All ranks hold the same.

    The trainer's guard notices them on the device, where such a step changes nothing; here the host follows, when it
    waits for the device anyway.

    Args:
        meta: of the checkpoint that the run goes on from.
        snapshot_every: steps between the states that `rollback` puts aside; 0: none.
        folder: of the run, for `not_finite.json`; None: another rank writes it.
    """

    def __init__(
        self,
        recipe: Recipe,
        trainer: Trainer,
        loader: Loader,
        meta: Mapping[str, Any],
        snapshot_every: int,
        folder: Path | None,
    ) -> None:
        self._recipe, self._trainer, self._loader, self._folder = recipe, trainer, loader, folder
        self.steps: list[int] = list(meta.get("bad_steps", []))
        self._snapshot_every, self._snapshot_step = snapshot_every, meta.get("snapshot_step", 0)
        known, limit, kind = len(self.steps), recipe.run.not_finite_limit, recipe.run.not_finite
        room = known if kind == "stop" else max(known, limit)
        trainer.guard.set(self.steps, room + 1, room if kind == "skip" else known)
        if snapshot_every and not trainer.snapshot:
            self.take_snapshot(meta.get("step", 0))

    def meta(self) -> dict[str, Any]:
        """For a checkpoint of this moment."""
        return {"bad_steps": self._trainer.guard.read()[0], "snapshot_step": self._snapshot_step}

    def snapshot_due(self, step: int) -> bool:
        return self._snapshot_every > 0 and step % self._snapshot_every == 0

    def take_snapshot(self, step: int) -> None:
        """Keeps the state after `step` on the device, to go back to."""
        self._trainer.take_snapshot()
        self._snapshot_step = step

    def check(self, tell: Callable[[int, str], None], save_at: Callable[[int], None]) -> int | None:
        """Waits for the device, and does what the recipe says about new bad steps.

        Args:
            tell: called with each of them, and a line about it.
            save_at: saves the present state as that of a step, and returns when it is on disk.

        Returns:
            The step that the run is at now, if it went back: with the state that was put aside, behind the bad batch.

        Raises:
            NotFinite: after saving the state before the bad step.
        """
        run, guard = self._recipe.run, self._trainer.guard
        bad, frozen = guard.read()
        new, self.steps = bad[len(self.steps) :], bad
        for step in new if run.not_finite == "skip" else ():
            tell(step, f"step {step}: loss or gradient not finite, skipped")
        if not frozen:
            return None
        if run.not_finite != "rollback" or len(bad) > run.not_finite_limit:
            self._end_at(bad.pop(), save_at)
        self._trainer.rollback()
        guard.allowed.fill_(len(bad))
        back = f"back to the weights of step {self._snapshot_step}, on with the batch behind it"
        tell(bad[-1], f"step {bad[-1]}: loss or gradient not finite, {back}")
        return bad[-1]

    def _end_at(self, bad: int, save_at: Callable[[int], None]) -> NoReturn:
        """Saves the state before step `bad`, since when nothing has changed, and raises NotFinite."""
        trainer = self._trainer
        trainer.guard.set(self.steps, len(self.steps) + 1, len(self.steps))  # a resumed run meets it again
        save_at(bad - 1)
        what = [name for bit, name in enumerate(CHECKED) if int(trainer.guard.bad_values) >> bit & 1]
        epoch, place = divmod(bad - 1, self._loader.steps_per_epoch)
        report = {
            "step": bad,
            "epoch": epoch,
            "step_in_epoch": place,
            "not_finite": what,
            "bad_steps": self.steps,
            "figures": trainer.meters.read(),  # of the steps before it
            "positions": self._loader.sampler.positions(place).tolist(),
            "recipe": dump(self._recipe),
        }
        described = ""
        if self._folder is not None:
            path = self._folder / "not_finite.json"
            write_atomic(path, json.dumps(report, indent=1))
            described = f", the batch is described in {path}"
        past = f" after {len(self.steps)} others (run.not_finite_limit)" if self.steps else ""
        mend = "" if self.steps else " or, if it is one batch that does it, --resume --run.not_finite skip"
        raise NotFinite(
            f"step {bad} is not finite ({', '.join(what)}){past}; the state before it is saved{described}; "
            f"try a lower optim.lr, optim.clip 1.0, run.precision float32{mend}"
        )
