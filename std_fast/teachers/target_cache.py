"""Stored teacher targets: what the teachers said about each position of an epoch, read instead of asked again.

By DESIGN.md's rule 1 a batch is a pure function of seed, epoch and position, so an answer stored for (epoch, position)
is the answer to exactly the image that any later run with the same data settings shows there: other students and
optimizers train from it, to the bit as with the teachers running.

A store is a folder:
    targets.json          the format, the fingerprint of everything that the targets depend on, and their shape
    epoch-00003.targets   little-endian uint16 [N, M, W], then 16 bytes of BLAKE2b over header, epoch and content
    .epoch-00004.*.partial   an epoch that is being written; it gets its name when it is whole
W words of a teacher and a position: label + 1 (so that a place never written reads as 0), confidence (the bits of a
float16), and for soft labels k probabilities (float16) and their k classes. With hard labels that is 4 bytes.

Shapes: N positions of an epoch, B batch, M teachers, K classes, W words.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.augment.device import TrainBatch
from pipelines.errors import UserError
from pipelines.files import sync, write_atomic
from pipelines.read.batch import Loader
from pipelines.untrusted import open_regular, read_json
from std_fast import __version__
from std_fast.config.legacy import cache_file
from std_fast.config.recipe import Duration, Recipe
from std_fast.config.schema import to_dict
from std_fast.method.losses import TeacherTargets
from std_fast.runtime.distributed import SINGLE_PROCESS, World
from std_fast.teachers.classes import class_names
from std_fast.teachers.classifiers import read_run, timm_config

FORMAT = 1
MOST_CLASSES = 65535  # label + 1 has 16 bits
DIGEST_BYTES = 16
LEGACY_DEFAULTS = {"precision": "auto", "classes": ""}
"""fields of a teacher that stores of earlier versions lack, as they were then"""
log = logging.getLogger("std_fast")


# -- what the targets depend on -------------------------------------------------------------------------------------


def fingerprint(recipe: Recipe, loader: Loader, precision: str) -> dict[str, Any]:
    """Everything that decides an answer, under the names of the recipe's fields; plain JSON values.

    Not among them: the batch (targets are the same in every batch, up to rounding where kernels depend on its size),
    how many epochs there are and how they are cycled (`distill.views`: an epoch shows what it shows), the number of
    processes, torch.compile (rounding again), and what only the student and its training use.

    Args:
        precision: of the teachers, resolved.
    """
    d, spec = recipe.distill, loader.spec
    values: dict[str, Any] = {
        "data.train": loader.source.fingerprint(),
        "data.image_size": spec.image_size,
        "data.backend": loader.backend,  # each has pixels of its own
        "data.resample": spec.resample,
        **_flat("data.crop", to_dict(spec.crop)),
        **_flat("augment", to_dict(recipe.augment)),
        "run.seed": recipe.run.seed,
        "run.device": spec.device.partition(":")[0],  # which decodes, augments and rounds in its own way
        "run.precision": precision,
        "distill.labels": d.labels,
        "distill.temperature": d.temperature,
        "distill.top_k": d.top_k,
        "classes": loader.num_classes,
        "distill.teachers": len(d.teachers),
    }
    for i, teacher in enumerate(d.teachers):
        digest = weights_digest(teacher.weights, teacher.name)
        names = teacher.classes
        if Path(names).is_file():
            names = hashlib.blake2b("\n".join(class_names(names, "")).encode(), digest_size=DIGEST_BYTES).hexdigest()
        values |= _flat(f"distill.teachers.{i}", to_dict(teacher) | {"weights": digest, "classes": names})
    return values


def _flat(prefix: str, values: dict) -> dict[str, Any]:
    return {f"{prefix}.{name}": value for name, value in values.items()}


def weights_digest(weights: str, name: str) -> str | None:
    """Identity of a teacher's weights: digest of the file, of a Hugging Face folder's files, or of a run's newest
    weights and what belongs to them; for timm's downloads the name of the source. None where they are not at hand.
    """
    if weights == "pretrained":
        config = timm_config(name)
        return f"timm {config.hf_hub_id or config.url}"
    path = Path(weights.removeprefix("local-dir:"))
    h = hashlib.blake2b(digest_size=DIGEST_BYTES)
    if (path / "recipe.yaml").is_file():
        run = read_run(path)
        r = run.recipe
        about = [to_dict(r.student), list(r.augment.mean), list(r.augment.std), r.data.image_size]
        h.update(json.dumps(about, sort_keys=True).encode())
        for key in sorted(run.state):
            h.update(f"{key} {run.state[key].dtype} {tuple(run.state[key].shape)};".encode())
            h.update(run.state[key].contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return h.hexdigest()
    kinds = (".json", ".safetensors", ".bin", ".pth", ".pt")
    files = [path] if path.is_file() else sorted(f for f in path.glob("*") if f.suffix in kinds and f.is_file())
    for file in files:
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 24):
                h.update(chunk)
    return h.hexdigest() if files else None


def epochs_needed(recipe: Recipe, steps_per_epoch: int) -> int | None:
    """How many different epochs a run shows; None where only its clock knows."""
    length = Duration.parse(recipe.run.length)
    if length.unit == "gpu-hours":
        return recipe.distill.views or None
    epochs = max(1, -(-length.steps(steps_per_epoch, recipe.run.batch) // steps_per_epoch))
    return min(epochs, recipe.distill.views or epochs)


def bytes_per_epoch(samples: int, teachers: int, top_k: int = 0) -> int:
    """Size of one epoch's file."""
    return samples * teachers * (2 + 2 * top_k) * 2 + DIGEST_BYTES


# -- words ----------------------------------------------------------------------------------------------------------


def pack(targets: TeacherTargets) -> Tensor:
    """Answers of a batch -> their words, uint16 in the bits of int16 `[B, M, W]`, on the same device."""
    words = [(targets.labels + 1)[..., None].to(torch.int16), targets.confidence[..., None].view(torch.int16)]
    if targets.top_probs is not None and targets.top_classes is not None:
        words += [targets.top_probs.contiguous().view(torch.int16), targets.top_classes.to(torch.int16)]
    return torch.cat(words, -1)


def unpack(words_BMW: Tensor, soft: bool) -> TeacherTargets:
    """The inverse of `pack`; without `soft` the distribution is left out."""
    labels = (words_BMW[..., 0].long() & 0xFFFF) - 1
    confidence = words_BMW[..., 1].contiguous().view(torch.float16)
    if not soft:
        return TeacherTargets(labels, confidence)
    probs, classes = words_BMW[..., 2:].chunk(2, -1)
    return TeacherTargets(labels, confidence, None, probs.contiguous().view(torch.float16), classes.long() & 0xFFFF)


# -- the store ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """What `targets.json` says."""

    fingerprint: dict[str, Any]
    classes: int
    teachers: int
    top_k: int
    """probabilities stored of each teacher; 0 for hard labels"""

    @property
    def words(self) -> int:
        return 2 + 2 * self.top_k

    @property
    def row_bytes(self) -> int:
        return 2 * self.teachers * self.words

    def digest(self, epoch: int) -> hashlib.blake2b:
        """Begun with all but the content, so that a file from another store or of another epoch is noticed."""
        about = json.dumps([FORMAT, self.fingerprint, self.classes, self.teachers, self.top_k, epoch], sort_keys=True)
        return hashlib.blake2b(about.encode(), digest_size=DIGEST_BYTES)


def header_for(recipe: Recipe, values: dict[str, Any]) -> Header:
    """The header of a new store. UserError: too many classes, or weights of a teacher that are not there."""
    classes = values["classes"]
    if classes > MOST_CLASSES:
        raise UserError(
            f"distill.target_cache: the data has {classes} classes, stored targets hold {MOST_CLASSES}; leave it out"
        )
    for i, teacher in enumerate(recipe.distill.teachers):
        if values[f"distill.teachers.{i}.weights"] is None:
            raise UserError(
                f"distill.teachers.{i}.weights: {teacher.weights} is not there, and no targets are stored yet"
            )
    return Header(values, classes, len(recipe.distill.teachers), min(recipe.distill.top_k, classes - 1))


def read_header(folder: Path) -> Header:
    """UserError when it is no store's, damaged, or of another format."""
    path = cache_file(folder / "targets.json")
    mend = "give another folder, or remove it and run `std-fast teach`"
    try:
        data = read_json(path)
        format_found = data["format"]
        header = Header(data["fingerprint"], data["classes"], data["teachers"], data["top_k"])
        numbers = (header.classes, header.teachers, header.top_k)
        sound = isinstance(header.fingerprint, dict) and all(type(n) is int and 0 <= n <= MOST_CLASSES for n in numbers)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no header of stored targets ({type(error).__name__}); {mend}") from None
    if format_found != FORMAT:
        raise UserError(f"{path}: format {format_found!r}, this version reads {FORMAT}; {mend}")
    if not (sound and header.teachers >= 1 and header.classes >= 1 and header.top_k < header.classes):
        raise UserError(f"{path}: is damaged: sizes that cannot be; {mend}")
    return header


def check_same(folder: Path, stored: dict[str, Any], ours: dict[str, Any]) -> None:
    """UserError naming the first field in which this run differs from the one that stored the targets."""
    hard = ours["distill.labels"] == "hard"  # which a store of soft labels has too
    soft_only = {"distill.labels", "distill.temperature", "distill.top_k"} if hard else set()
    for name in sorted({*stored, *ours} - soft_only - {"distill.views"}):  # earlier versions had the last one
        there, here = stored.get(name, LEGACY_DEFAULTS.get(name.rpartition(".")[2])), ours.get(name)
        if there == here or (name.endswith(".weights") and here is None):  # not on this machine: nothing to compare
            continue
        what = {"data.train": "other data", "classes": "other classes"}.get(name)
        if name.endswith(".weights"):
            what = "other weights"
        was, now = (what, "those") if what else (repr(there), repr(here))
        raise UserError(
            f"{name}: the targets in {folder} are of {was}, this run has {now}; set it back, or give "
            "distill.target_cache another folder"
        )


class TargetCache:
    """A folder of targets as one run uses it.

    What it writes is written by a thread, which also waits for the copies from the device; what goes wrong there is
    raised by the next call.

    Args:
        rows: positions of an epoch that the run needs, from 0 on.
        batch: positions of a step over all ranks.
        soft: whether the run wants the distribution.
    """

    def __init__(
        self, folder: Path, header: Header, rows: int, batch: int, soft: bool, world: World = SINGLE_PROCESS
    ) -> None:
        self.folder, self.header, self.world = folder, header, world
        self.rows, self.batch, self.soft = rows, batch, soft
        self._words: dict[int, np.ndarray] = {}
        self._writers: dict[int, EpochWriter] = {}
        self._jobs: deque[Future[None]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="std_fast-targets")

    def path(self, epoch: int) -> Path:
        return cache_file(self.folder / f"epoch-{epoch:05d}.targets")

    def stored(self, epoch: int) -> bool:
        """Whether the epoch is there, for as many positions as are needed."""
        try:
            return os.stat(self.path(epoch)).st_size >= self.rows * self.header.row_bytes + DIGEST_BYTES
        except OSError:
            return False

    def missing(self, epochs: int) -> list[int]:
        return [epoch for epoch in range(epochs) if not self.stored(epoch)]

    # -- reading ------------------------------------------------------------------------------------------------------

    def open(self, epoch: int) -> np.ndarray:
        """Words of a stored epoch, uint16 `[N, M, W]`, whose digest and contents have been checked.

        The last one stays in memory (a few MB for each million images and teacher). A memory map would end the process
        where the file shrinks or the disk fails.

        Raises:
            UserError: the file is missing or damaged.
        """
        if epoch not in self._words:
            self._words = {epoch: self._load(epoch)}
        return self._words[epoch]

    def _load(self, epoch: int) -> np.ndarray:
        h, path = self.header, self.path(epoch)
        mend = "run `std-fast teach` to make it again"
        try:
            with open_regular(path) as file:
                data = file.read()
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); {mend}") from None
        size = len(data) - DIGEST_BYTES
        if size <= 0 or size % h.row_bytes:
            raise UserError(f"{path}: is cut short; {mend}")
        words = np.frombuffer(data, "<u2", size // 2).reshape(-1, h.teachers, h.words)
        expected = data[size:]
        digest = h.digest(epoch)
        digest.update(words.reshape(-1).data)
        if digest.digest() != expected:
            raise UserError(f"{path}: its digest does not match: the file is damaged, or of another store; {mend}")
        if fault := _fault(words, h.classes):
            raise UserError(f"{path}: holds {fault}; {mend}")
        return words

    def find(self, epoch: int) -> np.ndarray | None:
        """Words of an epoch, as `open` gives them; None where it is not stored. Every rank must call it.

        Raises:
            UserError: the epoch is damaged, or what was written before could not be.
        """
        if epoch in self._writers:
            self.wait()
        return self.open(epoch) if self.world.broadcast(epoch in self._words or self.stored(epoch)) else None

    def read(self, words: np.ndarray, batch: TrainBatch) -> TeacherTargets:
        """Targets of this rank's rows of a batch, from its epoch's words; the host does not wait for the device."""
        B = len(batch.positions)
        first = batch.step * self.batch + self.world.rank * B
        rows = torch.from_numpy(words[first : first + B].astype(np.uint16).view(np.int16))
        if batch.positions.is_cuda:
            rows = rows.pin_memory().to(batch.positions.device, non_blocking=True)
        return unpack(rows, self.soft)

    # -- writing ------------------------------------------------------------------------------------------------------

    def writer(self, epoch: int) -> EpochWriter:
        """See `EpochWriter`; every rank must ask for it."""
        writer = self._writers[epoch] = EpochWriter(self, epoch)
        return writer

    def submit(self, job: Callable[..., None], *args: Any) -> None:
        """For the writers: runs `job` in the thread, after those before it."""
        while self._jobs and self._jobs[0].done():
            self._result(self._jobs.popleft())
        self._jobs.append(self._pool.submit(job, *args))

    def _result(self, job: Future[None]) -> None:
        try:
            job.result()
        except OSError as error:
            raise UserError(
                f"distill.target_cache: {self.folder} cannot be written ({error}); free space, or give another folder"
            ) from None

    def wait(self) -> None:
        """Until all that was given to writers is on the disk. Raises UserError when it cannot be."""
        while self._jobs:
            self._result(self._jobs.popleft())

    def close(self) -> None:
        """Ends all writers, waits too, and ends the thread."""
        for writer in self._writers.values():
            writer.end()
        self._pool.shutdown(wait=True)
        self.wait()


def _fault(words: np.ndarray, classes: int) -> str:
    """What an intact file may not hold, because it would be used as an index or end in a NaN; empty if all is well."""
    labels, k = words[..., 0], (words.shape[2] - 2) // 2
    if not labels.all():
        return "positions without an answer"
    numbers = np.concatenate([words[..., 1:2], words[..., 2 : 2 + k]], -1).astype(np.uint16).view(np.float16)
    if labels.max() > classes or (k and words[..., 2 + k :].max() >= classes):
        return f"classes beyond the {classes} of the data"
    return "" if np.isfinite(numbers).all() else "numbers that are not finite"


class EpochWriter:
    """Stores the targets of one epoch. Only rank 0 writes, what it gathers from all.

    An epoch that is not finished stays in its partial file, and the next writer of the same epoch goes on with it.

    Raises:
        UserError: another process writes this epoch, or the disk is full or cannot be written; from any method.
    """

    def __init__(self, store: TargetCache, epoch: int) -> None:
        self.store, self.epoch, self.header = store, epoch, store.header
        self.path = store.folder / f".epoch-{epoch:05d}.{self.header.digest(epoch).hexdigest()[:8]}.partial"
        self._fd = -1
        if store.world.main:
            store.submit(self._open)
            store.wait()

    def _open(self) -> None:
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._fd).st_ino != os.stat(self.path).st_ino:  # finished by another process just now
                raise FileNotFoundError
            os.posix_fallocate(self._fd, 0, self.store.rows * self.header.row_bytes)  # a full disk shows here
        except OSError as error:
            os.close(self._fd)
            self._fd = -1
            if isinstance(error, (BlockingIOError, FileNotFoundError)):
                raise UserError(
                    f"{self.path}: another process is writing it; wait for it, or give another distill.target_cache"
                ) from None
            raise

    def filled(self) -> int:
        """How many positions from 0 on have their targets already (0 on other ranks than the first)."""
        if self._fd < 0:
            return 0
        shape = (self.store.rows, self.header.teachers, self.header.words)
        empty = ~np.asarray(np.memmap(self.path, "<u2", "r", shape=shape))[..., 0].all(1)
        return int(empty.argmax()) if empty.any() else self.store.rows

    def add(self, step: int, words_BMW: Tensor) -> None:
        """The words of this rank's rows of a step. Every rank must call it; the host does not wait for the device."""
        words = self.store.world.gather(words_BMW)
        if not self.store.world.main:
            return
        copied = None
        if words.is_cuda:
            host = torch.empty(words.shape, dtype=words.dtype, pin_memory=True)
            host.copy_(words, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        else:
            host = words
        self.store.submit(self._write, step * self.store.batch, host, copied)

    def _write(self, first: int, words: Tensor, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        rows = words[: max(0, self.store.rows - first)].numpy().astype("<i2").tobytes()
        at = first * self.header.row_bytes
        while rows:
            done = os.pwrite(self._fd, rows, at)
            rows, at = rows[done:], at + done

    def end(self) -> None:
        """No more steps: the epoch gets its name if all its positions are there. Does not wait; may be repeated."""
        if self._fd >= 0:
            self.store.submit(self._end)

    def _end(self) -> None:
        if self._fd < 0:
            return
        try:
            if self.filled() < self.store.rows:
                return
            size = self.store.rows * self.header.row_bytes
            digest = self.header.digest(self.epoch)
            digest.update(np.memmap(self.path, np.uint8, "r", shape=(size,)).data)
            os.ftruncate(self._fd, size)
            os.pwrite(self._fd, digest.digest(), size)
            os.fsync(self._fd)
            os.replace(self.path, self.store.path(self.epoch))
            sync(self.store.folder)
        finally:
            os.close(self._fd)
            self._fd = -1


def open_target_cache(
    recipe: Recipe, loader: Loader, precision: str, rows: int, world: World = SINGLE_PROCESS
) -> TargetCache | None:
    """The store of a recipe, made where there is none yet; None when the recipe names none.

    Args:
        rows: positions of an epoch that will be read or written.

    Raises:
        UserError: the folder is no store, was made with other settings, or cannot be made.
    """
    if not recipe.distill.target_cache:
        return None
    folder = Path(recipe.distill.target_cache)
    values = fingerprint(recipe, loader, precision)
    if world.main and not cache_file(folder / "targets.json").exists():
        _create(folder, header_for(recipe, values))
    world.wait_for_all()
    header = read_header(folder)
    check_same(folder, header.fingerprint, values)
    return TargetCache(folder, header, rows, recipe.run.batch, recipe.distill.labels == "soft", world)


def _create(folder: Path, header: Header) -> None:
    data = {
        "format": FORMAT,
        "fingerprint": header.fingerprint,
        "classes": header.classes,
        "teachers": header.teachers,
        "top_k": header.top_k,
        "made_with": {"std_fast": __version__, "torch": torch.__version__},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "targets.json", json.dumps(data, indent=1))
    except OSError as error:
        raise UserError(f"distill.target_cache: {folder} cannot be made ({error}); give another folder") from None
