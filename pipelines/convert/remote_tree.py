"""Sources on other machines: their files as a tree, and the bytes of their images while they are converted.

No file is copied or unpacked where parts of files can be read: tars are listed by reading through them once
(all of it, when their images are small), and each image is fetched when its turn comes. Parquet and CIFAR's files, and
tars on servers without parts of files, are copied beside the result first; such a copy continues where it stopped.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from pipelines.convert.listing import SOURCES, Listing
from pipelines.convert.tar_index import FileReader, Reader
from pipelines.convert.trees import Entry
from pipelines.convert.workers import ConvertTask
from pipelines.errors import UserError
from pipelines.read import remote
from pipelines.read.remote import RemoteFile, is_url

WINDOW = 1 << 20  # bytes that are read at once while a tar is listed
THREADS = 32  # requests at a time
AHEAD = 8  # tasks whose images are fetched before a process asks for them


class RemoteTree:
    """A folder, or some files, by URL; copies are made in `work`. See `trees.Tree`."""

    def __init__(self, root: str, files: dict[str, RemoteFile], work: str, named: bool) -> None:
        """files: by their paths from the root."""
        self.root, self.named = remote.shown(root), named
        self.source = remote.shown(next(iter(files.values())).url) if named and len(files) == 1 else self.root
        self._base, self._files = root.rstrip("/"), files
        self._copies = os.path.join(work, "copies")
        self._copied: dict[str, str] = {}
        self._folders: dict[str, dict[str, Entry]] = {"": {}}
        for path, file in files.items():
            folder, _, name = path.rpartition("/")
            self._folders.setdefault(folder, {})[name] = Entry(name, False, file.size, file.stamp, "")
            while folder and folder not in (above := self._folders.setdefault(folder.rpartition("/")[0], {})):
                above[folder.rpartition("/")[2]] = Entry(folder.rpartition("/")[2], True, 0, 0, "")
                folder = folder.rpartition("/")[0]

    def children(self, path: str = "") -> list[Entry]:
        return sorted(self._folders.get(path, {}).values())

    def place(self, path: str) -> str:
        if path in self._copied:
            return self._copied[path]
        return self._files[path].url if path in self._files else f"{self._base}/{path}" if path else self._base

    def is_copied(self, path: str) -> bool:
        return path in self._copied

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[Reader]:
        file = self._files[path]
        reader: Reader = _WindowReader(file)
        try:
            reader.pread(1, 0)
        except remote.NoRanges:
            with open(self.local(path), "rb") as copied:
                yield FileReader(copied.fileno())
        else:
            yield reader

    def local(self, path: str) -> str:
        file = self._files[path]
        identity = f"{file.url}\n{file.size}\n{file.stamp}"
        folder = os.path.join(self._copies, hashlib.sha256(identity.encode()).hexdigest()[:16])
        os.makedirs(folder, exist_ok=True)
        free = shutil.disk_usage(folder).free
        copied = os.path.join(folder, path.rpartition("/")[2])
        if not os.path.exists(copied) and file.size > free:
            raise UserError(
                f"{remote.shown(file.url)}: is copied beside the result first, {file.size / 1e9:.1f} GB, but "
                f"{free / 1e9:.1f} GB are free there; free some or choose another disk"
            )
        remote.copy(file, copied)
        self._copied[path] = copied
        return copied


class _WindowReader:
    """Reads a file in windows, each by one request."""

    def __init__(self, file: RemoteFile) -> None:
        self.size = file.size
        self._url, self._start, self._data = file.url, 0, b""

    def pread(self, length: int, offset: int) -> bytes:
        end = min(self.size, offset + length)
        if offset >= end:
            return b""
        if not (self._start <= offset and end <= self._start + len(self._data)):
            self._data = remote.read(self._url, offset, min(self.size, max(end, offset + WINDOW)))
            self._start = offset
        return self._data[offset - self._start : end - self._start]


def remote_tree(src: str, work: str) -> RemoteTree:
    """The source with this URL. Raises UserError.

    The URL is a folder's or a file's, and may hold {000..012} and {a,b}, and * where files can be listed.
    """
    urls = remote.expand_braces(src)
    files: list[RemoteFile] = []
    listed = False
    for url in urls:
        if re.search(r"\.(tar|parquet|bin)$", remote.file_name(url), re.IGNORECASE) and "*" not in url:
            files.append(remote.info(url))
        else:
            listed = listed or "*" not in url
            files += remote.find(url)
    if listed and len(urls) > 1:
        raise UserError(f"{remote.shown(src)}: several folders; give one folder, or several files")
    if not listed:
        by_name = {remote.file_name(file.url): file for file in files}
        if len(by_name) < len(files):
            raise UserError(f"{remote.shown(src)}: two of the files have one name; rename one, or give their folder")
        return RemoteTree(src, by_name, work, named=True)
    root = _root_of(src, files)
    return RemoteTree(root, {file.url[len(root) + 1 :]: file for file in files}, work, named=False)


def _root_of(base: str, files: list[RemoteFile]) -> str:
    """The folder's URL in the file system's own spelling, in which the files' URLs begin with it."""
    path = base.partition("://")[2].strip("/")
    first = files[0].url
    at = first.find(f"/{path}/")
    if at < 0:
        raise UserError(f"{remote.shown(base)}: not a known source; give {SOURCES}")
    return first[: at + 1 + len(path)]


def local_copy(url: str, work: str) -> str:
    """Path of a copy of a single file, a list of labels say. Raises UserError."""
    name = remote.file_name(url)
    return RemoteTree(url, {name: remote.info(url)}, work, named=True).local(name)


class Fetcher:
    """Fetches the images of tasks ahead of the processes that convert them, into files in the working folder.

    The processes themselves reach no network: the number of requests at a time does not depend on theirs.
    """

    def __init__(self, listing: Listing, work: str, max_bytes: int) -> None:
        self._listing, self._max_bytes = listing, max_bytes
        self._folder = os.path.join(work, "fetched")
        shutil.rmtree(self._folder, ignore_errors=True)
        self._pool = ThreadPoolExecutor(THREADS) if any(map(is_url, listing.files)) else None

    def tasks(self, tasks: Iterable[ConvertTask]) -> Iterator[ConvertTask]:
        """The tasks, those of images elsewhere once these are here. Raises UserError when a server is gone."""
        if self._pool is None:
            yield from tasks
            return
        waiting: collections.deque[tuple[ConvertTask, list[Future[str]]]] = collections.deque()
        for task in tasks:
            os.makedirs(os.path.join(self._folder, str(task.number)), exist_ok=True)
            waiting.append((task, [self._pool.submit(self._fetch, task, i) for i in range(len(task.places))]))
            if len(waiting) > AHEAD:
                yield self._arrived(*waiting.popleft())
        while waiting:
            yield self._arrived(*waiting.popleft())

    def _path(self, task: ConvertTask, index: int) -> str:
        return os.path.join(self._folder, str(task.number), str(index))

    def _fetch(self, task: ConvertTask, index: int) -> str:
        """Brings one image here; returns why it cannot be read, or ""."""
        number, name, offset, size = task.places[index]
        file = self._listing.files[number]
        if not is_url(file) or size > self._max_bytes:
            return ""
        try:
            found = remote.read(f"{file}/{name}" if name else file, offset, offset + size)
        except remote.NotFound:
            if name:
                return "is gone: it was there when the source was listed"
            raise UserError(f"{remote.shown(file)}: is gone; put it back and run the same command") from None
        with open(self._path(task, index), "wb") as out:
            out.write(found)
        return ""

    def _arrived(self, task: ConvertTask, fetched: list[Future[str]]) -> ConvertTask:
        failed = tuple(future.result() for future in fetched)
        places = [
            (place[0], self._path(task, i), 0, place[3]) if is_url(self._listing.files[place[0]]) else place
            for i, place in enumerate(task.places)
        ]
        return task._replace(places=places, failed=failed)

    def discard(self, number: int) -> None:
        """Removes the files of a task that is done."""
        if self._pool is not None:
            shutil.rmtree(os.path.join(self._folder, str(number)), ignore_errors=True)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            shutil.rmtree(self._folder, ignore_errors=True)
