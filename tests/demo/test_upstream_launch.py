"""The launcher of upstream's own code, on this environment's gradio and a small double of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import upstream_double

LAUNCH = Path(__file__).parents[2] / "files" / "upstream" / "launch.py"
SECONDS = 120.0


class Launched:
    """demo.py of a repository under the launcher, with all that it looks for."""

    def __init__(self, folder: Path, demo: str = upstream_double.DEMO, *more: str) -> None:
        self.checkout = folder / "checkout"
        upstream_double.write(self.checkout, demo)
        home = folder / "home"
        config = upstream_double.surroundings(home, folder / "weights")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.told.bind(str(folder / "notify"))
        self.told.settimeout(SECONDS)
        self.log = folder / "log"
        command = [sys.executable, str(LAUNCH), "--checkout", str(self.checkout)]
        command += ["--server-name", "127.0.0.1", "--server-port", str(self.port)]
        command += ["--max-waiting", "3", "--model-id", "small", *more]
        command += ["--", "--cfg-path", str(config), "--gpu-id", "0", "--options", "model.arch=x"]
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "TORCH_HOME": str(home),
            "GRADIO_ANALYTICS_ENABLED": "False",
            "NOTIFY_SOCKET": str(folder / "notify"),
            "MODELDEMO_REVISION": "r1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=home, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    def ready(self) -> bytes:
        """Wait until systemd would be told; what it was told."""
        return self.told.recv(100)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as reply:
            return json.load(reply)

    def ended(self) -> str:
        """Wait for its end, which is none of success; its last line."""
        assert self.process.wait(SECONDS) != 0
        return self.log.read_text("utf-8").strip().splitlines()[-1]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.told.close()


Launch = Callable[..., Launched]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    started: list[Launched] = []

    def start(*words: str) -> Launched:
        started.append(Launched(tmp_path, *words))
        return started[-1]

    yield start
    for one in started:
        one.stop()


def test_a_demo_that_asks_for_a_share_link_is_served_here_alone(launch: Launch):
    page = launch()
    assert page.ready() == b"READY=1"
    assert page.get("/healthz") == {
        "status": "ok",
        "model": "small",
        "revision": "r1",
        "runtime": "upstream",
    }
    config = page.get("/config")
    assert {"image", "chatbot", "slider"} <= {part["type"] for part in config["components"]}
    assert all(step["queue"] is not False for step in config["dependencies"])
    said = page.log.read_text("utf-8")
    assert "launch: small is served" in said
    assert "gradio.live" not in said
    # Nothing was written into the checkout.
    written = {str(path.relative_to(page.checkout)) for path in page.checkout.rglob("*.*")}
    assert written == set(upstream_double.FILES)


def test_accounts_of_a_file_are_asked_for_and_health_is_not(launch: Launch, tmp_path: Path):
    accounts = tmp_path / "accounts"
    accounts.write_text("# people\nann:secret:word\n")
    page = launch(upstream_double.DEMO, "--auth-file", str(accounts))
    page.ready()
    assert page.get("/healthz")["status"] == "ok"
    with pytest.raises(urllib.error.HTTPError) as refused:
        page.get("/config")
    assert refused.value.code == 401


WANTS_THE_NETWORK = """
import socket, urllib.request
for want in (
    lambda: urllib.request.urlopen("http://weights.example.net/x"),
    lambda: socket.create_connection(("192.0.2.1", 80), 5),
):
    try:
        want()
    except OSError as error:
        print(error)
"""


def test_a_demo_that_wants_the_network_is_refused_and_one_without_a_page_is_an_error(
    launch: Launch,
):
    page = launch(WANTS_THE_NETWORK)
    assert page.ended().endswith("demo.py ended and has launched no page")
    said = page.log.read_text("utf-8")
    for host in ("weights.example.net", "192.0.2.1"):
        assert f"launch: the demo may not reach {host}: it runs offline" in said


def test_accounts_that_are_none_are_an_error(launch: Launch, tmp_path: Path):
    (tmp_path / "accounts").write_text("ann\n")
    page = launch(upstream_double.DEMO, "--auth-file", str(tmp_path / "accounts"))
    assert page.ended().endswith("accounts: no lines of the form USER:PASSWORD")
