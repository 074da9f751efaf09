"""Bad input and bad hosts: one line that says what, where and what to do, and nothing changes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fleets
import pytest
from fleets import ROOT, UNIT, Fleet, Host, fleet, inventory, ok, run, words

SETTINGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an unknown setting": (
        {"modle": "pico"},
        ["unknown setting modle", "did you mean model?", "inventory/group_data/all.py"],
    ),
    "an unknown nested setting": (
        {"demo": {"prot": 7860}},
        ["unknown setting demo.prot", "did you mean demo.port?"],
    ),
    "a wrong type": (
        {"demo": {"port": "web"}},
        ["setting demo.port", "valid integer", '"web"', "inventory/group_data/all.py"],
    ),
    "a value out of range": (
        {"demo": {"port": 80}},
        ["setting demo.port", "greater than or equal to 1024", "80"],
    ),
    "an unknown model": ({"model": "gpt-5"}, ["no model 'gpt-5'", "choose one of", "pico"]),
    "a key file that is not there": ({"ssh_key": "/nowhere/key"}, ["ssh_key", "/nowhere/key"]),
}


@pytest.mark.parametrize(("settings", "expected"), SETTINGS.values(), ids=SETTINGS)
def test_a_bad_setting_is_named_with_its_host(
    deployed: Fleet, tmp_path: Path, settings: dict[str, Any], expected: list[str]
) -> None:
    done = fleet("apply", "-i", deployed.inventory(tmp_path, h2=settings))
    assert done.code == 2
    words(done.complaint, deployed.hosts[1].name, *expected)
    assert "nothing was changed" in done.out


def test_an_unknown_mirror_site_is_named_with_the_known_ones(
    deployed: Fleet, tmp_path: Path
) -> None:
    with _nothing_changes(deployed):
        done = fleet("apply", "-i", deployed.inventory(tmp_path, h1={"mirrors": {"site": "mars"}}))
    assert done.code in (1, 2)
    words(done.complaint, deployed.hosts[0].name, "no site 'mars'", "official", "nju", "tuna")


COMMAND_LINES: dict[str, tuple[list[str], list[str]]] = {
    "an inventory that is not there": (
        ["apply", "-i", "inventory/nowhere.py"],
        ["inventory/nowhere.py", "no such inventory file", "inventory/example.py"],
    ),
    "an inventory that is no Python file": (
        ["status", "-i", "README.md"],
        ["README.md", "an inventory is a Python file"],
    ),
    "a host that the inventory does not have": (
        ["apply", "-i", "inventory/lab.py", "--limit", "db-1"],
        ["--limit db-1", "no such host"],
    ),
    "a concern that there is not": (
        ["apply", "-i", "inventory/lab.py", "--only", "drivers"],
        ["--only drivers", "no such concern", "driver"],
    ),
}


@pytest.mark.parametrize(("arguments", "expected"), COMMAND_LINES.values(), ids=COMMAND_LINES)
def test_a_bad_command_line_is_explained(
    deployed: Fleet, arguments: list[str], expected: list[str]
) -> None:
    done = fleet(*arguments, GPUFLEET_LAB=deployed.name)
    assert done.code == 2
    words(done.complaint, *expected)


BROKEN = {
    "a syntax error": ("hosts = ['a',\n", ["line 1", "was never closed"]),
    "an exception": ("import os\nhosts = os.nothing\n", ["AttributeError", "nothing"]),
    "no hosts": ("hosts = []\n", ["no hosts", "hosts ="]),
}


@pytest.mark.parametrize(("text", "expected"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("command", ["apply", "status"])
def test_a_broken_inventory_is_named_with_its_fault(
    tmp_path: Path, can_boot: None, text: str, expected: list[str], command: str
) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text(text)
    done = fleet(command, "-i", broken)
    assert done.code == 2, done.err
    words(done.complaint, *expected)
    if "no hosts" not in expected:
        assert "broken.py" in done.complaint


def test_an_unreachable_host_is_named_and_the_others_go_on(
    deployed: Fleet, one: Host, tmp_path: Path
) -> None:
    nobody = deployed.gateway.rpartition(".")[0] + ".250"
    hosts = {one.name: one.data(), "gone": {**one.data(), "ssh_hostname": nobody}}
    one.sh(f"systemctl stop {UNIT}")
    done = fleet("apply", "-i", inventory(tmp_path, hosts))
    assert done.code == 1
    words(done.complaint, "gone: cannot connect as", nobody, "check the address")
    assert "failed: gone" in done.out
    assert one.show("ActiveState") == "active"
    assert one.healthy()


def test_a_wrong_key_is_named_and_the_others_go_on(
    deployed: Fleet, one: Host, two: Host, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    ok(run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key))
    before = two.snapshot()
    one.sh(f"systemctl stop {UNIT}")
    done = fleet("apply", "-i", deployed.inventory(tmp_path, h2={"ssh_key": str(key)}))
    assert done.code == 1
    words(done.complaint, f"{two.name}: cannot connect as root@{two.address}")
    words(done.complaint, "refused the key or user", "ssh_user", "ssh_key", "authorized_keys")
    assert one.healthy()
    assert fleets.touched(before, two.snapshot()) == []


def test_a_changed_host_key_is_never_accepted(deployed: Fleet, two: Host, tmp_path: Path) -> None:
    ok(run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other"))
    kind, key, _ = (tmp_path / "other.pub").read_text().split(" ", 2)
    known = tmp_path / "known_hosts"
    known.write_text(f"{two.address} {kind} {key}\n")
    before = two.snapshot()
    changed = deployed.inventory(tmp_path, h2={"ssh_known_hosts_file": str(known)})
    done = fleet("apply", "-i", changed, "--limit", two.name)
    assert done.code == 1
    words(done.complaint, two.name, "host key is not the one in known_hosts", "reinstalled")
    # The line to forget the old key is one that a shell takes.
    forget = done.complaint.split("reinstalled: ")[1].split(";")[0]
    assert subprocess.run(["sh", "-c", forget], capture_output=True, check=False).returncode == 0
    assert two.address not in known.read_text()
    assert fleets.touched(before, two.snapshot()) == []


@contextmanager
def _nothing_changes(deployed: Fleet) -> Iterator[None]:
    """No file of any host is touched and every service goes on."""
    before = [(host.snapshot(), host.pid) for host in deployed.hosts]
    yield
    for host, (snapshot, pid) in zip(deployed.hosts, before, strict=True):
        assert fleets.touched(snapshot, host.snapshot()) == []
        assert host.pid == pid != 0


@contextmanager
def _another_system(host: Host) -> Iterator[None]:
    """The host says that it is Fedora."""
    release = host.path("/usr/lib/os-release")
    own = release.read_text()
    release.write_text('ID=fedora\nVERSION_ID=41\nPRETTY_NAME="Fedora Linux 41"\n')
    try:
        yield
    finally:
        release.write_text(own)


@contextmanager
def _squatter(host: Host, port: int) -> Iterator[int]:
    """A program that has nothing to do with gpufleet listens on the port."""
    unit = "squatter"
    host.sh(f"systemd-run -q --unit {unit} python3 -m http.server --bind 127.0.0.1 {port}")
    fleets.until(lambda: host.sh(f"ss -Hltn 'sport = :{port}'"), "the squatter listens", 30)
    try:
        yield int(host.show("MainPID", unit))
    finally:
        host.sh(f"systemctl stop {unit}")


def test_a_host_that_is_not_debian_is_refused(deployed: Fleet, one: Host) -> None:
    with _another_system(one), _nothing_changes(deployed):
        done = fleet("apply", "-i", "inventory/lab.py", GPUFLEET_LAB=deployed.name)
    assert done.code == 1
    words(done.complaint, f"{one.name}: preflight", "fedora 41 is not supported", "debian 12")


def test_a_port_in_use_is_named_with_the_process_that_has_it(
    deployed: Fleet, two: Host, tmp_path: Path
) -> None:
    moved = deployed.inventory(tmp_path, {"demo": {"port": 7999}})
    with _squatter(two, 7999) as pid, _nothing_changes(deployed):
        done = fleet("apply", "-i", moved)
    assert done.code == 1
    words(done.complaint, two.name, f"port 7999 is in use by python3 (pid {pid})", "demo.port")


def test_a_port_taken_after_preflight_is_named_by_the_service(
    deployed: Fleet, two: Host, tmp_path: Path
) -> None:
    """The demo itself says so where preflight could not know."""
    taken = "ExecStartPre=+/bin/sh -c 'python3 -m http.server --bind 127.0.0.1 7860 & sleep 1'\n"
    drop_in = two.path(f"/etc/systemd/system/{UNIT}.d/late.conf")
    drop_in.parent.mkdir()
    drop_in.write_text(f"[Service]\nRestart=no\n{taken}")
    two.sh(f"systemctl stop {UNIT}")
    try:
        done = fleet(
            "apply", "-i", "inventory/lab.py", "--limit", two.name, GPUFLEET_LAB=deployed.name
        )
        assert done.code == 1
        words(done.complaint, f"{two.name}: demo: Run the service", "7860", "listens there already")
    finally:
        drop_in.unlink()
        drop_in.parent.rmdir()
    ok(deployed.apply("--limit", two.name))
    assert two.healthy()


def test_an_account_that_is_not_root_is_refused(
    deployed: Fleet, one: Host, ordinary: str, tmp_path: Path
) -> None:
    with _nothing_changes(deployed):
        done = fleet("apply", "-i", deployed.inventory(tmp_path, h1={"ssh_user": ordinary}))
    assert done.code == 1
    words(done.complaint, f"{one.name}: preflight: not root", "connect as root", "_sudo = True")


def test_an_account_that_may_not_sudo_is_refused(
    deployed: Fleet, one: Host, ordinary: str, tmp_path: Path
) -> None:
    account = {"ssh_user": ordinary, "_sudo": True}
    with _nothing_changes(deployed):
        done = fleet("apply", "-i", deployed.inventory(tmp_path, h1=account), "--limit", one.name)
    assert done.code == 1
    words(done.complaint, one.name, "sudo", "connect as root or allow sudo without a password")


def test_an_account_that_may_sudo_finds_nothing_to_change(
    deployed: Fleet, one: Host, ordinary: str, tmp_path: Path
) -> None:
    rule = one.path("/etc/sudoers.d/ordinary")
    rule.write_text(f"{ordinary} ALL=(ALL) NOPASSWD: ALL\n")
    rule.chmod(0o440)
    account = {"ssh_user": ordinary, "_sudo": True}
    try:
        own = deployed.inventory(tmp_path, h1=account)
        done = ok(fleet("apply", "-i", own, "--limit", one.name, "--json"))
        assert done.changed(one.name) == {}
    finally:
        rule.unlink()


@pytest.fixture
def ordinary(one: Host) -> Iterator[str]:
    """An account of the host that is nobody's and may nothing."""
    name = "ordinary"
    one.sh(
        f"useradd -m -s /bin/sh {name} && install -d -m 700 -o {name} ~{name}/.ssh && "
        f"install -m 600 -o {name} ~root/.ssh/authorized_keys ~{name}/.ssh/authorized_keys"
    )
    yield name
    one.sh(f"loginctl terminate-user {name}; userdel -rf {name} 2>/dev/null")


def test_all_findings_of_all_hosts_come_in_one_run(
    deployed: Fleet, one: Host, two: Host, tmp_path: Path
) -> None:
    faults = {"demo": {"port": 7999}, "mirrors": {"site": "mars"}}
    with _another_system(one), _squatter(two, 7999), _nothing_changes(deployed):
        done = fleet("apply", "-i", deployed.inventory(tmp_path, h2=faults))
    assert done.code == 1
    assert "Traceback" not in done.out + done.err
    (first,) = fleets.lines_about(done.err, one)
    words(first, "fedora 41 is not supported")
    second = fleets.lines_about(done.err, two)
    words("\n".join(second), "no site 'mars'", "port 7999 is in use by python3")
    assert len(done.err.splitlines()) == 1 + len(second) == 3


def _without_root(*arguments: str) -> fleets.Done:
    """Run ./fleet as an account that is not root; it may read what root may."""
    return run("unshare", "--map-user=65534", "--map-group=65534", ROOT / "fleet", *arguments)


@pytest.mark.parametrize("command", [["lab", "up"], ["lab", "down"], ["demo"]], ids=" ".join)
def test_a_lab_without_root_says_that_it_needs_root(can_boot: None, command: list[str]) -> None:
    done = _without_root(*command)
    assert done.code == 1
    words(done.complaint, "fleet: ", "needs root", "sudo")


def test_what_needs_no_lab_works_without_root(deployed: Fleet, tmp_path: Path) -> None:
    assert ok(_without_root("--help")).err == ""
    missing = _without_root("apply", "-i", str(tmp_path / "nowhere.py"))
    assert missing.code == 2
    words(missing.complaint, "no such inventory file")
