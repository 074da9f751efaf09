"""Hugging Face, ModelScope and a plain file server in miniature: real HTTP on 127.0.0.1.

It speaks what huggingface_hub 2.4 asks of the hub (api/models, resolve, redirects to where large
files lie), ModelScope's file API, and ranges; tests break one answer at a time.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

#: Files of this many bytes and more lie in Git LFS.
LFS = 2000


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def blob(body: bytes) -> str:
    """Git's name for a content."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def pointer(body: bytes) -> bytes:
    """What Git has in the place of a large file."""
    version = "version https://git-lfs.github.com/spec/v1"
    return f"{version}\noid sha256:{sha256(body)}\nsize {len(body)}\n".encode()


class Request(BaseHTTPRequestHandler):
    """One request; a fault may answer it in the server's place."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.asked.append((self.command, self.path, headers))
        for fault in self.server.faults:
            if fault(self):
                return
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        for route in (self.api, self.resolve, self.cdn, self.modelscope, self.plain):
            if route(path, query):
                return
        self.answer(404, b"Not Found", {"X-Error-Code": "RepoNotFound"})

    def api(self, path: str, query: Mapping[str, list[str]]) -> bool:
        """huggingface_hub's model_info, dataset_info and space_info."""
        for kind in ("models", "spaces", "datasets"):
            head, found, name = path.partition(f"/api/{kind}/")
            if not found or head:
                continue
            name, _, revision = name.partition("/revision/")
            files = self.server.repositories.get(name)
            if files is None:
                return False
            commit = self.server.commit(name)
            if revision not in ("", "main", commit, *self.server.older.get(name, {})):
                self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
                return True
            files = self.server.older.get(name, {}).get(revision, files)
            siblings = [self.sibling(path, body) for path, body in files.items()]
            said = {"id": name, "modelId": name, "sha": revision or commit, "siblings": siblings}
            said["sha"] = commit if revision in ("", "main") else revision
            self.answer(200, json.dumps(said).encode(), {"Content-Type": "application/json"})
            return True
        return False

    def sibling(self, path: str, body: bytes) -> dict[str, Any]:
        if len(body) < LFS:
            return {"rfilename": path, "size": len(body), "blobId": blob(body)}
        lfs = {"sha256": sha256(body), "size": len(body), "pointerSize": len(pointer(body))}
        return {"rfilename": path, "size": len(body), "blobId": blob(pointer(body)), "lfs": lfs}

    def resolve(self, path: str, query: Mapping[str, list[str]]) -> bool:
        """A file of a repository; large ones lie elsewhere, behind a signature."""
        repository, found, rest = path.lstrip("/").partition("/resolve/")
        repository = repository.removeprefix("spaces/").removeprefix("datasets/")
        revision, _, name = rest.partition("/")
        files = self.server.repositories.get(repository, {})
        files = self.server.older.get(repository, {}).get(revision, files)
        if not found or name not in files:
            return False
        body = files[name]
        headers = {"X-Repo-Commit": self.server.commit(repository)}
        if len(body) < LFS:
            self.send_file(body, {**headers, "ETag": f'"{blob(body)}"'})
            return True
        digest = sha256(body)
        self.server.stored[digest] = body
        headers |= {"X-Linked-Size": str(len(body)), "X-Linked-Etag": f'"{digest}"'}
        self.answer(302, b"", {**headers, "Location": f"{self.server.cdn}/cdn/{digest}?signed=1"})
        return True

    def cdn(self, path: str, query: Mapping[str, list[str]]) -> bool:
        body = self.server.stored.get(path.removeprefix("/cdn/"))
        if body is None or not path.startswith("/cdn/"):
            return False
        self.send_file(body, {"ETag": f'"{sha256(body)}"'})
        return True

    def modelscope(self, path: str, query: Mapping[str, list[str]]) -> bool:
        head, _, rest = path.partition("/api/v1/models/")
        name, found, tail = rest.partition("/repo")
        files = self.server.repositories.get(name)
        if head or not found or files is None:
            return False
        if tail == "/files":
            rows = [
                {
                    "Path": path,
                    "Type": "blob",
                    "Size": len(body),
                    "Sha256": sha256(body),
                    "Revision": self.server.commit(name),
                    "CommittedDate": 1700000000,
                }
                for path, body in files.items()
            ]
            rows.append({"Path": "folder", "Type": "tree", "Size": 0, "Sha256": ""})
            said = {"Code": 200, "Success": True, "Data": {"Files": rows}}
            self.answer(200, json.dumps(said).encode())
            return True
        body = files.get(query["FilePath"][0])
        if body is None:
            return False
        self.send_file(body)
        return True

    def plain(self, path: str, query: Mapping[str, list[str]]) -> bool:
        body = self.server.plain.get(path)
        if body is None:
            return False
        self.send_file(body)
        return True

    def asked_from(self) -> int:
        """The first byte that is asked for."""
        wanted = self.headers.get("Range", "")
        return int(wanted[6:].rstrip("-")) if wanted.startswith("bytes=") else 0

    def send_file(self, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """A file, from where it is asked for."""
        start = self.asked_from()
        if start >= len(body) and start:
            self.answer(416, b"", {"Content-Range": f"bytes */{len(body)}"})
            return
        extra = {"Content-Length": str(len(body) - start), **(headers or {})}
        if "Range" in self.headers:
            extra["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.head(206 if "Range" in self.headers else 200, extra)
        self.send_slowly(body[start:])

    def send_slowly(self, body: bytes) -> None:
        """Bytes at the server's rate."""
        piece = 16384
        for at in range(0, len(body), piece):
            part = body[at : at + piece]
            self.wfile.write(part)
            self.server.sent += len(part)
            if self.server.rate:
                time.sleep(len(part) / self.server.rate)

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.head(status, {"Content-Length": str(len(body)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def cut(self, body: bytes, length: int | None = None) -> None:
        """Some bytes, and then the connection breaks."""
        self.send_response(200)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)
        self.server.sent += len(body)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Tests look at `asked`."""


Fault = Callable[[Request], bool]


class Hub(ThreadingHTTPServer):
    """What it has, what was asked of it, and what is broken."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.older: dict[str, dict[str, dict[str, bytes]]] = {}
        self.plain: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.sent = 0
        self.rate = 0
        """Bytes a second of each answer; 0 is all at once."""
        self.cdn = self.address

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, name: str) -> str:
        """The commit that a repository is at, which changes with its files."""
        files = self.repositories[name]
        text = "".join(f"{path} {sha256(body)}\n" for path, body in sorted(files.items()))
        return hashlib.sha1(text.encode()).hexdigest()

    def paths(self, part: str) -> list[str]:
        """What was asked for, of paths that have `part` in them."""
        return [path for _, path, _ in self.asked if part in path]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers while the block runs."""
    hub = Hub()
    thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def once(part: str, how: Callable[[Request], None], times: int = 1) -> Fault:
    """A fault of the first answers to requests for paths that have `part` in them."""
    left = [times]

    def fault(request: Request) -> bool:
        if part not in request.path or not left[0]:
            return False
        left[0] -= 1
        how(request)
        return True

    return fault


def always(part: str, how: Callable[[Request], None]) -> Fault:
    """A fault of every answer to requests for paths that have `part` in them."""
    return once(part, how, -1)
