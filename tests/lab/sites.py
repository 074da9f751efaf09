"""Mirror sites of the tests' own: a small package archive and one wheel, and every way in which a
site can fail while it answers."""

from __future__ import annotations

import hashlib
import http.server
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from email.utils import formatdate
from pathlib import Path
from typing import Any

import requests

from gpufleet.mirrors import verify
from gpufleet.python_env.plan import lock_for

SUITE = "bookworm"
#: The source of a host whose archive is this file's: unsigned, and nobody minds.
SOURCE = """\
Types: deb
URIs: {url}/debian
Suites: {suite}
Components: main
Trusted: yes
"""


def archive() -> dict[str, bytes]:
    """A distribution archive with one package in it, path → bytes."""
    packages = (
        b"Package: hello\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@example.org>\n"
        b"Filename: pool/hello.deb\nSize: 1\nSHA256: " + b"0" * 64 + b"\nDescription: nothing\n"
    )
    name = "main/binary-amd64/Packages"
    release = (
        f"Origin: Debian\nSuite: oldstable\nCodename: {SUITE}\nDate: {formatdate(usegmt=True)}\n"
        "Architectures: amd64\nComponents: main\nSHA256:\n"
        f" {hashlib.sha256(packages).hexdigest()} {len(packages)} {name}\n"
    )
    folder = f"/debian/dists/{SUITE}"
    return {f"{folder}/Release": release.encode(), f"{folder}/{name}": packages}


def index(folder: Path) -> dict[str, bytes]:
    """An index with the wheel that a switch is checked by; the machine's pip fetches it."""
    listed = folder / "wheel.txt"
    listed.write_text(verify.requirement(lock_for("cpu").text))
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    subprocess.run([*pip, "--dest", folder, "--requirement", listed], check=True)
    (wheel,) = folder.glob("*.whl")
    page = (
        f'<!DOCTYPE html><html><body><a href="/files/{wheel.name}">{wheel.name}</a></body></html>'
    )
    return {f"/simple/{verify.PACKAGE}/": page.encode(), f"/files/{wheel.name}": wheel.read_bytes()}


class Forwarded(dict[str, bytes]):
    """The files of archives elsewhere, fetched when first asked for: archive → its address."""

    def __init__(self, archives: Mapping[str, str]) -> None:
        self.archives = archives
        self.session = requests.Session()

    def __missing__(self, path: str) -> bytes:
        _, archive, rest = path.split("/", 2)
        reply = self.session.get(f"{self.archives[archive].rstrip('/')}/{rest}", timeout=60)
        reply.raise_for_status()
        self[path] = reply.content
        return reply.content


class Folder(dict[str, bytes]):
    """Files, and below /anaconda/ what a folder of this machine holds."""

    def __init__(self, files: Mapping[str, bytes], anaconda: Path) -> None:
        super().__init__(files)
        self.anaconda = anaconda

    def __missing__(self, path: str) -> bytes:
        if not path.startswith("/anaconda/") or ".." in path:
            raise KeyError(path)
        return (self.anaconda / path.removeprefix("/anaconda/")).read_bytes()


PORTAL = b"<!DOCTYPE html><html><body><form action='/login'>Please log in</form></body></html>"


class Site:
    """A site on this machine that hosts reach at `url`.

    `fault` is how it fails, `at` the beginning of the paths where it does:
    garbage (200, but other bytes), portal (a redirect to a login page), missing (404), cut (the
    connection breaks in the middle of a body), refuse:NAME (403 for clients of that name).
    `asked` holds who asked for what, as (client, path).
    """

    def __init__(self, address: str, files: Mapping[str, bytes]) -> None:
        self.files = files
        self.fault, self.at = "", "/"
        self.asked: list[tuple[str, str]] = []
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                client = self.headers.get("User-Agent", "").partition("/")[0]
                site.asked.append((client, self.path))
                site.answer(self, client)

            def do_HEAD(self) -> None:
                self.do_GET()

            def log_message(self, *args: object) -> None:
                """`asked` is the log."""

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, *args: object) -> None:
                """A client that goes away is its own affair."""

        self.server = Server((address, 0), Handler)
        self.host = f"{address}:{self.server.server_port}"
        self.url = f"http://{self.host}"

    def answer(self, request: http.server.BaseHTTPRequestHandler, client: str) -> None:
        body: bytes | None = None
        with suppress(LookupError, OSError):
            body = self.files[request.path]
        fault = self.fault if request.path.startswith(self.at) else ""
        if request.path == "/login":
            body, fault = PORTAL, ""
        if fault == "portal":
            request.send_response(302)
            request.send_header("Location", "/login")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if fault == f"refuse:{client}":
            request.send_error(403)
            return
        if fault == "garbage":
            body = b"\x00\x01 nothing that anybody asked for \xff" * 20
        if body is None or fault == "missing":
            request.send_error(404)
            return
        request.send_response(200)
        request.send_header("Content-Type", "text/html" if body[:1] == b"<" else "binary/octet")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "HEAD":
            return
        if fault == "cut":
            request.wfile.write(body[: len(body) // 2])
            request.wfile.flush()
            request.connection.shutdown(socket.SHUT_RDWR)
            return
        request.wfile.write(body)

    @property
    def clients(self) -> set[str]:
        """Who has asked for anything."""
        return {client for client, _ in self.asked}

    def setting(self) -> dict[str, Any]:
        """The site as the setting mirrors.sites has it."""
        cloud = {"conda-forge": "/anaconda/cloud"}
        services = {
            "apt": {"archives": {"debian": "/debian"}},
            "pypi": {"index": "/simple"},
            "conda": {"base": "/anaconda", "subchannels": ["main"], "cloud": cloud},
        }
        return {"hosts": [self.host], "scheme": "http", "services": services}


@contextmanager
def serving(*sites: Site) -> Iterator[None]:
    """Let the sites answer."""
    threads = [threading.Thread(target=site.server.serve_forever) for site in sites]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for site, thread in zip(sites, threads, strict=True):
            site.server.shutdown()
            site.server.server_close()
            thread.join()
