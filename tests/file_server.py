"""A web server on the loopback that gives files of a folder, complete or in parts, and fails on request."""

from __future__ import annotations

import http.server
import re
import threading
import urllib.parse
from pathlib import Path


class FileServer:
    """`url` is the address of `root`. ranges: whether parts of files are given. fail(path, n): a function of the path
    and of how many requests came for it before; its result, if not 0, is the status that is sent. first_byte: where
    parts of files begin instead of where they should. logins: Authorization headers that came."""

    def __init__(self, root: Path, ranges: bool = True) -> None:
        self.root, self.ranges = root, ranges
        self.requests: list[tuple[str, str, str]] = []  # method, path, range
        self.fail = lambda path, before: 0
        self.fail_first = False  # whether each request is refused when it is made for the first time
        self.first_byte: int | None = None
        self.logins: set[str] = set()
        self._lock = threading.Lock()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server._answer(self, body=True)

            def do_HEAD(self) -> None:
                server._answer(self, body=False)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def _answer(self, request: http.server.BaseHTTPRequestHandler, body: bool) -> None:
        path = urllib.parse.unquote(request.path.partition("?")[0])
        if login := request.headers.get("Authorization"):
            self.logins.add(login)
        asked = (request.command, path, request.headers.get("Range", ""))
        with self._lock:
            before = sum(path == one[1] for one in self.requests)
            again = asked in self.requests
            self.requests.append(asked)
        file = self.root / path.lstrip("/")
        status = (
            (503 if self.fail_first and not again else 0) or self.fail(path, before) or (200 if file.is_file() else 404)
        )
        if status != 200:
            request.send_error(status)
            return
        data = file.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", "")) if self.ranges else None
        if span:
            first, length = int(span[1]), int(span[2]) + 1 - int(span[1])
            first = first if self.first_byte is None else self.first_byte
            part = data[first : first + length]
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {first}-{first + length - 1}/{len(data)}")
        else:
            part = data
            request.send_response(200)
        request.send_header("Content-Length", str(len(part)))
        request.send_header("ETag", f'"{hash(data)}"')
        request.end_headers()
        if body:
            request.wfile.write(part)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
