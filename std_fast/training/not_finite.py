"""Steps whose loss or gradient was not finite, and what `run.not_finite` does about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from std_fast.config.recipe import Run as RunSpec
from std_fast.training.guard import Guard
from std_fast.training.run_log import RunLog
from std_fast.training.state import TrainState

CHECKED = ("loss", "gradient", "MINE's gradient")  # what the trainer's guard checks, in its order


class NotFinite(Exception):
    """Loss or gradient of a step was not finite, and the run ends.

    Attributes:
        step: the bad one. The state is that before it.
    """

    def __init__(self, step: int, text: str) -> None:
        super().__init__(text)
        self.step = step


class NonFiniteMonitor:
    """The steps of a run that were not finite, as far as the host has read them. All ranks have the same.

    The guard detects them on the device, where such a step changes nothing; the host reads the guard when it waits for
    the device anyway. With `rollback` the monitor takes the snapshots, the first at once, and returns to them.

    Args:
        run: the recipe's section.
        meta: metadata of the checkpoint that the run continues from.
    """

    def __init__(self, run: RunSpec, guard: Guard, state: TrainState, log: RunLog, meta: Mapping[str, Any]) -> None:
        self._run, self._guard, self._state, self._log = run, guard, state, log
        self.steps: list[int] = list(meta["bad_steps"])
        self._snapshot_step = meta["snapshot_step"]
        known = len(self.steps)
        room = known if run.not_finite == "stop" else max(known, run.not_finite_limit)
        guard.set(self.steps, room + 1, room if run.not_finite == "skip" else known)
        if run.not_finite == "rollback" and not state.snapshot:
            self.take_snapshot(meta["step"])

    def meta(self) -> dict[str, Any]:
        """For a checkpoint of this moment. Waits for the device."""
        return {"bad_steps": self._guard.read()[0], "snapshot_step": self._snapshot_step}

    def frozen(self) -> bool:
        """Whether a bad step waits for `check`. Waits for the device."""
        return self._guard.read()[1]

    def take_snapshot(self, step: int) -> None:
        """Keeps the state after `step` on the device, for a rollback."""
        self._state.take_snapshot()
        self._snapshot_step = step

    def check(self) -> int | None:
        """Waits for the device; skips new bad steps, rolls back or ends the run, as the recipe says.

        Returns:
            After a rollback the step to continue from: the state is the snapshot's, the next batch the one behind the
            bad step. None otherwise.

        Raises:
            NotFinite: the run ends. A run that is resumed from the present state meets the bad step again.
        """
        run, guard = self._run, self._guard
        bad, frozen = guard.read()
        new, self.steps = bad[len(self.steps) :], bad
        if run.not_finite == "skip":
            for step in new[: len(new) - frozen]:  # the last one of a frozen guard ends the run
                self._log.bad_step(step, "skipped", len(bad) - frozen)
        if not frozen:
            return None
        if run.not_finite != "rollback" or len(bad) > run.not_finite_limit:
            self.steps = bad[:-1]
            self._end(bad[-1])
        self._state.rollback()
        guard.allowed.fill_(len(bad))
        text = f"rolled back to the weights of step {self._snapshot_step}, continuing with the next batch"
        self._log.bad_step(bad[-1], text, len(bad))
        return bad[-1]

    def _end(self, bad: int) -> NoReturn:
        self._guard.set(self.steps, len(self.steps) + 1, len(self.steps))
        what = [name for bit, name in enumerate(CHECKED) if int(self._guard.bad_values) >> bit & 1]
        path = self._log.not_finite(bad, what, self.steps)
        past = f" after {len(self.steps)} others (run.not_finite_limit)" if self.steps else ""
        fix = "" if self.steps else " or, if it is one batch that does it, --resume --run.not_finite skip"
        raise NotFinite(
            bad,
            f"step {bad} is not finite ({', '.join(what)}){past}; the state before it is saved, the batch is described "
            f"in {path}; try a lower optim.lr, optim.clip 1.0, run.precision float32{fix}",
        )
