"""Weights reach real hosts that exchange them, through cuts, reboots and a laptop that sleeps."""

from __future__ import annotations

import hashlib
import os
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import fleets
import platformdirs
import pytest
from fleets import Fleet, Host, until

from gpufleet.catalog import WeightFile
from gpufleet.weights.swarm import plan
from gpufleet.weights.swarm.client import ENDS, Member, Progress, Swarm
from gpufleet.weights.swarm.on_host import unit_of

MIB = 1 << 20
STAGING = "/opt/minigpt4/incoming/weights"
PATHS = ("a.bin", "sub/b.txt", "empty")


@pytest.fixture(scope="module")
def lab3(can_boot: None) -> Iterator[Fleet]:
    """Three fresh hosts."""
    fleets.sweep()
    name = f"t-{os.getpid()}-swarm"
    try:
        yield fleets.boot(name, 3)
    finally:
        fleets.take_down(name)


class Trial:
    """One push to the hosts of a lab, followed from threads as pyinfra's are."""

    def __init__(self, hosts: Sequence[Host], folder: Path, mib: int, **options: float) -> None:
        self.hosts = hosts
        self.files = []
        for path, size in zip(PATHS, (mib * MIB + 12345, 777, 0), strict=True):
            place = folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.exists():
                place.write_bytes(secrets.token_bytes(size))
            sha256 = hashlib.sha256(place.read_bytes()).hexdigest()
            self.files.append((WeightFile(path=path, bytes=size, sha256=sha256), place))
        self.seen: dict[str, list[Progress]] = {host.name: [] for host in hosts}
        self.swarm = Swarm(self.files, **options)  # type: ignore[arg-type]
        self.followers = [threading.Thread(target=self._follow, args=(host,)) for host in hosts]
        for follower in self.followers:
            follower.start()

    def _follow(self, host: Host) -> None:
        ssh = tuple(host.lab.ssh_command(host.name))
        self.swarm.join(Member(host.name, ssh, False, host.address, STAGING, PATHS))
        for progress in self.swarm.follow(host.name):
            self.seen[host.name].append(progress)

    def now(self, host: Host) -> Progress:
        """How far a host is."""
        return self.seen[host.name][-1] if self.seen[host.name] else Progress("starting")

    def until(self, host: Host, condition: Callable[[Progress], bool], what: str) -> None:
        """Wait until a host is so far."""

        def holds() -> bool:
            assert self.now(host).state not in ENDS or condition(self.now(host)), self.now(host)
            return condition(self.now(host))

        until(holds, f"{host.name}: {what}", 200)

    def half(self, host: Host, part: float = 0.2) -> None:
        """Wait until a host has some, but not all."""
        self.until(host, lambda seen: seen.bytes > seen.of * part > 0, "has a part of it")

    def finish(self) -> dict[str, Progress]:
        """How it ended for each host."""
        for follower in self.followers:
            follower.join(400)
            assert not follower.is_alive(), self.seen
        return {host.name: self.now(host) for host in self.hosts}

    def all_done(self) -> None:
        """Wait for the end, and look at the files on every host."""
        ended = self.finish()
        assert {progress.state for progress in ended.values()} == {"done"}, ended
        sums = "".join(f"{file.sha256}  {file.path}\n" for file, _ in self.files)
        for host in self.hosts:
            host.sh(f"cd {STAGING} && sha256sum --quiet -c - <<'END'\n{sums}END")


@contextmanager
def pushing(
    hosts: Sequence[Host], folder: Path, mib: int = 24, **options: float
) -> Iterator[Trial]:
    """A push of new content to empty hosts, slow enough to be disturbed where limited."""
    for host in hosts:
        host.sh(f"rm -rf {STAGING} {STAGING}.swarm")
    trial = Trial(hosts, folder, mib, **options)
    try:
        yield trial
    finally:
        trial.swarm.close()
        for follower in trial.followers:
            follower.join(60)


def left(host: Host) -> list[str]:
    """What a push may leave on a host only while it lasts."""
    unit = unit_of(STAGING)
    found = host.try_(
        f"systemctl list-units --all --no-legend --plain '{unit}*' | cut -d' ' -f1; "
        f"ls -d {STAGING}.swarm /run/{unit} 2>/dev/null; pgrep -f '[o]n_host.py'; "
        "ss -Hltn | grep -v ':22 '"
    )
    return found.stdout.split("\n")[:-1]


def processes(trial: Trial) -> list[int]:
    """The push's process on this machine, and its ssh's."""
    child = trial.swarm._child.pid
    text = Path(f"/proc/{child}/task/{child}/children").read_text()
    return [child, *map(int, text.split())]


def test_files_reach_every_host_at_about_one_upload_and_nothing_else_stays(
    lab3: Fleet, tmp_path: Path
) -> None:
    with pushing(lab3.hosts, tmp_path, 32, upload_kib=4 << 10) as trial:
        trial.all_done()
        assert trial.swarm.uploaded < 1.25 * 32 * MIB + 9 * MIB  # the engine, once
        for host in lab3.hosts:
            assert any(progress.peers == 2 for progress in trial.seen[host.name])
            assert unit_of(STAGING) + ".service" in left(host)
            shown = host.show("ProtectSystem", unit_of(STAGING))
            assert shown == "strict"
            secret = host.sh(f"systemctl show {unit_of(STAGING)}; journalctl -u {unit_of(STAGING)}")
            assert "BEGIN" not in secret
    for host in lab3.hosts:
        assert left(host) == []


def test_on_a_line_that_is_quicker_than_the_hosts_little_is_uploaded_twice(
    lab3: Fleet, tmp_path: Path
) -> None:
    with pushing(lab3.hosts, tmp_path, 192) as trial:
        trial.all_done()
        assert trial.swarm.uploaded < 1.4 * 192 * MIB + 9 * MIB


def test_a_push_that_ends_while_its_files_are_hashed_leaves_nothing(
    lab3: Fleet, tmp_path: Path
) -> None:
    data = secrets.token_bytes(24 * MIB + 12345)
    (tmp_path / PATHS[0]).write_bytes(data)
    name = f"{hashlib.sha256(data).hexdigest()}-{plan.piece_size(len(data))}.json"
    remembered = platformdirs.user_cache_path("gpufleet") / "pieces" / name
    remembered.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(remembered)  # whoever reads it waits, as for a long file
    with pushing(lab3.hosts, tmp_path) as trial:
        unit = unit_of(STAGING) + ".service"
        until(lambda: any(unit in left(host) for host in lab3.hosts), "a unit runs", 30)
        closing = threading.Thread(target=trial.swarm.close)
        closing.start()
        until(lambda: not any(left(host) for host in lab3.hosts), "nothing is left", 20)
        remembered.write_text("")
        closing.join(30)
        assert not closing.is_alive()
    remembered.unlink()


def test_a_push_that_was_killed_leaves_hosts_that_end_by_themselves_and_is_continued(
    lab3: Fleet, tmp_path: Path
) -> None:
    one = lab3.hosts[0]
    with pushing(lab3.hosts, tmp_path, upload_kib=3000, quiet=3) as trial:
        trial.half(one)
        doomed = processes(trial)
        os.kill(doomed[0], signal.SIGKILL)
        assert {progress.state for progress in trial.finish().values()} == {"failed"}
    for host in lab3.hosts:
        until(lambda: left(host) == [], f"{host.name} ends by itself", 60)  # noqa: B023
    for pid in doomed:
        until(lambda: not Path(f"/proc/{pid}").exists(), "no ssh is left", 60)  # noqa: B023
    again = Trial(lab3.hosts, tmp_path, 24)
    try:
        again.all_done()
        first = next(p for p in again.seen[one.name] if p.state == "sending")
        assert first.bytes > 0.1 * first.of
    finally:
        again.swarm.close()


@contextmanager
def walled_off(lab3: Fleet, host: Host) -> Iterator[None]:
    """No packet goes between this host and the others; this machine reaches all of them."""
    table = f"bridge {lab3.name}-wall"
    others = ", ".join(one.address for one in lab3.hosts if one.name != host.name)
    rules = f"""
        table {table} {{
            chain between {{
                type filter hook forward priority 0;
                ip saddr {host.address} ip daddr {{ {others} }} drop
                ip daddr {host.address} ip saddr {{ {others} }} drop
            }}
        }}
    """
    subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)
    try:
        yield
    finally:
        subprocess.run(["nft", "delete", "table", *table.split()], check=True)


def test_hosts_that_cannot_reach_each_other_are_alone(lab3: Fleet, tmp_path: Path) -> None:
    one, two, three = lab3.hosts
    with (
        walled_off(lab3, three),
        pushing(lab3.hosts, tmp_path, upload_kib=1500) as trial,
    ):
        ended = trial.finish()
        states = {name: progress.state for name, progress in ended.items()}
        assert states == {one.name: "done", two.name: "done", three.name: "alone"}
        assert "reaches no other host" in ended[three.name].why
        until(lambda: left(three) == [], "nothing of it stays there", 30)


@pytest.mark.long
def test_a_cut_ssh_is_made_again_and_the_unit_goes_on_meanwhile(
    lab3: Fleet, tmp_path: Path
) -> None:
    one = lab3.hosts[0]
    with pushing(lab3.hosts, tmp_path, upload_kib=1500) as trial:
        trial.half(one)
        before = one.show("MainPID", unit_of(STAGING))
        one.try_("kill $(pgrep -f 'sshd: root@notty')")
        until(lambda: any("trying again" in p.why for p in trial.seen[one.name]), "it is noticed")
        trial.half(one, 0.5)
        assert one.show("MainPID", unit_of(STAGING)) == before
        trial.all_done()
    assert left(one) == []


@pytest.mark.long
def test_a_host_that_reboots_goes_on_with_what_it_had(lab3: Fleet, tmp_path: Path) -> None:
    one = lab3.hosts[0]
    with pushing(lab3.hosts, tmp_path, 48, upload_kib=1500) as trial:
        trial.half(one)
        had = trial.now(one).bytes
        one.sh("sync")
        with suppress(AssertionError):
            one.sh("systemctl reboot")
        count = len(trial.seen[one.name])
        trial.all_done()
        after = [p for p in trial.seen[one.name][count:] if p.state == "sending"]
        assert after[0].bytes > had / 2
    for host in lab3.hosts:
        assert left(host) == []


@pytest.mark.long
def test_a_laptop_that_sleeps_for_a_minute_goes_on(lab3: Fleet, tmp_path: Path) -> None:
    with pushing(lab3.hosts, tmp_path, upload_kib=1500) as trial:
        trial.half(lab3.hosts[0])
        asleep = processes(trial)
        for pid in asleep:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(60)
        for pid in asleep:
            with suppress(ProcessLookupError):  # the first to wake may replace an ssh
                os.kill(pid, signal.SIGCONT)
        trial.all_done()
    for host in lab3.hosts:
        assert left(host) == []


@pytest.mark.long
def test_a_disk_that_fills_fails_its_host_in_one_line_and_no_other(
    lab3: Fleet, tmp_path: Path
) -> None:
    one, two, three = lab3.hosts
    one.sh(f"rm -rf {STAGING}")
    one.sh(
        f"mkdir -p {Path(STAGING).parent} && mount -t tmpfs -o size=40m none {Path(STAGING).parent}"
    )
    try:
        with pushing(lab3.hosts, tmp_path, 48) as trial:
            ended = trial.finish()
        assert [ended[host.name].state for host in (two, three)] == ["done", "done"]
        assert ended[one.name].state == "failed"
        assert "No space left on device" in ended[one.name].why
        assert "\n" not in ended[one.name].why
        assert left(one) == []
    finally:
        one.sh(f"umount {Path(STAGING).parent}")


@pytest.mark.long
@pytest.mark.parametrize("trial_number", range(5))
def test_a_push_killed_at_any_moment_is_continued_whole(
    lab3: Fleet, tmp_path: Path, trial_number: int
) -> None:
    for host in lab3.hosts:
        host.sh(f"rm -rf {STAGING}")
    for _ in range(4):
        broken = Trial(lab3.hosts, tmp_path, 24, upload_kib=3000, quiet=3)
        time.sleep(secrets.randbelow(8000) / 1000)
        os.kill(broken.swarm._child.pid, signal.SIGKILL)
        broken.finish()
        broken.swarm.close()
    last = Trial(lab3.hosts, tmp_path, 24)
    try:
        last.all_done()
    finally:
        last.swarm.close()
    for host in lab3.hosts:
        assert left(host) == []
