"""With python_env.source `index`, a host downloads its environment for itself, and every file must
be the locked one."""

from __future__ import annotations

import hashlib
import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fleets import HOME, Fleet, Host, fleet, ok, words

from gpufleet.python_env import wheelhouse
from gpufleet.python_env.plan import lock_for


class Index:
    """A package index (PEP 503) over a folder of wheels: torch at /torch/, the rest at /simple/.

    `log` holds who asked for what, `damaged` the packages that it serves with a byte too many.
    """

    def __init__(self, wheels: Path, address: str) -> None:
        self.wheels = {path.name: path for path in wheels.glob("*.whl")}
        self.log: list[tuple[str, str]] = []
        self.damaged: set[str] = set()
        index = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.log.append((self.client_address[0], self.path))
                index.answer(self)

            def log_message(self, *args: object) -> None:
                """The log is a list."""

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, *args: object) -> None:
                """A download that was broken off is the client's affair."""

        self.server = Server((address, 0), Handler)
        self.url = f"http://{address}:{self.server.server_port}"

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        """A project's page, a wheel, or 404."""
        match = re.fullmatch(r"/(simple|torch)/([a-z0-9-]+)/", request.path)
        names = self.of(match[2]) if match else []
        name = request.path.removeprefix("/files/").replace("%2B", "+")
        if match and names and (match[2] == "torch") == (match[1] == "torch"):
            links = [f'<a href="/files/{n.replace("+", "%2B")}">{n}</a><br>' for n in names]
            body = "<!DOCTYPE html><html><body>{}</body></html>".format("\n".join(links)).encode()
            kind = "text/html"
        elif name in self.wheels:
            body = self.wheels[name].read_bytes()
            body += b"\0" * (_project(name) in self.damaged)
            kind = "application/octet-stream"
        else:
            request.send_error(404)
            return
        request.send_response(200)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def of(self, project: str) -> list[str]:
        """The wheels of a project."""
        return [name for name in self.wheels if _project(name) == project]

    @property
    def sent(self) -> dict[str, set[str]]:
        """Wheel -> who downloaded it."""
        found: dict[str, set[str]] = {}
        for client, path in self.log:
            if path.startswith("/files/"):
                name = path.removeprefix("/files/").replace("%2B", "+")
                found.setdefault(name, set()).add(client)
        return found


def _project(wheel: str) -> str:
    return re.sub(r"[-_.]+", "-", wheel.split("-")[0]).lower()


@pytest.fixture
def index(deployed: Fleet) -> Iterator[Index]:
    """The index on this machine's address in the lab, over the wheels of the first apply."""
    made = Index(wheelhouse.cache() / lock_for("cpu").digest, deployed.gateway)
    thread = threading.Thread(target=made.server.serve_forever, daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


@contextmanager
def _cut_off(host: Host, gateway: str) -> Iterator[None]:
    """No way out of the lab's own network: whatever is downloaded comes from this machine."""
    host.sh("ip route del default")
    try:
        yield
    finally:
        host.sh(f"ip route add default via {gateway}")


@pytest.fixture
def pointed(two: Host, index: Index, deployed: Fleet) -> Iterator[Host]:
    """A host whose uv looks at the index, and that has no other way out."""
    config = two.path("/etc/uv/uv.toml")
    config.parent.mkdir(exist_ok=True)
    config.write_text(f'[[index]]\nurl = "{index.url}/simple/"\ndefault = true\n')
    with _cut_off(two, deployed.gateway):
        yield two
    config.unlink()
    config.parent.rmdir()
    if not list(two.path(f"{HOME}/envs").glob("*/.whole")):  # the test failed on its way
        ok(deployed.apply("--limit", two.name))


def _installed(host: Host) -> list[str]:
    (environment,) = host.path(f"{HOME}/envs").iterdir()
    return sorted(path.name for path in environment.glob("lib/python*/site-packages/*.dist-info"))


def _own_inventory(deployed: Fleet, index: Index, folder: Path) -> Path:
    chosen = {"manager": "uv", "source": "index", "torch_index": f"{index.url}/torch/"}
    return deployed.inventory(folder, h2={"python_env": chosen})


def test_the_host_downloads_its_environment_for_itself(
    deployed: Fleet, pointed: Host, index: Index, tmp_path: Path
) -> None:
    right = _installed(deployed.hosts[0])
    (environment,) = pointed.path(f"{HOME}/envs").iterdir()
    pointed.sh(f"rm -rf {HOME}/envs")
    served = pointed.pid
    chosen = {"manager": "uv", "source": "index", "torch_index": f"{index.url}/torch/"}
    inventory = deployed.inventory(tmp_path, h2={"python_env": chosen})

    # A wheel that is not the locked one is refused, and nothing is started on what there is.
    index.damaged.add("markupsafe")
    done = fleet("apply", "-i", inventory, "--limit", pointed.name)
    assert done.code == 1
    assert not (environment / ".whole").exists()
    assert pointed.pid == served
    refusal = done.complaint

    # The same command finishes once the index is right.
    index.damaged.clear()
    done = ok(fleet("apply", "-i", inventory, "--limit", pointed.name, "--json"))
    assert "python_env" in done.changed(pointed.name)
    assert (environment / ".whole").read_text().strip() == environment.name
    assert _installed(pointed) == right
    # Every wheel came from the index, to the host itself and to nobody else.
    assert set(index.sent) == set(index.wheels)
    assert {client for clients in index.sent.values() for client in clients} == {pointed.address}
    # torch came from torch_index, the others from the index that uv is configured with.
    assert {"/torch/torch/", "/simple/gradio/"} <= {path for _, path in index.log}
    # The tests before this one may have restarted it as often as systemd lets happen by itself.
    pointed.sh("systemctl reset-failed minigpt4-demo; systemctl restart minigpt4-demo")
    assert pointed.healthy()
    words(refusal, f"{pointed.name}: python_env", "markupsafe", "ash mismatch")


def test_what_was_downloaded_is_what_the_wheelhouse_has(deployed: Fleet, one: Host) -> None:
    """Both sources make the same environment: file for file, those that a wheel's RECORD names."""
    other = deployed.hosts[1]
    digests = [
        hashlib.sha256(
            host.sh(
                f"cd {HOME}/envs/*/lib/python*/site-packages && cat *.dist-info/RECORD | "
                "grep -v -e '^\\.\\./' -e 'dist-info/' | sort"
            ).encode()
        ).hexdigest()
        for host in (one, other)
    ]
    assert digests[0] == digests[1]
