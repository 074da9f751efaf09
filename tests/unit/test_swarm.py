"""Hosts exchange pieces of weights: what they decide, and what real ones on this machine do."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpufleet.catalog import WeightFile
from gpufleet.errors import FleetError
from gpufleet.weights.swarm import on_host, plan, torrent
from gpufleet.weights.swarm.client import Member, Swarm
from gpufleet.weights.swarm.torrent import Source, Torrent

lt: Any = pytest.importorskip("libtorrent")

MIB = 1 << 20


def until(condition: Callable[[], Any], what: str, timeout: float = 60) -> Any:
    """Wait until the condition holds and return what it gave; fail with `what` if it never does."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout:.0f} s: {what}"
        time.sleep(0.05)
    return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def written(folder: Path, sizes: dict[str, int]) -> list[Source]:
    """Files with content of their own, as a push takes them."""
    files = []
    for path, size in sizes.items():
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(secrets.token_bytes(size))
        sha256 = hashlib.sha256(place.read_bytes()).hexdigest()
        files.append((WeightFile(path=path, bytes=size, sha256=sha256), place))
    return torrent.sources(files)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class TestPlan:
    def test_a_swarm_is_worth_its_start_for_large_files_and_several_hosts(self):
        assert plan.worth(40 << 30, 8)[0]
        assert plan.worth(256 * MIB, 2)[0]

    @pytest.mark.parametrize(("size", "hosts"), [(40 << 30, 1), (MIB, 8), (0, 8)])
    def test_it_is_not_for_one_host_or_for_little(self, size: int, hosts: int):
        worth, why = plan.worth(size, hosts)
        assert not worth
        assert why

    @pytest.mark.parametrize("size", [1, 256 * MIB, 3 << 30, 40 << 30, 1 << 40])
    def test_pieces_are_powers_of_two_and_of_many_sizes_not_too_many(self, size: int):
        piece = plan.piece_size(size)
        assert piece.bit_count() == 1
        assert plan.SMALLEST_PIECE <= piece <= plan.LARGEST_PIECE
        assert size <= piece * plan.PIECES or piece == plan.LARGEST_PIECE

    @pytest.mark.parametrize(
        ("tried", "lone"),
        [
            ({"a": {"b": False}, "b": {"a": False}}, {"a", "b"}),
            ({"a": {"b": False}, "b": {"a": True}}, set()),
            ({"a": {"b": None}, "b": {"a": False}}, set()),
            ({"a": {}, "b": {"a": False}}, set()),
            ({"a": {}}, set()),
            (
                {
                    "a": {"b": True, "c": False},
                    "b": {"a": True, "c": False},
                    "c": {"a": False, "b": False},
                },
                {"c"},
            ),
        ],
    )
    def test_alone_is_who_reaches_nobody_and_is_reached_by_nobody_of_all_who_tried(
        self, tried: dict[str, dict[str, bool | None]], lone: set[str]
    ):
        assert {name for name in tried if plan.alone(tried, name)} == lone

    def test_ciphers_that_cost_least_come_first_and_none_is_added(self):
        given = "chacha20-poly1305@openssh.com,aes128-ctr,aes128-gcm@openssh.com,aes256-ctr"
        assert plan.cheapest_first(given) == (
            "aes128-gcm@openssh.com,chacha20-poly1305@openssh.com,aes128-ctr,aes256-ctr"
        )
        assert plan.cheapest_first("aes256-ctr") == "aes256-ctr"

    @pytest.mark.parametrize("hosts", [1, 2, 3, 8])
    def test_every_piece_is_asked_of_this_machine_by_one_host_first(self, hosts: int):
        pieces = set(range(100))
        turns = [on_host.in_turn(pieces, (number, hosts)) for number in range(hosts)]
        assert set().union(*turns) == pieces
        assert sum(map(len, turns)) == len(pieces)


class TestTorrent:
    @pytest.mark.parametrize(
        "size", [1, plan.BLOCK, plan.SMALLEST_PIECE, plan.SMALLEST_PIECE + 1, 5 * MIB + 12345]
    )
    def test_hashes_are_those_that_libtorrent_makes(self, tmp_path: Path, size: int):
        (source,) = written(tmp_path / "files", {"a": size})
        piece = plan.SMALLEST_PIECE
        listed = lt.file_storage()
        listed.add_file("a", size)
        peer = lt.create_torrent(listed, piece, lt.create_torrent.v2_only)
        lt.set_piece_hashes(peer, str(tmp_path / "files"))
        theirs = peer.generate()
        ours = lt.bdecode(torrent.make([source], lt.bencode).content)
        assert ours[b"info"][b"piece length"] == piece
        assert ours[b"info"][b"file tree"][b"f000000"] == theirs[b"info"][b"file tree"][b"a"]
        layers = [document.get(b"piece layers", {}) for document in (ours, theirs)]
        assert layers[0] == layers[1]

    def test_two_pushes_of_the_same_files_have_different_hashes(self, tmp_path: Path):
        found = written(tmp_path / "files", {"a": 1000})
        hashes = {
            str(
                lt.torrent_info(lt.bdecode(torrent.make(found, lt.bencode).content))
                .info_hashes()
                .v2
            )
            for _ in range(2)
        }
        assert len(hashes) == 2

    def test_a_file_is_read_once_until_it_changes(self, tmp_path: Path):
        (source,) = written(tmp_path / "files", {"a": MIB})

        def root() -> Any:
            (found,) = torrent.sources([(source.file, source.place)])
            made = lt.bdecode(torrent.make([found], lt.bencode).content)
            return made[b"info"][b"file tree"][b"f000000"][b""][b"pieces root"]

        first = root()
        stat = source.place.stat()
        source.place.write_bytes(bytes(MIB))
        os.utime(source.place, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert root() == first
        os.utime(source.place)
        assert root() != first

    def test_a_file_of_another_size_or_none_is_named(self, tmp_path: Path):
        (source,) = written(tmp_path / "files", {"a": 1000})
        source.place.write_bytes(b"short")
        with pytest.raises(FleetError, match=r"files/a: 5 bytes, expected 1000"):
            torrent.sources([(source.file, source.place)])
        source.place.unlink()
        with pytest.raises(FleetError, match=r"files/a: No such file"):
            torrent.sources([(source.file, source.place)])


class Agent:
    """What runs on a host, on this machine: the real process, spoken to as ssh's end does."""

    def __init__(self, folder: Path, push: Push, name: str, quiet: float = 60, **limits: Any):
        self.folder, self.push, self.name = folder, push, name
        self.staging = folder / "staging"
        self.staging.mkdir(parents=True, exist_ok=True)
        own = folder / "own"
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir()
        shutil.copy(on_host.__file__, own)
        (own / "lib").mkdir()
        (own / "lib" / "libtorrent").symlink_to(Path(lt.__file__).parent)
        self.port = free_port()
        self.process = subprocess.Popen(
            [sys.executable, str(own / "on_host.py"), str(self.port), str(quiet)],
            env={**os.environ, "RUNTIME_DIRECTORY": str(own)},
            **limits,
        )
        self.control = socket.socket(socket.AF_UNIX)
        until(lambda: self.control.connect_ex(str(own / "control")) == 0, "the agent listens")
        self.stream = self.control.makefile("r")
        self.say({"start": push.start(self)})

    def say(self, message: dict[str, Any]) -> None:
        self.control.sendall(json.dumps(message).encode() + b"\n")

    def meet(self, *others: Agent) -> None:
        known = {one.name: {"addresses": ["127.0.0.1"], "port": one.port} for one in others}
        self.say({"peers": known, "turn": [0, 1]})

    def report(self) -> Any:
        """How far it is now."""
        self.control.settimeout(20)
        self.say({})
        return json.loads(self.stream.readline())

    def becomes(self, state: str) -> Any:
        """Its report once it is in that state."""
        return until(
            lambda: report if (report := self.report())["state"] == state else None,
            f"{self.name} is {state}; it is {self.report()}",
        )

    def holds(self, source: Source) -> bool:
        path = self.staging / source.file.path
        return path.is_file() and path.read_bytes() == source.place.read_bytes()


class Push:
    """Files, their torrent, and whoever takes part; all ends with the test."""

    def __init__(self, folder: Path, sizes: dict[str, int]) -> None:
        self.folder = folder
        self.sources = written(folder / "files", sizes)
        self.torrent: Torrent = torrent.make(self.sources, lt.bencode)
        self.key = secrets.token_bytes(32)
        self.agents: list[Agent] = []
        self.encrypt = False
        self.sessions: list[Any] = []

    def start(self, agent: Agent) -> dict[str, Any]:
        return {
            "name": agent.name,
            "push": "p",
            "key": base64.b64encode(self.key).decode(),
            "encrypt": self.encrypt,
            "torrent": base64.b64encode(self.torrent.content).decode(),
            "staging": str(agent.staging),
            "files": {name: path for path, name in self.torrent.names.items()},
            "empty": list(self.torrent.empty),
            "turn": [0, 1],
        }

    def agent(self, name: str, **options: Any) -> Agent:
        self.agents.append(Agent(self.folder / name, self, name, **options))
        return self.agents[-1]

    def seed(self, content: bytes | None = None, corrupt: bool = False, **own: Any) -> Any:
        """A session on this machine that gives the files, or others in their place."""
        options = {**on_host.settings(0, self.encrypt), "disable_hash_checks": corrupt, **own}
        session = lt.session(options)
        params = lt.add_torrent_params()
        params.ti = lt.torrent_info(lt.bdecode(content or self.torrent.content))
        params.save_path = "/"
        places = {self.torrent.names[s.file.path]: s.place for s in self.sources if s.file.bytes}
        bad = self.folder / "bad"
        bad.mkdir(exist_ok=True)
        names: dict[int, str] = {}
        for index, name in enumerate(on_host.file_names(params.ti)):
            if name in places:
                names[index] = str(places[name])
                if corrupt:
                    (bad / name).write_bytes(bytes(places[name].stat().st_size))
                    names[index] = str(bad / name)
        params.renamed_files = names
        params.flags = on_host.quiet_flags(lt) | lt.torrent_flags.seed_mode
        handle = session.add_torrent(params)
        self.sessions.append(session)
        return handle


@pytest.fixture
def push(tmp_path: Path) -> Iterator[Push]:
    push = Push(tmp_path, {"a.bin": 5 * MIB + 12345, "sub/b.txt": 777, "empty": 0})
    try:
        yield push
    finally:
        for agent in push.agents:
            agent.process.kill()
            agent.process.wait()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestHosts:
    @pytest.mark.parametrize("encrypt", [False, True])
    def test_one_gets_all_from_another_that_this_machine_fed(self, push: Push, encrypt: bool):
        push.encrypt = encrypt
        one, two = push.agent("one"), push.agent("two")
        two.meet(one)
        one.meet(two)
        assert two.becomes("sending")["lacks"]
        push.seed().connect_peer(("127.0.0.1", one.port))
        for agent in (one, two):
            report = agent.becomes("done")
            assert report["bytes"] == report["of"] == 5 * MIB + 12345 + 777
            assert all(agent.holds(source) for source in push.sources)
        assert two.report()["reached"] == {"one": True}

    def test_what_was_there_is_used_and_what_was_wrong_is_replaced(self, push: Push):
        big = push.sources[0]
        staging = push.folder / "one" / "staging"
        staging.mkdir(parents=True)
        half = bytearray(big.place.read_bytes()[: 4 * MIB])
        half[MIB] ^= 1
        (staging / "a.bin").write_bytes(half)
        one = push.agent("one")
        before = one.becomes("sending")
        assert before["bytes"] == 4 * MIB - plan.SMALLEST_PIECE
        seed = push.seed()
        seed.connect_peer(("127.0.0.1", one.port))
        one.becomes("done")
        assert all(one.holds(source) for source in push.sources)
        assert seed.status().total_payload_upload < 2.5 * MIB

    def test_a_stranger_without_the_salt_gets_nothing_and_gives_nothing(self, push: Push):
        whole = push.agent("whole")
        push.seed().connect_peer(("127.0.0.1", whole.port))
        whole.becomes("done")
        lacking = push.agent("lacking")
        guessed = torrent.make(push.sources, lt.bencode).content  # same files, another salt
        taker = lt.session(on_host.settings(0, False))
        params = lt.add_torrent_params()
        for content, gets in ((guessed, False), (push.torrent.content, True)):
            params.ti = lt.torrent_info(lt.bdecode(content))
            params.save_path = str(push.folder / f"taker-{gets}")
            handle = taker.add_torrent(params)
            handle.connect_peer(("127.0.0.1", whole.port))
            if gets:
                until(lambda: handle.status().num_pieces > 0, "who has it gets pieces")  # noqa: B023
            else:
                time.sleep(2)
                assert handle.status().num_pieces == 0
        giver = push.seed(guessed)
        giver.connect_peer(("127.0.0.1", lacking.port))
        time.sleep(2)
        assert lacking.report()["bytes"] == 0

    def test_whoever_comes_from_an_address_of_no_member_is_turned_away(self, push: Push):
        one = push.agent("one")
        one.becomes("sending")
        seed = push.seed(outgoing_interfaces="127.0.0.9")
        seed.connect_peer(("127.0.0.1", one.port))
        time.sleep(2)
        assert one.report()["bytes"] == 0
        known = {"other": {"addresses": ["127.0.0.9"], "port": free_port()}}
        one.say({"peers": known, "turn": [0, 1]})
        time.sleep(0.5)
        again = push.seed(outgoing_interfaces="127.0.0.9")
        again.connect_peer(("127.0.0.1", one.port))
        one.becomes("done")

    def test_corrupt_pieces_are_rejected_and_the_rest_come_from_others(self, push: Push):
        one = push.agent("one")
        liar = push.seed(corrupt=True)
        liar.connect_peer(("127.0.0.1", one.port))
        until(lambda: liar.status().total_payload_upload > 0, "the liar sends something")
        push.seed().connect_peer(("127.0.0.1", one.port))
        one.becomes("done")
        assert all(one.holds(source) for source in push.sources)

    def test_a_full_disk_is_one_line(self, push: Push):
        def little() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, 2 * MIB))

        one = push.agent("one", preexec_fn=little)
        push.seed().connect_peer(("127.0.0.1", one.port))
        why = one.becomes("failed")["why"]
        assert "\n" not in why
        assert "a.bin" in why
        assert "too large" in why

    def test_one_that_hears_nothing_ends_by_itself(self, push: Push):
        one = push.agent("one", quiet=1)
        assert one.process.wait(20) == 0
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", one.port)) != 0

    def test_the_engine_is_given_to_who_knows_the_key_and_to_nobody_else(self, push: Push):
        one = push.agent("one")
        data = secrets.token_bytes(100_000)
        (push.folder / "one" / "own" / "engine.whl").write_bytes(data)
        port = one.becomes("sending")["wheel_port"]
        offer = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        offer |= {"from": [["127.0.0.1", free_port()], ["127.0.0.1", port]]}
        right, wrong = (base64.b64encode(key).decode() for key in (push.key, bytes(32)))
        assert on_host.fetch({**offer, "key": right}) == data
        assert on_host.fetch({**offer, "key": wrong}) is None
        assert on_host.fetch({**offer, "key": right, "sha256": "0" * 64}) is None


@pytest.fixture
def silent(tmp_path: Path) -> Member:
    """A host whose ssh never says a word."""
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/bin/sh\nexec sleep 30\n")
    ssh.chmod(0o755)
    return Member("one", (str(ssh), "host"), False, "192.0.2.1", "/staging", ("a",))


class TestClient:
    def test_a_file_that_changes_during_the_push_ends_it_with_one_line(
        self, tmp_path: Path, silent: Member
    ):
        (source,) = written(tmp_path / "files", {"a": MIB})
        with Swarm([(source.file, source.place)]) as swarm:
            swarm.join(silent)
            time.sleep(1)
            source.place.write_bytes(secrets.token_bytes(MIB))
            *_, last = swarm.follow("one")
        assert last.state == "failed"
        assert "files/a changed on this machine during the push" in last.why
        assert "\n" not in last.why

    def test_a_host_that_ssh_cannot_reach_fails_with_what_ssh_said(
        self, tmp_path: Path, silent: Member
    ):
        (source,) = written(tmp_path / "files", {"a": MIB})
        Path(silent.ssh[0]).write_text("#!/bin/sh\necho 'Permission denied.' >&2; exit 255\n")
        with Swarm([(source.file, source.place)]) as swarm:
            swarm.join(silent)
            *_, last = swarm.follow("one")
        assert (last.state, last.why) == ("failed", "ssh: Permission denied.")

    def test_the_process_and_its_ssh_end_with_whoever_started_them(
        self, tmp_path: Path, silent: Member
    ):
        (source,) = written(tmp_path / "files", {"a": MIB})
        marks = tmp_path / "ssh.pid"
        Path(silent.ssh[0]).write_text(f"#!/bin/sh\necho $$ > {marks}\nexec cat\n")
        code = (
            "import sys, time; from pathlib import Path; from gpufleet.catalog import WeightFile;"
            "from gpufleet.weights.swarm.client import *;"
            f"file = WeightFile(path='a', bytes={MIB}, sha256={source.file.sha256!r});"
            f"swarm = Swarm([(file, Path({str(source.place)!r}))]);"
            f"swarm.join(Member('one', ({silent.ssh[0]!r}, 'h'), False, '', '/s', ('a',)));"
            "print(swarm._child.pid, flush=True); time.sleep(60)"
        )
        parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        ssh = int(until(lambda: marks.exists() and marks.read_text().strip(), "ssh is started"))
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        for pid in (child, ssh):
            until(lambda: not alive(pid), f"process {pid} ends")  # noqa: B023


def alive(pid: int) -> bool:
    try:
        stat = Path("/proc", str(pid), "stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
