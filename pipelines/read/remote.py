"""Files on other machines, by URL: what is there, parts of files, copies that resume, and the cache of betons.

http:// and https:// go through the standard library, since fsspec's own reader of them needs aiohttp; every other
scheme goes through fsspec, which needs a package for some of them (s3fs for s3://, gcsfs for gs://, huggingface_hub).
A call that fails is repeated after each of DELAYS, unless what it asks for is not there or not allowed. Everything here
may be called from several threads.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import itertools
import math
import os
import re
import string
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from pipelines.errors import UserError, printable

DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""seconds before each further attempt"""
TIMEOUT = 60  # seconds without a byte
CHUNK = 1 << 24  # bytes of a copy that are asked for at once
MAX_URLS = 1_000_000  # that one with braces may stand for
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "az": "adlfs"}
STAMPS = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "last_modified", "updated", "created")
"""what file systems call that which changes with a file, the best first"""

T = TypeVar("T")


class RemoteFile(NamedTuple):
    url: str
    size: int
    stamp: int
    """changes with the file, as far as the server sends what does"""


class NotFound(UserError):
    """Nothing is at the address."""


class NoRanges(Exception):
    """The server gives complete files only."""


class NotServed(OSError):
    """A request of a kind that the server does not serve."""


class BytesGone(OSError):
    """A file does not hold the bytes that were asked for."""


def is_url(path: str | os.PathLike[str]) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", os.fspath(path)) is not None


def shown(url: str) -> str:
    """A URL for messages: without user, password and query, which may be secrets."""
    parts = _split(url)
    return printable(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")


def file_name(url: str) -> str:
    """Last part of the path."""
    return urllib.parse.unquote(_split(url).path.rpartition("/")[2])


def _split(url: str) -> urllib.parse.SplitResult:
    """Raises UserError where it is no address."""
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port  # which is parsed only now
    except ValueError as error:
        raise UserError(f"{re.sub('//.*@', '//', url)}: not an address ({error}); correct it") from None
    return parts


def expand_braces(url: str) -> list[str]:
    """`x-{000..012}.tar` and `{a,b}.tar` as the URLs that they stand for."""
    parts = re.split(r"\{([^{}]*)\}", url)
    choices: list[list[str]] = [[part] for part in parts]
    for i, part in list(enumerate(parts))[1::2]:
        span = re.fullmatch(r"(\d+)\.\.(\d+)", part)
        if span:
            first, last = int(span[1]), int(span[2])
            if not first <= last < first + MAX_URLS:
                raise UserError(f"{shown(url)}: {{{part}}} is no range; write {{000..012}}")
            choices[i] = [str(n).zfill(len(span[1])) for n in range(first, last + 1)]
        else:
            choices[i] = part.split(",")
    if math.prod(map(len, choices)) > MAX_URLS:
        raise UserError(f"{shown(url)}: stands for more than {MAX_URLS:,} files; give fewer at a time")
    return ["".join(words) for words in itertools.product(*choices)]


def info(url: str) -> RemoteFile:
    """Size and stamp of a file. Raises NotFound, or UserError when it cannot be reached."""
    return _asked(url, lambda: _http_info(url) if _is_http(url) else _fsspec_info(url))


def read(url: str, start: int, end: int) -> bytes:
    """Bytes start..end of a file that has them. Raises NotFound; NoRanges where the server has no parts of files; for
    whatever else is wrong, credentials that have run out say, UserError."""
    return _asked(url, lambda: _read_part(url, start, end))


def read_all(file: RemoteFile) -> bytes:
    """All of a small file. Raises UserError."""
    try:
        return read(file.url, 0, file.size)
    except NoRanges:
        out = io.BytesIO()
        _asked(file.url, lambda: _copy_all(file, out))
        return out.getvalue()


def find(url: str) -> list[RemoteFile]:
    """All files below a folder, or those that a pattern with * names. Raises UserError, also where nothing is there."""
    if _is_http(url):
        raise UserError(
            f"{shown(url)}: a folder on a web server cannot be listed; give the URL of a .tar, .parquet or CIFAR file, "
            "several of them as NAME-{000..012}.tar"
        )
    files = _asked(url, lambda: _fsspec_find(url))
    if not files:
        raise UserError(f"{shown(url)}: nothing is there; give a folder, a file, or a pattern of files")
    return files


def copy(file: RemoteFile, path: str) -> None:
    """Copies a file to `path`, which then is complete; a copy that was interrupted continues where it stopped. Raises
    UserError, and OSError where `path` cannot be written."""
    if os.path.exists(path) and os.path.getsize(path) == file.size:
        return
    before = info(file.url)
    part = f"{path}.part"
    with open(part, "ab") as out:
        done = out.tell()
        if done > file.size:
            done = out.truncate(0)
        try:
            while done < file.size:
                data = read(file.url, done, min(file.size, done + CHUNK))
                out.write(data)
                done += len(data)
        except NoRanges:
            out.truncate(0)
            _asked(file.url, lambda: _copy_all(file, out))
        out.flush()
        os.fsync(out.fileno())
    if before != info(file.url):
        os.remove(part)
        raise replaced(file.url)
    os.replace(part, path)


def _copy_all(file: RemoteFile, out: Any) -> None:
    out.seek(0)
    out.truncate()
    with _request(file.url) as response:
        while data := response.read(1 << 20):
            out.write(data)
    if out.tell() != file.size:
        raise OSError(f"{out.tell()} bytes came of {file.size}")


# -- the cache of betons ------------------------------------------------------------------------------------------


def cache_path(url: str) -> str:
    """Where `std-fast warm URL` puts a beton: below STD_FAST_CACHE, or else ~/.cache/std_fast (XDG_CACHE_HOME)."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.environ.get("STD_FAST_CACHE") or os.path.join(home, "std_fast")
    return os.path.join(folder, "betons", hashlib.sha256(url.encode()).hexdigest()[:16], file_name(url))


def cached(url: str) -> list[str]:
    """Paths of the betons with this URL, which may hold {0..3}, in the cache. Raises UserError where one is missing."""
    paths = []
    for one in expand_braces(url):
        path = cache_path(one)
        if not os.path.exists(path):
            raise UserError(f"{shown(one)}: not in the cache ({printable(path)}); run `std-fast warm URL` first")
        paths.append(path)
    return paths


# -- retries and errors -------------------------------------------------------------------------------------------


def _asked(url: str, action: Callable[[], T]) -> T:
    """What `action` returns, tried again after each of DELAYS where its error may pass; other errors, but NoRanges, and
    the last become UserErrors."""
    delays = iter(DELAYS)
    while True:
        try:
            return action()
        except (UserError, NoRanges):
            raise
        except ImportError as error:
            package = PACKAGES.get(url.partition("://")[0].lower())
            way = f"pip install {package}" if package else _reason(error)
            raise UserError(
                f"{shown(url)}: this kind of address needs a package that is not installed: {way}"
            ) from None
        except FileNotFoundError:
            raise NotFound(f"{shown(url)}: not found; look at the address") from None
        except (PermissionError, IsADirectoryError, NotADirectoryError) as error:
            raise UserError(f"{shown(url)}: access is refused ({_reason(error)}); look at the credentials") from None
        except NotServed as error:
            raise UserError(
                f"{shown(url)}: the server does not serve such a request ({_reason(error)}); look at the address, or "
                "download the file first"
            ) from None
        except BytesGone:
            raise replaced(url) from None
        except Exception as error:  # libraries of many kinds: what may pass is tried again
            if (delay := next(delays, None)) is None:
                raise UserError(
                    f"{shown(url)}: cannot be read ({_reason(error)}), tried {len(DELAYS) + 1} times; look at the "
                    "address and the network, then run the same command again: it continues where it stopped"
                ) from None
            time.sleep(delay)


def replaced(url: str) -> UserError:
    """For a file, by URL or path, whose parts are of two versions."""
    name = shown(url) if is_url(url) else printable(url)
    return UserError(f"{name}: was replaced or removed while it was read; run the same command again")


def _reason(error: BaseException) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error)).split()) or type(error).__name__


def _stamp(value: object) -> int:
    return int.from_bytes(hashlib.sha256(str(value).encode()).digest()[:7], "little")


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


# -- http and https -----------------------------------------------------------------------------------------------


def _request(url: str, method: str = "GET", **headers: str) -> http.client.HTTPResponse:
    parts = _split(url)
    user, _, host = parts.netloc.rpartition("@")
    path, query = (urllib.parse.quote(part, safe=string.punctuation) for part in (parts.path, parts.query))
    address = urllib.parse.urlunsplit((parts.scheme, host, path, query, ""))
    request = urllib.request.Request(address, method=method, headers={"User-Agent": "std-fast", **headers})
    if user:  # not sent on to where the server redirects
        login = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {login}")
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (404, 410):
            raise FileNotFoundError(f"HTTP {error.code}") from None
        kinds = {401: PermissionError, 403: PermissionError, 407: PermissionError, 416: BytesGone}
        passing = error.code >= 500 or error.code in (408, 425, 429)
        raise kinds.get(error.code, OSError if passing else NotServed)(f"HTTP {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise OSError(str(error.reason)) from None


def _http_info(url: str) -> RemoteFile:
    try:
        with _request(url, "HEAD") as response:
            headers = response.headers
    except (PermissionError, NotServed):  # some servers (and signed addresses) allow GET only
        with _request(url, Range="bytes=0-0") as response:
            headers = response.headers
    span = re.fullmatch(r"bytes \d+-\d+/(\d+)", headers.get("Content-Range", ""))
    size = span[1] if span else headers.get("Content-Length", "")
    if not size.isdigit():
        raise UserError(f"{shown(url)}: the server does not tell the file's length; download the file first")
    return RemoteFile(url, int(size), _stamp(headers.get("ETag") or headers.get("Last-Modified") or f"{size} bytes"))


def _read_part(url: str, start: int, end: int) -> bytes:
    if start == end:
        return b""
    if not _is_http(url):
        filesystem, path = _filesystem(url)
        data = filesystem.cat_file(path, start=start, end=end)
    else:
        with _request(url, Range=f"bytes={start}-{end - 1}") as response:
            if response.status != 206:
                raise NoRanges
            span = response.headers.get("Content-Range", "")
            if not span.startswith(f"bytes {start}-"):  # of some proxies: the first bytes of the file
                raise OSError(f"bytes {start}-{end - 1} were asked for, and {span or 'others'} came")
            data = response.read(end - start)
    if len(data) != end - start:
        raise OSError(f"{len(data)} bytes came of {end - start}")
    return data


# -- fsspec -------------------------------------------------------------------------------------------------------


def _filesystem(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except ValueError as error:
        raise UserError(f"{shown(url)}: {_reason(error)}; give s3://, gs://, hf://, http:// or a path") from None


def _remote_file(filesystem: Any, entry: dict[str, Any]) -> RemoteFile:
    stamp = next((entry[key] for key in STAMPS if entry.get(key) is not None), f"{entry['size']} bytes")
    return RemoteFile(filesystem.unstrip_protocol(entry["name"]), int(entry["size"]), _stamp(stamp))


def _fsspec_info(url: str) -> RemoteFile:
    filesystem, path = _filesystem(url)
    filesystem.invalidate_cache()  # as it is now
    entry = filesystem.info(path)
    if entry["type"] == "directory":
        raise IsADirectoryError("it is a folder")
    return _remote_file(filesystem, entry)


def _fsspec_find(url: str) -> list[RemoteFile]:
    filesystem, path = _filesystem(url)
    filesystem.invalidate_cache()
    pattern = re.search(r"[*?\[]", path) is not None
    found = filesystem.glob(path, detail=True) if pattern else filesystem.find(path, detail=True)
    files: Iterator[dict[str, Any]] = (entry for entry in found.values() if entry["type"] == "file")
    return sorted(_remote_file(filesystem, entry) for entry in files)
