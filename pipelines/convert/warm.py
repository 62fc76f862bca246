"""Brings betons to where they are read fast: from another machine into the cache folder, then into the page cache."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.errors import DataError, UserError, printable
from pipelines.files import sha256, write_atomic
from pipelines.read import remote
from pipelines.untrusted import MAX_JSON, read_json

log = logging.getLogger("std_fast")

_BLOCK = 1 << 24


def warm(path: str) -> dict[str, Any]:
    """Reads a beton once, so that the operating system holds it in memory as far as there is room.

    One at a URL is first copied into the cache folder, from where `open_source` opens it by that URL; {0..3} in the URL
    stands for several.

    Returns bytes, seconds and the files' paths. Raises UserError when something cannot be read or the disk is full,
    DataError when a copy is not what its manifest says.
    """
    began = time.monotonic()
    if remote.is_url(path):
        paths = [_to_cache(url) for url in remote.expand_braces(path)]  # which reads them
        total = sum(map(os.path.getsize, paths))
    else:
        paths, total = [path], sum(map(len, _blocks(path)))
    return {"bytes": total, "seconds": time.monotonic() - began, "paths": paths}


def _blocks(path: str) -> Iterator[memoryview]:
    """The file's bytes. Raises UserError."""
    block = bytearray(_BLOCK)
    try:
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while count := file.readinto(block):
                yield memoryview(block)[:count]
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{printable(path)}: cannot be read ({reason}); give a beton") from None


def _to_cache(url: str) -> str:
    """Path of the beton in the cache, where it is as on the server now."""
    path = remote.cache_path(url)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with _locked(f"{path}.lock"):
            _copy(url, path)
    except OSError as error:
        raise UserError(
            f"{printable(path)}: cannot be written ({error.strerror}); free some space, or set "
            "STD_FAST_CACHE to a folder on another disk"
        ) from None
    return path


def _copy(url: str, path: str) -> None:
    file = remote.info(url)
    origin: dict[str, Any] = {"size": file.size, "stamp": file.stamp}
    with contextlib.suppress(OSError, ValueError):
        before = read_json(f"{path}.origin")
        if origin.items() <= before.items() and os.path.getsize(path) == file.size:
            if before.get("sha256") == sha256(path):
                return
            log.warning("%s: is not as it was copied (%s); copied again", remote.shown(url), printable(path))
    manifest = _manifest(f"{url}.json")
    arriving = f"{path}.{file.size:x}-{file.stamp:x}"  # what an interrupted copy has left is of the same file
    remote.copy(file, arriving)
    origin["sha256"] = sha256(arriving)
    if manifest is None:
        log.warning("%s: has no manifest (.json): its checksum and class names are not known", remote.shown(url))
    else:
        if manifest.get("sha256") != origin["sha256"]:
            os.remove(arriving)
            raise DataError(f"{remote.shown(url)}: its checksum is not its manifest's; convert it again")
        write_atomic(Path(f"{path}.json"), json.dumps(manifest, indent=1))
    os.replace(arriving, path)
    write_atomic(Path(f"{path}.origin"), json.dumps(origin))
    for left in glob.glob(f"{glob.escape(path)}.*.part"):
        os.remove(left)


def _manifest(url: str) -> dict[str, Any] | None:
    """The manifest beside a beton, None where there is none. Raises UserError."""
    try:
        file = remote.info(url)
    except remote.NotFound:
        return None
    if file.size > MAX_JSON:
        raise UserError(f"{remote.shown(url)}: {file.size} bytes are too many for a manifest")
    try:
        manifest = json.loads(remote.read_all(file))
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict):
        raise UserError(f"{remote.shown(url)}: not a manifest; convert again")
    return manifest


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Waits until no other process brings the same file."""
    with open(path, "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
