"""The lab's virtual machines: how QEMU is called, and the PCI devices that this project plays."""

from __future__ import annotations

import struct
import sys
import tarfile
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from gpufleet import lab as fleets
from gpufleet.errors import UsageError
from gpufleet.lab import disk, network, pci, qemu, sources, state
from gpufleet.lab.image import Recipe
from gpufleet.lab.machine import run
from gpufleet.lab.state import LabRecord
from gpufleet.lab.vm import VirtualMachine

READ, WRITE, SYNC, RESET = 3, 2, 0, 7


def access(space: bytearray, command: int, at: int, length: int, value: int = 0) -> int:
    said = pci.answer(space, command, struct.pack("<IIi", at, value, length))
    assert said is not None
    kind, size, answer = struct.unpack("<i4xQQ", said)
    assert (kind, size) == (1, 8)
    return int(answer)


@pytest.fixture
def gpu() -> bytearray:
    return pci.Device.parse("10de:20b5:0302").configuration()


def test_a_device_shows_what_it_was_asked_to_be(gpu: bytearray) -> None:
    assert access(gpu, READ, 0x00, 2) == 0x10DE
    assert access(gpu, READ, 0x02, 2) == 0x20B5
    assert access(gpu, READ, 0x00, 4) == 0x20B510DE
    assert access(gpu, READ, 0x0A, 2) == 0x0302
    assert access(gpu, READ, 0x0E, 1) == 0  # an ordinary device of one function


def test_a_device_has_no_memory_for_whoever_probes_its_size(gpu: bytearray) -> None:
    for bar in range(0x10, 0x28, 4):
        access(gpu, WRITE, bar, 4, 0xFFFFFFFF)
        assert access(gpu, READ, bar, 4) == 0


def test_a_driver_can_enable_the_device_but_not_change_what_it_is(gpu: bytearray) -> None:
    access(gpu, WRITE, 0x04, 2, 0x0107)
    assert access(gpu, READ, 0x04, 2) == 0x0107
    access(gpu, WRITE, 0x00, 4, 0)
    assert access(gpu, READ, 0x00, 4) == 0x20B510DE


def test_reads_beyond_the_end_are_zero(gpu: bytearray) -> None:
    assert access(gpu, READ, 0x100, 4) == 0


def test_only_what_waits_is_answered(gpu: bytearray) -> None:
    assert pci.answer(gpu, SYNC, bytes(192)) is None
    assert pci.answer(gpu, RESET, b"") is not None


@pytest.mark.parametrize("text", ["", "10de", "10de:20b5", "10de:20b5:302", "10DE:20B5:0302", "x"])
def test_what_is_no_device_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no VENDOR:DEVICE:CLASS"):
        pci.Device.parse(text)


CPUINFO = "processor\t: 0\nflags\t\t: fpu vme {} hypervisor\n"


@pytest.mark.parametrize(
    ("flag", "device", "accelerator"),
    [
        ("vmx", True, "kvm"),
        ("svm", True, "kvm"),
        ("vmx", False, "tcg,thread=multi,tb-size=256"),
        # A machine in a cloud can have the device and no way to run an ordinary kernel in it.
        ("sse2", True, "tcg,thread=multi,tb-size=256"),
    ],
)
def test_kvm_is_used_where_processor_and_kernel_have_it(
    tmp_path: Path, flag: str, device: bool, accelerator: str
) -> None:
    cpuinfo, kvm = tmp_path / "cpuinfo", tmp_path / "kvm"
    cpuinfo.write_text(CPUINFO.format(flag))
    if device:
        kvm.touch()
    assert qemu.accelerators(kvm, cpuinfo) == ["-accel", accelerator]


def test_a_comma_in_a_path_stays_one_path() -> None:
    assert qemu.disk(Path("/a,b"), "raw")[1].startswith("file=/a,,b,format=raw")


def test_hardware_addresses_are_local_and_follow_from_the_ip() -> None:
    one = network.hardware_address(IPv4Address("10.213.3.11"))
    assert one == "52:54:0a:d5:03:0b"
    assert int(one[:2], 16) & 3 == 2  # locally administered, unicast


def test_a_host_is_given_its_own_files_and_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "name_servers", lambda: ["192.0.2.53"])
    monkeypatch.setattr(network, "link_mtu", lambda link: 1400)
    key = tmp_path / "host_key"
    key.write_text("secret\n")
    key.with_suffix(".pub").write_text("ssh-ed25519 AAAA root@lab-1\n")
    subnet = network.Subnet(IPv4Network("10.213.3.0/24"))
    host = VirtualMachine("lab-1", tmp_path / "lab-1", subnet, 1)
    host.prepare(None, key, "ssh-ed25519 BBBB operator\n", {})
    given = tmp_path / "lab-1" / "host.tar"
    assert given.stat().st_mode & 0o777 == 0o600
    with tarfile.open(given) as tar:
        members = {member.name: member for member in tar}
        found = {
            name: tar.extractfile(member).read().decode()  # type: ignore[union-attr]
            for name, member in members.items()
            if member.isfile()
        }
    assert found["etc/hostname"] == "lab-1\n"
    assert found["etc/ssh/ssh_host_ed25519_key"] == "secret\n"
    assert members["etc/ssh/ssh_host_ed25519_key"].mode == 0o600
    assert members["root/.ssh"].mode == 0o700
    assert {(member.uid, member.gid) for member in members.values()} == {(0, 0)}
    link = found["etc/systemd/network/10-lab.network"]
    assert "Address=10.213.3.11/24\nGateway=10.213.3.1\n" in link
    assert "MTUBytes=1400\n" in link
    assert "etc/machine-id" not in found


def recipe(release: str) -> disk.Recipe:
    root = Recipe(sources.release(release), (), {}, ("systemd",))
    return disk.Recipe(root)


def test_another_recipe_is_another_disk_and_no_container_image() -> None:
    one = recipe("debian:12")
    assert one.directory.name.startswith("vm-debian-12-")
    smaller = disk.Recipe(one.root, size_mib=4096)
    assert len({one.directory, smaller.directory, recipe("debian:13").directory}) == 3


def test_a_lab_remembers_what_its_hosts_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "STATE", tmp_path)
    lab = LabRecord("lab", "debian:12", "/i/disk.img", "10.213.0.0/24", True, ("10de:20b5:0302",))
    lab.directory.mkdir()
    state.save(lab)
    assert state.load("lab") == lab


def test_a_lab_of_an_older_gpufleet_has_containers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "STATE", tmp_path)
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab/lab.json").write_text(
        '{"version": 1, "name": "lab", "image": "debian:12", "image_root": "/i/root",'
        ' "network": "10.213.0.0/24", "hosts": []}'
    )
    lab = state.load("lab")
    assert lab is not None
    assert (lab.vm, lab.pci) == (False, ())


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"pci": ["10de:20b5:0302"]}, "only virtual machines have PCI devices"),
        ({"vm": True, "pci": ["gpu"]}, "'gpu' is no VENDOR:DEVICE:CLASS"),
        ({"vm": True, "disk_mib": 100}, "a virtual machine's disk has 8192 MiB"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], complaint: str
) -> None:
    monkeypatch.setattr(state, "STATE", tmp_path)
    with pytest.raises(UsageError, match=complaint):
        fleets.up("lab", 1, **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("vm", [True, False])
def test_a_lab_does_not_change_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vm: bool
) -> None:
    monkeypatch.setattr(state, "STATE", tmp_path)
    lab = LabRecord("lab", "debian:12", "/i", "10.213.0.0/24", vm)
    lab.directory.mkdir()
    state.save(lab)
    complaint = "has other PCI devices" if vm else "runs containers"
    with pytest.raises(UsageError, match=complaint):
        fleets.up("lab", 1, vm=True, pci=["10de:20b5:0302"])


def test_the_player_of_devices_runs_by_itself(tmp_path: Path) -> None:
    # QEMU's place is taken by a program that asks the device, as QEMU does, who it is.
    asking = (
        "import re, socket, struct, sys\n"
        "fd = int(re.search(r'fd=(\\d+)', sys.argv[-1])[1])\n"
        "s = socket.socket(fileno=fd)\n"
        "s.sendall(struct.pack('<i4xQIIi', 3, 12, 0, 0, 4))\n"
        "print(sys.argv[-2], hex(struct.unpack('<i4xQQ', s.recv(24, socket.MSG_WAITALL))[2]))\n"
    )
    command = [sys.executable, "-I", pci.__file__, "10de:20b5:0302", "--"]
    assert run(*command, sys.executable, "-c", asking) == "-device 0x20b510de\n"
