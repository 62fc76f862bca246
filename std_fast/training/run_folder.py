"""A run's folder: one owner at a time, its checkpoints, and the record of how long the run was held."""

from __future__ import annotations

import logging
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipelines.errors import DataError, UserError
from pipelines.files import replacing, write_atomic
from pipelines.read.batch import Loader
from std_fast import __version__
from std_fast.config.recipe import Duration, Recipe, dump, loads
from std_fast.config.schema import difference
from std_fast.runtime import checkpoint
from std_fast.runtime.budget import HELD, Heartbeat, Ledger, earlier
from std_fast.runtime.distributed import World
from std_fast.runtime.folder_lock import FolderLock
from std_fast.training.content import at_stored_paths, check_classes, check_content, check_paths, content_of
from std_fast.training.existing import changed_fields, check_unused, of_new_run, read_summary
from std_fast.training.state import TrainState

log = logging.getLogger("std_fast")


class Complete(Exception):
    """A run that is resumed was complete: nothing of it changes.

    Attributes:
        summary: what it wrote at its end.
    """

    def __init__(self, summary: dict[str, Any]) -> None:
        super().__init__("the run is complete")
        self.summary = summary


class Saved(NamedTuple):
    path: Path
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


class RunFolder:
    """The folder of one run. Of many processes only rank 0 writes; all read the same checkpoint.

    From its construction until `close` a thread keeps on disk how long the run has been held.

    Args:
        recipe: resolved, so that `run.out` is a path. All of it: it is saved, and compared with the one that is saved.
        ledger: gets the seconds that earlier processes of a resumed run were held, also where they saved nothing.
        resume: continue from `found`, the newest complete checkpoint, if there is one.
        lock: of rank 0, which writes; the caller closes it.

    Raises:
        UserError: the folder holds a run and `resume` is not asked for, or a run that cannot be read.
    """

    def __init__(self, recipe: Recipe, world: World, ledger: Ledger, resume: bool, lock: FolderLock | None) -> None:
        self.recipe, self.world, self.ledger, self.lock = recipe, world, ledger, lock
        self.path = Path(recipe.run.out)
        self.writer = checkpoint.Writer(self.path / "checkpoints", recipe.run.keep_checkpoints)
        self.found = self._newest() if resume else None
        if self.found is None:
            check_unused(recipe, self.path)
            if resume:
                log.info("%s holds no checkpoint yet: starting from the beginning", self.path)
        self.saved_step, self._first_step, self.copy_seconds = 0, 0, 0.0
        self.data: dict[str, Any] = {}  # what each checkpoint records of the data
        self._heartbeat: Heartbeat | None = None
        if lock is not None:
            if resume:
                self._carry()
            self._held_before = held.read_bytes() if (held := self.path / HELD).exists() else None
            self._heartbeat = Heartbeat(self.path, ledger, self._beat_every(), lock.held)

    def _newest(self) -> Saved | None:
        folder = self.path / "checkpoints"
        found = checkpoint.newest(folder) if self.world.main else None
        name = self.world.broadcast(found and found[0].name)
        if name and not self.world.main:
            found = (folder / name, *checkpoint.load(folder / name))
        if found is None and (there := checkpoint.listed(folder)):
            raise UserError(
                f"{folder}: none of its {len(there)} checkpoints can be read (see above); use the version of std-fast "
                "that wrote them, or begin anew with another --run.out"
            )
        return found and Saved(*found)

    def _carry(self) -> None:
        step, devices, seconds = 0, 1, {}
        if self.found is not None:
            meta = self.found.meta
            step, devices, seconds = meta["step"], meta["devices"], meta["seconds"]
        self.ledger.carry(earlier(self.path, step, {part: devices * value for part, value in seconds.items()}))

    def _beat_every(self) -> float:
        length = Duration.parse(self.recipe.run.length)
        return min(5.0, max(0.05, 0.001 * 3600 * length.amount)) if length.unit == "gpu-hours" else 5.0

    def pinned(self, recipe: Recipe) -> Recipe:
        """The recipe as a resumed run builds it: without initial weights, and reading with the backend that it had.
        UserError where the data is gone.
        """
        if self.found is None:
            return recipe
        check_paths(recipe, loads(self.found.meta["recipe"], str(self.found.path)))
        backend = self.found.meta["content"].get("data.backend", "auto")
        if recipe.data.backend == "auto" and backend != "resident":  # which `auto` takes for the same data again
            recipe = replace(recipe, data=replace(recipe.data, backend=backend))
        return replace(recipe, student=replace(recipe.student, weights=""))

    def check_data(self, train: Loader) -> None:
        """Notes what the run reads. UserError where `found` was written by a recipe that computes something else, or on
        other data."""
        here = content_of(self.recipe.student, self.recipe.distill.teachers, train) if self.world.main else {}
        content = self.world.broadcast(here)
        self.data = {
            "num_classes": train.num_classes, "class_names": train.source.class_names, "content": content,
        }  # fmt: skip
        if self.found is None:
            return
        path, _, meta = self.found
        saved = loads(meta["recipe"], str(path))
        check_classes(meta, train.num_classes, train.source.class_names)
        check_content(self.recipe, meta["content"], content)
        if other := changed_fields(at_stored_paths(self.recipe, saved, meta["content"], content), saved):
            fields = f"{', '.join(other)} differ{'s' * (len(other) == 1)}"
            self.keep(meta["recipe"])
            raise UserError(
                f"{path}: was written by another recipe ({fields}); resume with {self.path}/recipe.yaml, or start a "
                f"new run with {of_new_run(self.path)}"
            )

    def begin(self) -> None:
        """At the start of a run that is not complete: from here on the folder is this run's, and is written."""
        if self.lock is not None:
            self.lock.keep()
            self.lock.claim()
            checkpoint.remove_drafts(self.path / "checkpoints")
            if self.saved_step:
                checkpoint.quarantine(self.path / "checkpoints", self.saved_step)
            (self.path / "summary.json").unlink(missing_ok=True)
            write_atomic(self.path / "recipe.yaml", dump(self.recipe))

    def keep(self, text: str = "") -> None:
        """Before a file is written: the folder and `recipe.yaml` are made anew where they are gone. See `FolderLock`.

        Args:
            text: of the recipe that the folder is to hold, by default this one.
        """
        if self.lock is None:
            return
        self.lock.keep()
        if not (path := self.path / "recipe.yaml").exists():
            log.warning("%s: is gone, as by clearing the folder; written anew", path)
            write_atomic(path, text or dump(self.recipe))

    def stored_summary(self, step: int) -> dict[str, Any] | None:
        """What this run wrote at its end, after `step` steps, for all ranks; None where it has not, or is damaged."""
        found = read_summary(self.path, self.recipe.run.seed) if self.world.main else None
        return self.world.broadcast(found if found and found["steps"] == step else None)

    def restore(self, state: TrainState, val: Loader | None) -> dict[str, Any]:
        """Loads `found` into the state; returns its metadata, less accuracies where other images are evaluated.
        Without a checkpoint to continue from: `initial_meta`.
        """
        if val is not None:
            self.data["content"]["data.val"] = self.world.broadcast(val.source.fingerprint() if self.world.main else "")
        if self.found is None:
            return checkpoint.initial_meta()
        path, tensors, meta = self.found
        state.load(tensors)
        self.saved_step = self._first_step = meta["step"]
        log.info("resumed %s at step %d", path, self.saved_step)
        self.found = None  # frees its tensors
        before = meta["content"].get("data.val")
        differing = difference(self.recipe, loads(meta["recipe"], str(path)))
        other = before is not None and before != self.data["content"].get("data.val")
        if other or any(name.startswith("data.eval_") for name in differing):
            log.info("evaluation reads other images than before; the best accuracy so far does not count")
            costs = {name: cost for name, cost in meta["costs"].items() if name != "evaluate"}
            meta = {**meta, "best": {}, "result": {}, "costs": costs}
        return meta

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """A checkpoint of this moment; the file is written by another thread. `meta` is what the caller adds."""
        if not self.world.main:
            return
        with self.ledger.during("checkpoint"):
            self.writer.wait()
            began = time.perf_counter()
            self.keep()
            own = {
                "step": step,
                "recipe": dump(self.recipe),
                "seconds": self.ledger.read(),
                "devices": self.world.size,
                "versions": versions(),
            }
            self.writer.save(step, state.tensors(), own | self.data | meta)
            self.copy_seconds, self.saved_step = time.perf_counter() - began, step

    @property
    def save_seconds(self) -> float | None:
        """What the last save took, copy and file; None before the first."""
        return self.copy_seconds + self.writer.seconds if self.writer.seconds else None

    def close(self, step: int, error: BaseException | None = None) -> None:
        """Records how long the run was held; not for one that is complete, or refused before its first step.

        Args:
            step: steps done; if they are saved, no second counts as lost.
            error: which ended the run.
        """
        if self._heartbeat is None or self.lock is None:
            return
        self._heartbeat.stop(step if step == self.saved_step else None)
        refused = isinstance(error, (UserError, Complete)) and not isinstance(error, DataError)
        if not refused or step != self._first_step or not self.lock.held():
            return
        if self._held_before is None:
            (self.path / HELD).unlink(missing_ok=True)
        else:
            with replacing(self.path / HELD) as draft:
                draft.write_bytes(self._held_before)


def versions() -> dict[str, str]:
    """Versions that produced the numbers."""
    return {"std_fast": __version__, "torch": torch.__version__, "python": platform.python_version()}
