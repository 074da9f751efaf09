"""A mirror site in miniature: real HTTP on 127.0.0.1, all that a site carries, and faults."""

from __future__ import annotations

import email.utils
import hashlib
import json
import platform
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from gpufleet.catalog import Site
from gpufleet.mirrors.on_host import names

#: What the site of `everything` carries, as the catalogue writes it.
SERVICES: dict[str, Any] = {
    "apt": {"archives": {"debian": "/debian", "debian-security": "/debian-security"}},
    "pypi": {"index": "/pypi/simple"},
    "conda": {
        "base": "/anaconda",
        "subchannels": ["main", "r"],
        "cloud": {"conda-forge": "/anaconda/cloud", "pytorch": "/anaconda/cloud"},
    },
    "miniconda": {"dir": "/anaconda/miniconda"},
    "torch": {"url": "/pytorch/whl/{cuda}", "style": "simple"},
    "hf": {"endpoint": "/"},
}

MIB = 2**20

#: What conda, apt and others call this machine.
MACHINE = names(platform.machine())


def in_release(suite: str, age: float = 0, **fields: str) -> bytes:
    """The beginning of an InRelease file that is so many seconds old."""
    date = email.utils.formatdate(time.time() - age, usegmt=True)
    said = {"Origin": "Debian", "Suite": "x", "Codename": suite, "Date": date, **fields}
    head = "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\n"
    return (head + "".join(f"{key}: {value}\n" for key, value in said.items())).encode()


def repodata(subdir: str, size: int = 0) -> bytes:
    packages = {"python-3.11-0.conda": {"name": "python", "size": size}}
    index = {"info": {"subdir": subdir}, "packages": {}, "packages.conda": packages}
    return json.dumps(index).encode()


def everything(size: int = MIB) -> dict[str, bytes]:
    """Path → bytes of a whole site; large files are of that size."""
    wheel = b"PK\x03\x04" + bytes(size)
    digest = hashlib.sha256(wheel).hexdigest()
    link = f'<a href="../../packages/pip-25.0-py3-none-any.whl#sha256={digest}">pip</a>'
    torch = "torch-2.4.0%2Bcpu-cp311-cp311-linux_x86_64.whl"
    files = {
        "/pypi/simple/pip/": f"<!DOCTYPE html><html><body>{link}</body></html>".encode(),
        "/pypi/packages/pip-25.0-py3-none-any.whl": wheel,
        "/debian/dists/bookworm/InRelease": in_release("bookworm"),
        "/debian/dists/bookworm-updates/InRelease": in_release("bookworm-updates"),
        f"/debian/dists/bookworm/main/binary-{MACHINE['deb']}/Packages.xz": b"\xfd7zXZ\x00"
        + bytes(size),
        "/debian-security/dists/bookworm-security/InRelease": in_release("bookworm-security"),
        f"/anaconda/miniconda/Miniconda3-latest-Linux-{MACHINE['machine']}.sh": b"#!/bin/sh\n"
        + bytes(size),
        "/pytorch/whl/cpu/torch/": f'<a href="/pytorch/whl/cpu/{torch}">torch</a>'.encode(),
        f"/pytorch/whl/cpu/{torch}": wheel,
        "/api/models/openai-community/gpt2": b'{"id": "openai-community/gpt2"}',
        "/openai-community/gpt2/resolve/main/vocab.json": b'{"a": 1}' + bytes(size),
    }
    for channel in ("cloud/conda-forge", "cloud/pytorch", "pkgs/main", "pkgs/r"):
        for subdir in (MACHINE["subdir"], "noarch"):
            folder = f"/anaconda/{channel}/{subdir}"
            files[f"{folder}/repodata.json"] = repodata(subdir, size)
            files[f"{folder}/python-3.11-0.conda"] = wheel
    return files


class Request(BaseHTTPRequestHandler):
    """Answers with a file of the site, in part if a range is asked for."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))
        if self.server.fault is not None and self.server.fault(self):
            return
        body = self.server.files.get(self.path)
        if body is None:
            self.answer(404, b"not here")
            return
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes="):
            first, last = (int(n) for n in wanted[6:].split("-"))
            part = body[first : last + 1]
            span = f"bytes {first}-{first + len(part) - 1}/{len(body)}"
            self.answer(206, part, {"Content-Range": span})
            return
        self.answer(200, body)

    def answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.give(body)

    def give(self, body: bytes) -> None:
        """Send bytes and count them."""
        try:
            self.wfile.write(body)
            self.server.sent += len(body)
        except OSError:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


#: Whether it has answered a request itself.
Fault = Callable[[Request], bool]


class Server(ThreadingHTTPServer):
    """One site; `sent` counts the bytes of its answers' bodies."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, files: dict[str, bytes], fault: Fault | None) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.files = files
        self.fault = fault
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.sent = 0
        self.scheme = "http"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def site(self, name: str = "one", **changes: Any) -> Site:
        """The site as an inventory would define it."""
        services = changes.pop("services", SERVICES)
        given = {"hosts": [self.place], "scheme": self.scheme, "domain": name, **changes}
        return Site.model_validate({"name": name, "services": services, **given})


def certified(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate of its own making for a name or address, and its key."""
    made = folder / f"{name}.pem", folder / f"{name}.key"
    kind = "IP" if name[0].isdigit() else "DNS"
    line = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN={name}"
    extension = ["-addext", f"subjectAltName={kind}:{name}"]
    files = ["-out", str(made[0]), "-keyout", str(made[1])]
    subprocess.run([*line.split(), *extension, *files], check=True, capture_output=True)
    return made


@contextmanager
def serving(
    files: dict[str, bytes] | None = None,
    fault: Fault | None = None,
    certificate: tuple[Path, Path] | None = None,
) -> Iterator[Server]:
    """A site that answers while the block runs."""
    server = Server(everything() if files is None else files, fault)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.scheme = "https"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
