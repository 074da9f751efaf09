"""`./fleet weights fetch` as a person runs it, against a hub on this machine."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_double import Hub, always, serving, sha256

from gpufleet import ROOT

BODY = random.Random(3).randbytes(3_000_000)
FILES = {"config.json": b"{}\n", "pytorch_model.bin": BODY}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as found:
        found.repositories["owner/small"] = dict(FILES)
        yield found


class Command:
    """The command, its store and its own weight set."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.store = folder / "store"
        self.environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            "HF_ENDPOINT": hub.address,
            "XDG_CACHE_HOME": str(folder / "cache"),
        }
        self.set = folder / "small.yaml"
        given = {
            "schema": 1,
            "title": "a small set",
            "kind": "llama",
            "folder": "small",
            "sources": [{"huggingface": "owner/small"}],
            "include": ["*"],
            "evidence": {"source": "this test", "seen": "2026-11-21", "state": "verified"},
        }
        self.set.write_text(yaml.safe_dump(given), "utf-8")

    def start(self, *options: str) -> subprocess.Popen[str]:
        command = [str(ROOT / "fleet"), "weights", "fetch", str(self.set)]
        return subprocess.Popen(
            [*command, "--store", str(self.store), *options],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *options: str) -> tuple[int, str, str]:
        with self.start(*options) as process:
            out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def json(self, *options: str) -> dict[str, Any]:
        code, out, err = self.run("--json", *options)
        document: dict[str, Any] = json.loads(out)
        assert (document["exit_code"], err) == (code, "")
        return document

    def there(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.store / "small").glob("*")}


@pytest.fixture
def command(tmp_path: Path, hub: Hub) -> Command:
    return Command(tmp_path, hub)


def wait_for(hub: Hub, sent: int) -> None:
    deadline = time.monotonic() + 30
    while hub.sent < sent:
        assert time.monotonic() < deadline, "nothing was fetched"
        time.sleep(0.01)


def test_it_fetches_a_set_and_says_so_line_by_line(command: Command):
    code, out, err = command.run()
    assert (code, err) == (0, "")
    assert command.there() == FILES
    assert "small/pytorch_model.bin fetched from owner/small of 127.0.0.1:" in out
    assert out.splitlines()[-1].startswith(
        "2 of 2 files are there and verified, 2 of them new (2.9 MiB), "
    )


def test_its_document_has_every_file_with_its_hash_and_where_it_is_from(command: Command, hub: Hub):
    document = command.json()
    assert (document["version"], document["command"]) == (1, "weights fetch")
    assert document["huggingface"] == {"address": hub.address, "why": "HF_ENDPOINT says so"}
    (one,) = document["sets"]
    assert one["origin"] == f"owner/small@{hub.commit('owner/small')}"
    assert {file["path"]: file["sha256"] for file in one["files"]} == {
        f"small/{path}": sha256(body) for path, body in FILES.items()
    }
    assert {file["state"] for file in command.json()["sets"][0]["files"]} == {"present"}


def test_what_it_cannot_have_is_a_line_and_exit_code_1(command: Command, hub: Hub):
    hub.faults = [always("/cdn/", lambda request: request.answer(404, b""))]
    code, out, _ = command.run()
    assert code == 1
    assert "does not have it (404)" in out
    assert out.splitlines()[-1].endswith("; failed: small/pytorch_model.bin")
    assert command.there() == {"config.json": FILES["config.json"]}


def test_what_makes_no_sense_is_one_line_and_exit_code_2(command: Command, tmp_path: Path):
    assert command.run("--mirror", "njuu")[0] == 2
    assert command.run("--from", str(tmp_path / "nowhere"))[0] == 2
    code, out, err = command.run("no-such-set")
    assert (code, out) == (2, "")
    assert err.startswith("fleet: no weight set 'no-such-set'")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_it_goes_on_where_it_was_ended(command: Command, hub: Hub, how: signal.Signals):
    hub.rate = 2_000_000
    with command.start() as process:
        wait_for(hub, 800_000)
        process.send_signal(how)
        out, err = process.communicate(timeout=30)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    if how == signal.SIGINT:
        again = f"./fleet weights fetch {command.set} --store {command.store}"
        assert f"stopped; {again} goes on from here" in out
        assert err == ""
    assert "pytorch_model.bin" not in command.there()
    hub.rate, before = 0, hub.sent
    assert command.run()[0] == 0
    assert command.there() == FILES
    assert hub.sent - before < len(BODY) - 500_000


def test_a_file_that_cannot_be_written_is_a_line_and_what_came_is_kept(command: Command, hub: Hub):
    limited = ["sh", "-c", 'ulimit -f 2000; trap "" XFSZ; exec "$@"', "sh"]
    arguments = [*limited, str(ROOT / "fleet"), "weights", "fetch", str(command.set)]
    done = subprocess.run(
        [*arguments, "--store", str(command.store)],
        env=command.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert "small/pytorch_model.bin: cannot be written: File too large" in done.stdout
    (partial,) = (command.store / ".partial" / "small").glob("*")
    assert 0 < partial.stat().st_size < len(BODY)
    assert command.run()[0] == 0
    assert command.there() == FILES
