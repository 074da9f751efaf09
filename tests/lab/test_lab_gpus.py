"""Hosts with the GPU double and a kernel of their word: the facts read what was recorded."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator

import pytest

from gpufleet import catalog, lab
from gpufleet.driver.facts import GpuFacts
from gpufleet.driver.picture import Gpu, GpuPicture
from gpufleet.driver.plan import allowed
from gpufleet.errors import FleetError
from gpufleet.lab import Lab
from gpufleet.lab.gpu_double import recording

NAME = f"t{os.getpid()}-gpus"
KERNEL = "6.1.0-50-amd64"

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def fleet() -> Iterator[Lab]:
    """One host a recording; skips, with the lab's own reason, where there can be none."""
    names = recording.names()
    try:
        yield lab.up(NAME, len(names), gpus=names, kernel=KERNEL)
    except FleetError as error:
        pytest.skip(str(error))
    finally:
        lab.down(NAME)


def host_of(name: str) -> str:
    return f"{NAME}-{recording.names().index(name) + 1}"


def said(fleet: Lab, name: str, command: str) -> str:
    done = fleet.run(host_of(name), command, timeout=60)
    return done.stdout + done.stderr


def picture(fleet: Lab, name: str) -> GpuPicture:
    """What the fact makes of the host."""
    done = fleet.run(host_of(name), str(GpuFacts().command()), timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return GpuFacts().process(done.stdout.splitlines())


@pytest.mark.parametrize("name", recording.names())
def test_a_host_with_the_double_is_whole_and_read_as_recorded(fleet: Lab, name: str):
    assert said(fleet, name, "systemctl is-system-running --wait") == "running\n"
    seen, made = picture(fleet, name), recording.load(name)
    cards = [device for device in made.pci if device.kind.startswith("03")]
    assert seen.gpus == tuple(Gpu(card.address, card.device, card.driver) for card in cards)
    module = made.modules.get("nvidia")
    assert seen.loaded == (module.version if module else "")
    assert seen.userland == (made.userland or "")
    assert set(seen.devices) == set(made.devices)
    states = {"nvidia-persistenced": seen.persistenced, "nvidia-fabricmanager": seen.fabricmanager}
    for service, state in states.items():
        assert state == ("active" if made.services.get(service) else "absent")  # type: ignore[call-overload]


def test_eight_gpus_with_switches_are_seen_at_work(fleet: Lab):
    seen = picture(fleet, "h100x8")
    assert len(seen.smi.gpus) == len(seen.gpus) == 8
    assert (seen.smi.driver, seen.smi.error) == (seen.loaded, "")
    assert seen.nvswitch
    assert seen.fabricmanager_version == seen.loaded
    assert seen.refcount > 0
    assert [holder.split(" ")[0] for holder in seen.holders] == ["nvidia-persiste"]
    listed = said(fleet, "h100x8", "nvidia-smi -L").splitlines()
    assert len(listed) == 8
    assert said(fleet, "h100x8", "nvidia-smi --query-gpu=nmae --format=csv").startswith('Field "nm')


def test_no_gpu_is_no_gpu(fleet: Lab):
    seen = picture(fleet, "none")
    assert (seen.gpus, seen.smi.installed, seen.lost, seen.offers) == ((), False, (), ())


def test_a_gpu_off_the_bus_is_named_by_bus_and_by_nvidia_smi(fleet: Lab):
    seen = picture(fleet, "lost")
    assert seen.lost == ("0000:4b:00.0",)
    assert len(seen.gpus) == 2
    assert "GPU is lost" in seen.smi.error


def test_a_mismatch_shows_in_versions_and_in_what_nvidia_smi_says(fleet: Lab):
    seen = picture(fleet, "mismatch")
    assert seen.loaded != seen.userland
    assert "Driver/library version mismatch" in seen.smi.error
    assert seen.holders


def test_nouveau_is_seen_at_the_gpu(fleet: Lab):
    seen = picture(fleet, "nouveau")
    assert seen.nouveau_loaded
    assert [gpu.driver for gpu in seen.gpus] == ["nouveau"]
    assert not seen.smi.installed


def test_generations_of_one_host_leave_one_flavour(fleet: Lab):
    assert allowed(picture(fleet, "mixed"), catalog.drivers()) == {"proprietary"}


def test_a_host_without_a_driver_has_one_once_a_module_is_there(fleet: Lab):
    """The module is an object file with the words that modinfo reads; a package's would do."""
    assert not picture(fleet, "bare").smi.installed
    assert "Module nvidia not found" in said(fleet, "bare", "modprobe nvidia")
    words = {"version": "535.261.03", "license": "NVIDIA", "vermagic": f"{KERNEL} SMP "}
    text = "".join(f"{key}={value}\\0" for key, value in words.items())
    script = f"""
import struct, sys
text = b"{text}"
names = b"\\0.modinfo\\0.shstrtab\\0"
at = 64 + len(text)
body = text + names
table = bytes(64)
def section(name, kind, offset, size):
    return struct.pack("<IIQQQQIIQQ", name, kind, 0, 0, offset, size, 0, 0, 1, 0)
table += section(1, 1, 64, len(text)) + section(10, 3, at, len(names))
head = b"\\x7fELF\\2\\1\\1" + bytes(9) + struct.pack(
    "<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, 64 + len(body), 0, 64, 0, 0, 64, 3, 2)
open("nvidia-current.ko", "wb").write(head + body + table)
"""
    folder = f"/lib/modules/{KERNEL}/updates/dkms"
    make = f"mkdir -p {folder} && cd {folder} && python3 -c {shlex.quote(script)}"
    assert said(fleet, "bare", f"{make} && depmod {KERNEL} 2>/dev/null") == ""
    assert said(fleet, "bare", "modprobe nvidia") == ""
    seen = picture(fleet, "bare")
    assert seen.loaded == "535.261.03"
    assert {gpu.driver for gpu in seen.gpus} == {"nvidia"}
    assert "nvidiactl" in seen.devices
    assert seen.refcount == 0
    assert said(fleet, "bare", "rmmod nvidia") == ""
    assert picture(fleet, "bare").loaded == ""


def test_uname_says_the_kernel_that_was_asked_for_and_its_package_may_be_upgraded(fleet: Lab):
    assert said(fleet, "none", "uname -r") == f"{KERNEL}\n"
    assert said(fleet, "none", "uname -sr") == f"Linux {KERNEL}\n"
    assert said(fleet, "none", "uname -n") == f"{host_of('none')}\n"
    assert f" {KERNEL} " in said(fleet, "none", "uname -a")
    assert fleet.run(host_of("none"), "uname --none").returncode == 1
    done = fleet.run(host_of("none"), "apt-get -q install --reinstall -y coreutils", timeout=60)
    assert done.returncode == 0, done.stderr
    assert said(fleet, "none", "uname -r") == f"{KERNEL}\n"


def test_the_double_and_the_kernel_are_there_after_a_reboot(fleet: Lab):
    host = host_of("mismatch")
    boot = fleet.run(host, "cat /proc/sys/kernel/random/boot_id").stdout
    fleet.run(host, "systemctl reboot")
    after = lab.up(NAME, len(recording.names()))
    deadline = time.monotonic() + 30
    while after.run(host, "cat /proc/sys/kernel/random/boot_id").stdout in ("", boot):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert said(after, "mismatch", "systemctl is-system-running --wait; uname -r") == (
        f"running\n{KERNEL}\n"
    )
    assert picture(after, "mismatch").loaded == "535.247.01"
