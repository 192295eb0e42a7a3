"""A stand-in of the Hugging Face hub on the loopback interface, with faults on request.

Like the hub it has metadata of revisions, answers small files itself and redirects to another host for large ones,
which takes ranges and gets no token. `/plain/<repository>/<revision>/<path>` are plain URLs, as others publish.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 4096
STALL_SECONDS = 60


@dataclass(frozen=True)
class Request:
    """A request to the hub, or to its host for large files."""

    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Repository:
    """One revision and its files."""

    revision: str
    files: dict[str, bytes]


@dataclass
class Hub:
    """The published files, the faults to come, and the requests so far."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    token: str | None = None
    """The token that a reader needs; None: no token is needed."""
    cuts: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    """By file: bytes after which an answer breaks off, one for each answer."""
    busy: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """By file: how many answers are HTTP 503."""
    wrong: dict[str, bytes] = field(default_factory=dict)
    """By file: content that differs from what the metadata say."""
    stalls: dict[str, int] = field(default_factory=dict)
    """By file: bytes after which an answer hangs until `released`."""
    released: Event = field(default_factory=Event)
    ignores_ranges: bool = False
    seconds_per_answer: float = 0.0
    most_at_once: int = 0
    """How many answers with content were sent at the same time."""
    _at_once: int = 0
    requests: list[Request] = field(default_factory=list)
    endpoint: str = ""
    large_files: str = ""
    _lock: Lock = field(default_factory=Lock)

    def publish(self, name: str, files: dict[str, bytes]) -> Repository:
        """A repository with a revision of its own."""
        revision = hashlib.sha1(json.dumps([name, *map(str, files.items())]).encode()).hexdigest()
        self.repositories[name] = Repository(revision, files)
        return self.repositories[name]

    def ranges(self, path: str) -> list[str | None]:
        """The ranges of a file's content that were requested, in order."""
        return [request.range for request in self.requests if request.path.endswith(path) and self._is_content(request)]

    def _is_content(self, request: Request) -> bool:
        return request.path.startswith(("/large/", "/plain/")) or (
            "/resolve/" in request.path and not self._is_large(request.path.partition("/resolve/")[2].partition("/")[2])
        )

    def _is_large(self, path: str) -> bool:
        return any(len(r.files.get(path, b"")) >= LARGE for r in self.repositories.values())

    @contextmanager
    def answering(self) -> Iterator[None]:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            time.sleep(self.seconds_per_answer)
            yield
        finally:
            with self._lock:
                self._at_once -= 1

    def heard(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def takes_busy(self, path: str) -> bool:
        with self._lock:
            self.busy[path] -= 1
            return self.busy[path] >= 0

    def takes_cut(self, path: str) -> int | None:
        with self._lock:
            return self.cuts[path].pop(0) if self.cuts[path] else None


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve on two free ports: the hub, and its host for large files."""
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub)) for _ in range(2)]
    threads = [Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}) for server in servers]
    hub.endpoint, hub.large_files = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def log_message(self, *arguments: Any) -> None:
            """The requests are kept, not printed."""

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            bearer = (self.headers["Authorization"] or "").removeprefix("Bearer ")
            hub.heard(Request(self.command, path, self.headers["Range"], bearer or None))
            if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/(\w+))?", path):
                self._metadata(found[1], found[2])
            elif found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/(\w+)/(.+)", path):
                self._resolve(*found.groups())
            elif found := re.fullmatch(r"/(?:large|plain)/([\w.-]+/[\w.-]+)/(\w+)/(.+)", path):
                self._content(*found.groups())
            else:
                self._end(404)

        def _published(self, name: str, revision: str | None) -> Repository | None:
            repository = hub.repositories.get(name)
            if repository is None or (revision and revision not in ("main", repository.revision)):
                return None
            return repository

        def _refused(self) -> bool:
            return hub.token is not None and self.headers["Authorization"] != f"Bearer {hub.token}"

        def _metadata(self, name: str, revision: str | None) -> None:
            repository = self._published(name, revision)
            if self._refused():
                self._end(401, {"X-Error-Code": "GatedRepo"})
            elif repository is None:
                self._end(404, {"X-Error-Code": "RepoNotFound"})
            else:
                siblings = [_sibling(path, data) for path, data in repository.files.items()]
                info = {"id": name, "modelId": name, "sha": repository.revision, "siblings": siblings}
                self._end(200, {"Content-Type": "application/json"}, json.dumps(info).encode())

        def _resolve(self, name: str, revision: str, path: str) -> None:
            repository = self._published(name, revision)
            if self._refused():
                self._end(401, {"X-Error-Code": "GatedRepo"})
            elif repository is None or path not in repository.files:
                self._end(404, {"X-Error-Code": "EntryNotFound"})
            elif len(data := repository.files[path]) >= LARGE:
                headers = {
                    "Location": f"{hub.large_files}/large/{name}/{repository.revision}/{path}?signature=of-the-host",
                    "X-Repo-Commit": repository.revision,
                    "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
                    "X-Linked-Size": str(len(data)),
                }
                self._end(302, headers)
            else:
                self._content(name, revision, path)

        def _content(self, name: str, revision: str, path: str) -> None:
            repository = self._published(name, revision)
            if repository is None or path not in repository.files:
                return self._end(404)
            if hub.takes_busy(path):
                return self._end(503)
            with hub.answering():
                self._send(repository, path)

        def _send(self, repository: Repository, path: str) -> None:
            data = hub.wrong.get(path, repository.files[path])
            headers = {"Accept-Ranges": "bytes", "X-Repo-Commit": repository.revision, "ETag": f'"{_git_blob(data)}"'}
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
            if asked is None or hub.ignores_ranges:
                return self._end(200, headers, data, hub.takes_cut(path), hub.stalls.get(path))
            start = int(asked[1])
            if start >= len(data):
                return self._end(416, {"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self._end(206, headers, data[start:], hub.takes_cut(path), hub.stalls.get(path))

        def _end(
            self,
            status: int,
            headers: dict[str, str] | None = None,
            data: bytes = b"",
            cut: int | None = None,
            stall: int | None = None,
        ) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if stall is not None:
                self.wfile.write(data[:stall])
                hub.released.wait(STALL_SECONDS)
                self.close_connection = True
                return
            self.wfile.write(data if cut is None else data[:cut])
            if cut is not None:
                self.close_connection = True

    return Handler


def _sibling(path: str, data: bytes) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": _git_blob(data)}
    if len(data) >= LARGE:
        sibling["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return sibling


def _git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
