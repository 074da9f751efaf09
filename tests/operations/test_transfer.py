"""Transfers of weights: real rsync, over a connection that breaks as real ones do."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent
import pytest
from pyinfra.api import Config, Inventory, State

from gpufleet.catalog import WeightFile
from gpufleet.weights.plan import Progress, Stored, landing
from gpufleet.weights.transfer import Meter, Order, Way, bring

CONTENTS = {"a.bin": os.urandom(300_000), "d/b 1.bin": os.urandom(200_000)}
FILES = [
    WeightFile(path=path, bytes=len(text), sha256=hashlib.sha256(text).hexdigest())
    for path, text in CONTENTS.items()
]

#: Takes ssh's place: an address, then what the host's shell runs. It breaks after a second, as
#: often as a file beside it has lines.
BREAKING = """#!/bin/sh
shift
[ -s "$0.breaks" ] || exec sh -c "$*"
sed -i 1d "$0.breaks"
timeout -s KILL 1 sh -c "$*"
echo 'client_loop: send disconnect: Broken pipe' >&2
exit 255
"""


@pytest.fixture
def ssh(tmp_path: Path) -> Path:
    program = tmp_path / "ssh"
    program.write_text(BREAKING)
    program.chmod(0o755)
    return program


@pytest.fixture
def order(tmp_path: Path) -> Order:
    """Two files, half a megabyte, to a host that has nothing."""
    source = tmp_path / "source"
    for path, content in CONTENTS.items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes(content)
    root = tmp_path / "host"
    order = Order(str(root), landing("m", FILES, Stored()), source, tuple(FILES), patience=20)
    Path(order.staging).mkdir(parents=True)
    return order


def state() -> State:
    return State(Inventory((["@local"], {})), Config())


def run(order: Order, way: Way) -> tuple[bool, list[Progress]]:
    """Bring the order; whether it worked, and what was reported."""
    said: list[Progress] = []
    host: Any = SimpleNamespace(name="h", print_prefix="[h] ", connector=None)
    return bring(state(), host, order, way, said.append, lambda: None), said


def landed(order: Order) -> dict[str, bytes]:
    here = Path(order.root) / "weights" / order.plan.version
    return {path: (here / path).read_bytes() for path in CONTENTS if (here / path).exists()}


def test_progress_is_told_while_bytes_travel(order: Order):
    slow = Order(**{**vars(order), "bandwidth_kib": 100})
    ok, said = run(slow, Way())
    assert ok
    sending = [one for one in said if one.state == "sending"]
    assert len({one.bytes for one in sending}) > 2
    assert [one.bytes for one in sending] == sorted(one.bytes for one in sending)
    assert {(one.of, one.via) for one in sending} == {(500_000, "rsync")}
    assert any(30_000 < one.rate < 600_000 for one in sending)
    assert said[-1].state == "done"
    assert landed(order) == CONTENTS


@pytest.mark.parametrize("times", [1, 3])
def test_a_connection_that_breaks_is_made_again(order: Order, ssh: Path, times: int):
    Path(f"{ssh}.breaks").write_text("broken\n" * times)
    slow = Order(**{**vars(order), "bandwidth_kib": 150})
    ok, said = run(slow, Way((str(ssh), "host")))
    assert ok
    assert [one.state for one in said].count("cut") == times
    assert landed(order) == CONTENTS


def test_a_host_that_stays_away_is_given_up_with_one_line(
    order: Order, ssh: Path, caplog: pytest.LogCaptureFixture
):
    Path(f"{ssh}.breaks").write_text("broken\n" * 99)
    began = time.monotonic()
    ok, _ = run(
        Order(**{**vars(order), "patience": 3, "bandwidth_kib": 20}), Way((str(ssh), "host"))
    )
    assert not ok
    assert time.monotonic() - began < 60
    (line,) = caplog.messages
    assert line.startswith("[h] gpufleet: the connection broke and did not come back in 3 s: ")
    assert line.endswith("apply again when the host answers, it goes on where this stopped")
    assert landed(order) == {}


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ("ops@host: Permission denied (publickey).", "Permission denied"),
        ("Host key verification failed.", "Host key verification failed"),
        ("sh: 1: rsync: not found", "install rsync on the host"),
    ],
)
def test_what_trying_again_cannot_mend_fails_at_once(
    order: Order, ssh: Path, caplog: pytest.LogCaptureFixture, says: str, expected: str
):
    ssh.write_text(f"#!/bin/sh\necho '{says}' >&2\nexit 255\n")
    ok, said = run(order, Way((str(ssh), "host")))
    assert not ok
    assert "cut" not in [one.state for one in said]
    (line,) = caplog.messages
    assert expected in line


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.write_bytes(bytes(200_000)),
        lambda file: file.unlink(),
        lambda file: (file.rename(f"{file}.old"), file.write_bytes(CONTENTS["d/b 1.bin"])),
    ],
    ids=["rewritten", "removed", "replaced"],
)
def test_a_file_that_changes_on_the_way_ends_the_transfer(
    order: Order, caplog: pytest.LogCaptureFixture, change: Callable[[Path], object]
):
    slow = Order(**{**vars(order), "bandwidth_kib": 150})
    gevent.spawn_later(1, change, order.source / "d" / "b 1.bin")
    ok, _ = run(slow, Way())
    assert not ok
    (line,) = caplog.messages
    assert f"weight file {order.source / 'd' / 'b 1.bin'} changed on this machine" in line
    assert landed(order) == {}


def test_hosts_wait_for_their_turn(order: Order, tmp_path: Path):
    shared, said = state(), dict[str, list[Progress]](a=[], b=[])
    running = []
    for name, told in said.items():
        own = {**vars(order), "root": str(tmp_path / name), "at_once": 1, "bandwidth_kib": 250}
        own_order = Order(**own)
        Path(own_order.staging).mkdir(parents=True)
        host: Any = SimpleNamespace(name=name, print_prefix="", connector=None)
        arguments = (shared, host, own_order, Way(), told.append, lambda: None)
        running.append(gevent.spawn(bring, *arguments))
    while not all(greenlet.ready() for greenlet in running):
        going = [n for n, told in said.items() if told and told[-1].state == "sending"]
        assert len(going) <= 1
        gevent.sleep(0.02)
    assert [greenlet.get() for greenlet in running] == [True, True]
    assert said["b"][0].state == "waiting"


def test_a_meter_counts_on_from_what_was_there(order: Order):
    there = Stored(staged={order.plan.version: {"a.bin": 100_000}})
    plan = landing("m", FILES, there)
    said: list[Progress] = []
    meter = Meter(Order(**{**vars(order), "plan": plan}), said.append)
    assert (meter.bytes, meter.of) == (100_000, 500_000)
    meter.at(50_000)
    assert meter.bytes == 100_000
    meter.at(600_000)
    assert meter.bytes == 500_000
