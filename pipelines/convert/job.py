"""Converts a dataset to a `.beton` that any FFCV reads, and a manifest X.beton.json beside it.

    list the source (sources) and put it in order
    -> fetch the images of tasks of 32, where they are on another machine (remote_tree)
    -> convert the tasks in processes (workers, image_prep)
    -> lay their bytes out in that order (beton_writer), recording what is done (journal)
    -> header, checksum, manifest (manifest), rename

The bytes depend on the source, the settings and the versions of the JPEG libraries, which the manifest names; not on
the number of processes, nor on how often the conversion was killed and started again. Nothing is visible under the
final name before it is complete and on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.convert.beton_writer import ROW_TYPE, Packer, data_start, finish, write_payload
from pipelines.convert.journal import ConvertJournal, WorkFolder
from pipelines.convert.listing import DISK_FULL, Listing
from pipelines.convert.manifest import MANIFEST_VERSION, make_manifest, shown_settings
from pipelines.convert.progress import ConvertMeter, ConvertProgress
from pipelines.convert.remote_tree import Fetcher
from pipelines.convert.sources import list_source, ordered_as_text, refuse_replaced
from pipelines.convert.workers import SAMPLE_TYPE, ConvertTask, DoneTask, Workers
from pipelines.errors import DataError, UserError, printable
from pipelines.files import sha256, sync
from pipelines.read.beton import TABLE_TYPE
from pipelines.read.image_prep import ConvertSettings, library_versions
from pipelines.read.remote import is_url, shown
from pipelines.untrusted import read_json

__all__ = ["ConvertSettings", "ConvertProgress", "convert"]

log = logging.getLogger("std_fast")

TASK = 32  # images; the bytes of a beton do not depend on it
PROBES = 256  # images, at most, that are converted beforehand to estimate the size
MARGIN = 1.1  # of the estimate, before the disk is said to hold it
SHOWN_FAULTS, SHOWN_CLASSES = 5, 12
ON_ERROR = ("stop", "skip")


def convert(
    src: str,
    dst: str,
    *,
    settings: ConvertSettings | None = None,
    workers: int = 0,
    on_error: str = "stop",
    shard: tuple[int, int] = (0, 1),
    progress: Callable[[ConvertProgress], None] | None = None,
) -> dict[str, Any]:
    """Converts `src` (a path or a URL, see `sources`) to the beton `dst` and returns its manifest.

    Run again after an interruption, it continues where it stopped; run again after its end, it finds the work done.

    workers: processes; 0 = one per core this process may use.  on_error: with "stop", all images are tried, and if any
    cannot be converted there is an error that names them, and no beton; with "skip" they are left out and listed in the
    manifest.  shard: (i, n) converts part i of n, 0 <= i < n; open all parts together as one dataset.
    Raises UserError for mistakes in the arguments or the source, a full disk, a second writer of `dst`, or a converting
    process that dies; DataError for images that cannot be converted.
    """
    settings = settings or ConvertSettings()
    if on_error not in ON_ERROR:
        raise UserError(f"on_error {on_error!r} is unknown: choose one of {', '.join(ON_ERROR)}")
    if not 0 <= shard[0] < shard[1]:
        raise UserError(f"shard {shard[0]}/{shard[1]}: must be i/n with 0 <= i < n")
    if workers < 0:
        raise UserError(f"workers {workers} must be 0 (one per core) or more")
    if is_url(dst):
        raise UserError(f"{shown(dst)}: is a URL; write to a disk, then copy the .beton and its .json there")
    if os.path.isdir(dst) or not os.path.basename(dst):
        raise UserError(f"{printable(dst)}: is a folder; name the file to write, X.beton say")
    if not os.path.isdir(os.path.dirname(os.path.abspath(dst))):
        raise UserError(f"{printable(os.path.dirname(dst))}: no such folder; make it first")
    folder = WorkFolder(dst)
    try:
        listing = list_source(src, settings, folder.path)
        _log_classes(shown(src) if is_url(src) else printable(src), listing, settings)
        conversion = _Conversion(listing, dst, settings, shard, folder)
        finished = conversion.finished(on_error)
        if finished is not None:
            folder.remove()
            log.info("%s: was made before, of the same source and settings; not read now: `std-fast verify`", dst)
            return finished
        with contextlib.closing(ConvertJournal(folder, conversion.identity)) as journal:
            conversion.run(journal, workers or len(os.sched_getaffinity(0)), progress)
            refuse_replaced(listing, src, folder.path)
            return conversion.complete(journal, on_error, progress)
    except OSError as error:
        free = shutil.disk_usage(folder.path if os.path.isdir(folder.path) else os.path.dirname(folder.path)).free
        fix = "free some space" if error.errno in DISK_FULL else "fix that"
        raise UserError(
            f"{printable(dst)}: writing failed ({error.strerror}; {_size(free)} are free); {fix} and run the same "
            "command: it continues where it stopped"
        ) from error
    finally:
        folder.close()


class _Conversion:
    """One call of `convert`, from a listing to the finished file."""

    def __init__(
        self, listing: Listing, dst: str, settings: ConvertSettings, shard: tuple[int, int], folder: WorkFolder
    ) -> None:
        self.listing, self.dst, self.settings, self.shard, self.folder = listing, dst, settings, shard, folder
        self.order = _order(len(listing), settings.seed)[shard[0] :: shard[1]]
        self.total = len(self.order)
        if not self.total and len(listing):
            raise UserError(
                f"shard {shard[0]}/{shard[1]}: no image falls to it; make fewer shards of {len(listing)} images"
            )
        self.raw = _stored_raw(len(listing), settings)
        self.tasks = -(-self.total // TASK)
        self.start = data_start(self.total, settings.page_size)
        self.packer = Packer(self.start, settings.page_size)
        self.done: list[DoneTask] = []
        basis = [shown_settings(settings), library_versions(), listing.kind, self.total, shard, TASK, MANIFEST_VERSION]
        self.identity = hashlib.sha256(json.dumps(basis).encode()).hexdigest()
        request = [self.identity, listing.digest(self.order), listing.classes, listing.faults]
        self.request = hashlib.sha256(json.dumps(request).encode()).hexdigest()

    def finished(self, on_error: str) -> dict[str, Any] | None:
        """The manifest, when an earlier run has made just this file. Raises UserError when `dst` is something else."""
        if not os.path.lexists(self.dst):
            return None
        try:
            manifest = read_json(f"{self.dst}.json")
            same = manifest["request"] == self.request and manifest["bytes"] == os.path.getsize(self.dst)
            if same and (on_error == "skip" or not manifest["faults"]):
                return manifest
        except (OSError, ValueError, TypeError, KeyError):
            pass
        raise UserError(f"{printable(self.dst)}: exists, made from something else; remove it or choose another name")

    def sources(self, task: int) -> npt.NDArray[np.int64]:
        """Numbers in the listing of a task's images."""
        return self.order[task * TASK : (task + 1) * TASK]

    def _task(self, number: int, sources: npt.NDArray[np.int64]) -> ConvertTask:
        indices = sources.tolist()
        return ConvertTask(number, indices, [self.listing.place(i) for i in indices], self.raw[sources].tolist())

    def run(self, journal: ConvertJournal, count: int, report: Callable[[ConvertProgress], None] | None) -> None:
        """Converts what earlier runs have not."""
        digests = [self.listing.digest(self.sources(task)) for task in range(self.tasks)]
        self.done = journal.resume(digests, self.packer)
        first = len(self.done)
        if first:
            log.info("%s: %d of %d tasks were done by an earlier run", self.dst, first, self.tasks)
        if first == self.tasks:
            return
        listing, work = self.listing, self.folder.path
        count = min(count, self.tasks - first)
        with (
            Workers(count, self.settings, listing.files, listing.kind == "cifar", listing.names, work) as workers,
            contextlib.closing(Fetcher(listing, work, self.settings.max_bytes)) as fetcher,
        ):
            estimate = self._estimate(workers, fetcher)
            self._refuse_if_too_large(estimate)
            before = sum(len(done.samples) + len(done.faults) for done in self.done)
            meter = ConvertMeter(self.total, before, estimate, self.start, report)
            tasks = (self._task(number, self.sources(number)) for number in range(first, self.tasks))
            try:
                for done in workers.run(fetcher.tasks(tasks)):
                    fetcher.discard(done.number)
                    addresses = self.packer.place(done.samples["size"])
                    write_payload(journal.data_fd, done.payload, addresses, done.samples["size"])
                    journal.add(done, digests[done.number])
                    self.done.append(done._replace(payload=b""))
                    meter.add(len(done.samples) + len(done.faults), self.packer.end)
            finally:
                journal.commit()
        meter.show(self.packer.end)

    def _estimate(self, workers: Workers, fetcher: Fetcher) -> float:
        """Bytes per image, from what is converted already, or from images spread over the source."""
        sizes = [done.samples["size"] for done in self.done]
        if not sum(map(len, sizes)):
            number = min(PROBES, max(1, self.total // 64))
            probes = self.order[np.linspace(0, self.total - 1, number).astype(np.int64)]
            parts = (probes[start : start + 4] for start in range(0, number, 4))
            tasks = (self._task(-1 - i, part) for i, part in enumerate(parts))
            for done in workers.run(fetcher.tasks(tasks)):
                fetcher.discard(done.number)
                sizes.append(done.samples["size"])
        found = np.concatenate(sizes)
        if not len(found):  # none of them could be converted
            sizes_in = self.listing.sizes
            found = sizes_in[sizes_in <= self.settings.max_bytes]
        return float(found.mean()) if len(found) else 0.0

    def _refuse_if_too_large(self, per_image: float) -> None:
        left = self.total - sum(len(done.samples) + len(done.faults) for done in self.done)
        data = int(left * per_image) + self.total * TABLE_TYPE.itemsize
        needed = int(data * MARGIN) + self.total * ROW_TYPE.itemsize
        free = shutil.disk_usage(self.folder.path).free
        if needed > free:
            raise UserError(
                f"{printable(self.dst)}: needs about {_size(needed)} more, but {_size(free)} are free on that disk; "
                "free some, choose another disk, or lower `size` or `quality`"
            )

    def complete(
        self, journal: ConvertJournal, on_error: str, progress: Callable[[ConvertProgress], None] | None
    ) -> dict[str, Any]:
        """Checks the result, writes header and manifest, and gives both files their names."""
        faults = self.listing.faults + sorted(
            (printable(self.listing.names[source]), reason) for done in self.done for source, reason in done.faults
        )
        samples = np.concatenate([np.zeros(0, SAMPLE_TYPE), *(done.samples for done in self.done)])
        self._report(faults, len(samples), on_error)
        labels = self.listing.labels[samples["source"]]
        packer = Packer(self.start, self.settings.page_size)
        finish(journal.data_fd, samples, packer.place(samples["size"]), labels, packer.end, self.settings.page_size)
        os.fsync(journal.data_fd)
        if progress is not None:
            progress(ConvertProgress("checksum", self.total, self.total, 0.0, 0.0, packer.end))
        manifest = make_manifest(self.listing, self.settings, self.shard, samples, faults, self.done) | {
            "bytes": os.fstat(journal.data_fd).st_size,
            "sha256": sha256(self.folder.file("data")),
            "request": self.request,
        }
        draft = Path(self.folder.file("manifest"))
        draft.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        sync(draft)
        # The manifest first: where there is a beton, its manifest is there too.
        os.rename(draft, f"{self.dst}.json")
        os.rename(self.folder.file("data"), self.dst)
        sync(os.path.dirname(os.path.abspath(self.dst)))
        with contextlib.suppress(FileNotFoundError):
            os.remove(_faults_file(self.dst))
        self.folder.remove()
        return manifest

    def _report(self, faults: list[tuple[str, str]], good: int, on_error: str) -> None:
        """Raises DataError when the faults forbid a beton."""
        if faults and on_error == "stop" or not good:
            with open(_faults_file(self.dst), "w", encoding="utf-8") as file:
                file.writelines(f"{name}\t{reason}\n" for name, reason in faults)
            shown = "; ".join(f"{name} ({reason})" for name, reason in faults[:SHOWN_FAULTS])
            if len(faults) > SHOWN_FAULTS:
                shown += f"; and {len(faults) - SHOWN_FAULTS} more"
            fix = "fix or remove them"
            if good:
                fix += f", or pass --on-error skip; what is converted is kept in {printable(self.folder.path)}"
            raise DataError(
                f"{len(faults)} of {good + len(faults)} images cannot be converted: {shown}; "
                f"all are listed in {printable(_faults_file(self.dst))}; {fix}"
            )
        for name, reason in faults:
            log.warning("%s: left out: %s", name, reason)


def _order(n: int, seed: int | None) -> npt.NDArray[np.int64]:
    """Numbers in the listing in the order in which samples are stored, int64 [n]."""
    if seed is None:
        return np.arange(n, dtype=np.int64)
    from pipelines import rng  # imports torch, which takes seconds: only where it is needed

    words = rng.bits(seed, 0, np.arange(n, dtype=np.int64), rng.Purpose.CONVERT_ORDER)
    keys = words[:, 0].astype(np.uint64) << np.uint64(32) | words[:, 1]
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def _stored_raw(n: int, settings: ConvertSettings) -> npt.NDArray[np.bool_]:
    """Which images of the listing are stored raw, bool [n]."""
    if settings.mode != "proportion":
        return np.full(n, settings.mode == "raw")
    from pipelines import rng

    draws = rng.uniform(settings.seed or 0, 0, np.arange(n, dtype=np.int64), rng.Purpose.CONVERT_MODE)
    return draws[:, 0] < settings.raw_share


def classes_in_words(names: Sequence[str]) -> str:
    """`0 = ant, 1 = bee, ..., 899 = yak`: at most SHOWN_CLASSES, the first ones and the last."""
    shown = [f"{i} = {name}" for i, name in enumerate(names)]
    if len(shown) > SHOWN_CLASSES:
        shown[SHOWN_CLASSES - 1 : -1] = ["..."]
    return ", ".join(shown)


def _log_classes(name: str, listing: Listing, settings: ConvertSettings) -> None:
    """Logs which class has which number, and warns of numbers in the order of text and of empty classes."""
    names = listing.classes
    log.info("%s: %d images of %d classes: %s", name, len(listing), len(names), classes_in_words(names))
    if settings.classes is None and ordered_as_text(names):
        log.warning(
            "%s: class names are numbers in the order of text, as torchvision's ImageFolder has them; give --classes "
            "(one name a line) for another order",
            name,
        )
    empty = np.flatnonzero(np.bincount(listing.labels, minlength=len(names)) == 0)
    if len(empty):
        log.warning("%s: %d of the classes have no image, e.g. %s", name, len(empty), names[empty[0]])


def _faults_file(dst: str) -> str:
    return f"{dst}.faults.txt"


def _size(number: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
