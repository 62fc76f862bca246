"""A run's folder: one owner at a time, its checkpoints, and the record of how long the run was held."""

from __future__ import annotations

import fcntl
import itertools
import logging
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipelines.errors import UserError
from pipelines.files import replacing, write_atomic
from pipelines.read.batch import Loader
from pipelines.untrusted import read_json
from std_fast import __version__
from std_fast.config.recipe import Duration, Recipe, dump, loads, read_saved
from std_fast.config.schema import difference
from std_fast.runtime import checkpoint
from std_fast.runtime.budget import HELD, Heartbeat, Ledger, earlier
from std_fast.runtime.distributed import World
from std_fast.training.content import at_stored_paths, check_classes, check_content, check_paths, content_of
from std_fast.training.state import TrainState

log = logging.getLogger("std_fast")

SUMMARY = {"result": dict, "seconds": dict, "gpu_hours": float, "device": str, "steps": int, "seed": int}
"""types of what is read of a finished run's summary"""

# fields that a resumed run may change: they decide where and how fast, not what is computed, or, the last ones, what
# becomes of a run that would otherwise end
RESUMABLE_CHANGES = (
    "run.out", "run.log_every", "run.save_every", "run.keep_checkpoints", "run.timeout", "run.trackers",
    "data.on_corrupt", "data.corrupt_limit", "run.not_finite", "run.not_finite_limit", "run.rollback_every",
    "data.one_part", "data.threads", "data.ahead", "data.hw_decoder_load", "data.val", "run.eval_batch",
    "distill.target_cache", "summary", "name", "run.overlap", "run.micro_batch", "run.profile",
)  # fmt: skip


def changed_fields(one: Recipe, two: Recipe) -> list[str]:
    """Fields in which two recipes differ, and which a resumed run may not change."""
    return [name for name in difference(one, two) if name not in RESUMABLE_CHANGES]


def unused_beside(folder: Path) -> Path:
    """FOLDER-2, or the next that does not exist."""
    folder = folder if folder.name else folder.resolve()  # such as `.`
    return next(path for i in itertools.count(2) if not (path := Path(f"{folder}-{i}")).exists())


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

    Raises:
        UserError: the folder holds a run and `resume` is not asked for, or a run that cannot be read.
    """

    def __init__(self, recipe: Recipe, world: World, ledger: Ledger, resume: bool) -> None:
        self.recipe, self.world, self.ledger = recipe, world, ledger
        self.path = Path(recipe.run.out)
        self.writer = checkpoint.Writer(self.path / "checkpoints", recipe.run.keep_checkpoints)
        if not resume and checkpoint.listed(self.path / "checkpoints"):
            raise UserError(f"{self.path}: already holds a run; {self._way_on()}")
        self.found = self._newest() if resume else None
        self.saved_step, self.copy_seconds = 0, 0.0
        self.data: dict[str, Any] = {}  # what each checkpoint records of the data
        self._heartbeat: Heartbeat | None = None
        if world.main:
            checkpoint.remove_drafts(self.path / "checkpoints")
            if resume:
                if self.found is not None:
                    checkpoint.quarantine(self.path / "checkpoints", self.found.meta["step"])
                self._carry()
            self.path.mkdir(parents=True, exist_ok=True)
            self._held_before = held.read_bytes() if (held := self.path / HELD).exists() else None
            self._heartbeat = Heartbeat(self.path, ledger, self._beat_every())

    def _way_on(self) -> str:
        """What to do where the folder holds a run: resume it if it is this one, else take another folder."""
        other = f"--run.out {unused_beside(self.path)}"
        try:
            saved = read_saved(self.path)
            data = replace(self.recipe.data, train=saved.data.train)  # its content is compared when it is resumed
            differing = changed_fields(replace(self.recipe, data=data), saved)
        except UserError:  # no recipe beside the checkpoints
            return f"start this one with {other}"
        if differing:
            return f"it has another {', '.join(differing)}, so start this one with {other}"
        return f"add --resume to continue it, or start a new one with {other}"

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
        if found is None:
            log.info("%s holds no checkpoint yet: starting from the beginning", self.path)
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
            self._restore_recipe(meta["recipe"])
            raise UserError(
                f"{path}: was written by another recipe ({fields}); resume with {self.path}/recipe.yaml, or start a "
                f"new run with --run.out {unused_beside(self.path)}"
            )

    def write_recipe(self) -> None:
        """At the start of a run that is not complete: a summary from before is not its own."""
        if self.world.main:
            (self.path / "summary.json").unlink(missing_ok=True)
            write_atomic(self.path / "recipe.yaml", dump(self.recipe))

    def _restore_recipe(self, text: str) -> None:
        """Writes `recipe.yaml` anew where it is gone."""
        if self.world.main and not (path := self.path / "recipe.yaml").exists():
            log.warning("%s: is gone, as by clearing the folder; written anew", path)
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(path, text)

    def stored_summary(self, step: int) -> dict[str, Any] | None:
        """What this run wrote at its end, after `step` steps, for all ranks; None where it has not, or is damaged."""
        found: Any = None
        if self.world.main:
            with suppress(OSError, ValueError):
                found = read_json(self.path / "summary.json")
            typed = isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in SUMMARY.items())
            if typed and (found["steps"], found["seed"]) == (step, self.recipe.run.seed):
                self._restore_recipe(dump(self.recipe))
            else:
                found = None
        return self.world.broadcast(found)

    def restore(self, state: TrainState, val: Loader | None) -> dict[str, Any]:
        """Loads `found` into the state; returns its metadata, less accuracies where data.val is other data.
        Without a checkpoint to continue from: `initial_meta`.
        """
        if val is not None:
            self.data["content"]["data.val"] = self.world.broadcast(val.source.fingerprint() if self.world.main else "")
        if self.found is None:
            return checkpoint.initial_meta()
        path, tensors, meta = self.found
        state.load(tensors)
        self.saved_step = meta["step"]
        log.info("resumed %s at step %d", path, self.saved_step)
        self.found = None  # frees its tensors
        before = meta["content"].get("data.val")
        if before is not None and before != self.data["content"].get("data.val"):
            log.info("data.val: is other data than before; the best accuracy so far does not count")
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
            self._restore_recipe(dump(self.recipe))
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
        """Records how long the run was held; not for one that is complete, or refused before it began in a new folder.

        Args:
            step: steps done; if they are saved, no second counts as lost.
            error: which ended the run before it began.
        """
        if self._heartbeat is None:
            return
        self._heartbeat.stop(step if step == self.saved_step else None)
        if isinstance(error, UserError) and self._held_before is None:
            (self.path / HELD).unlink(missing_ok=True)
        elif isinstance(error, Complete) and self._held_before is not None:
            with replacing(self.path / HELD) as draft:
                draft.write_bytes(self._held_before)


@contextmanager
def locked(folder: Path, world: World) -> Iterator[None]:
    """The run's folder for this run alone. UserError when another process trains into it, or it cannot be."""
    if not world.main:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"run.out: {folder} is a file, or lies below one; name a folder") from None
    with open(folder / ".lock", "w", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: another process is training into it; give another --run.out") from None
        yield


def versions() -> dict[str, str]:
    """Versions that produced the numbers."""
    return {"std_fast": __version__, "torch": torch.__version__, "python": platform.python_version()}
