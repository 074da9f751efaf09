"""Virtual machines of the lab: what they are, and that nothing of them stays behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fleets
import pytest
from fleets import Fleet, Host, Running, ok, until

from gpufleet.lab import machine, state


def traces(name: str) -> list[str]:
    """All on this machine that belongs to the lab called `name`."""
    found = [str(path) for path in (state.STATE / name,) if path.exists()]
    found += [str(path) for path in machine.cgroup_root().glob(f"gpufleet-{name}-*")]
    found += [line for line in machine.run("nft", "list", "tables").splitlines() if name in line]
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = process.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        found += [word for word in words if word.startswith(f"gpufleet-{name}-")]
    return found


def links(subnet: str) -> list[str]:
    bridge = state.LabRecord("", "", "", subnet).subnet.bridge
    return [path.name for path in Path("/sys/class/net").iterdir() if path.name.startswith(bridge)]


def test_a_virtual_machine_is_a_server_with_a_kernel_of_its_own(
    machines: Fleet, host: Host
) -> None:
    assert host.sh("systemctl is-system-running --wait") == "running"
    assert host.sh("hostname") == host.name
    assert host.sh("systemd-detect-virt --container || true") == "none"
    release = host.sh("uname -r")
    assert host.sh("cat /proc/cmdline").startswith(f"BOOT_IMAGE=/boot/vmlinuz-{release} ")
    assert host.sh("grub-probe --target=device /") == "/dev/vda1"
    assert "[10de:20b5]" in host.sh("lspci -nn")
    # The way out, with apt's own methods and proxies.
    address = host.sh(
        "sed -n 's/^URIs: *\\([^ ]*\\).*/\\1/p' /etc/apt/sources.list.d/*.sources | head -1"
    )
    suite = host.sh(". /etc/os-release; echo $VERSION_CODENAME")
    fetch = (
        f"/usr/lib/apt/apt-helper download-file {address}/dists/{suite}/InRelease /tmp/InRelease"
    )
    assert host.sh(f"{fetch} >/dev/null && head -n 1 /tmp/InRelease").startswith("-----BEGIN PGP")


def test_it_is_listed_and_entered_like_a_container(machines: Fleet, host: Host) -> None:
    (listed,) = [
        one
        for one in ok(fleets.fleet("lab", "list", "--json")).document["labs"]
        if one["name"] == machines.name
    ]
    assert listed["vm"] is True
    assert listed["hosts"] == [{"name": host.name, "address": host.address, "running": True}]
    entered = fleets.fleet("lab", "ssh", host.name, "cat", "/etc/hostname", ";", "exit", "7")
    assert (entered.code, entered.out) == (7, f"{host.name}\n")
    again = ok(fleets.fleet("lab", "up", "--name", machines.name, "--hosts", "1", "--json"))
    assert again.document["labs"] == [listed]


@pytest.fixture
def side(can_emulate: None, machines: Fleet) -> Iterator[str]:
    """The name of a lab that is taken down after the test, and leaves nothing."""
    name = f"{machines.name}0"
    try:
        yield name
    finally:
        record = state.load(name)
        fleets.take_down(name)
        assert traces(name) == []
        assert record is None or links(record.network) == []


def starts(name: str) -> dict[str, Callable[[], bool]]:
    host = state.STATE / name / "hosts" / f"{name}-1"
    return {
        "the files": (host / "host.tar").exists,
        "the disk": (host / "disk.qcow2").exists,
        "the machine": lambda: bool(list(machine.cgroup_root().glob(f"gpufleet-{name}-1"))),
        "the boot": lambda: "Linux version" in text(host / "console.log"),
    }


def text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


@pytest.mark.parametrize("point", ["the files", "the disk", "the machine", "the boot"])
def test_up_killed_at_any_point_leaves_nothing_after_down(
    side: str, tmp_path: Path, point: str
) -> None:
    up = Running(tmp_path, "lab", "up", "--vm", "--name", side, "--hosts", "1")
    until(starts(side)[point], point, 120, every=0.001)
    up.kill()
    assert traces(side) != []
    # The fixture takes it down and looks for what stays.


def test_ctrl_c_ends_up_at_once_in_one_line(side: str, tmp_path: Path) -> None:
    up = Running(tmp_path, "lab", "up", "--vm", "--name", side, "--hosts", "1")
    until(starts(side)["the boot"], "the boot", 120)
    started = time.monotonic()
    up.interrupt()
    done = up.wait(30)
    assert done.code == 130
    assert "Traceback" not in done.err
    assert time.monotonic() - started < 5


def test_what_a_virtual_machine_cannot_have_is_refused(tmp_path: Path) -> None:
    refused = fleets.fleet("lab", "up", "--vm", "--name", "no-such-lab", "--disk-mib", "100")
    assert refused.code == 2
    assert refused.complaint.startswith("fleet: a virtual machine's disk has 8192 MiB")
    assert traces("no-such-lab") == []
