"""What goes wrong around kernel and driver on a real Debian 12 host: each fault is found and named
in one line with what to do, leaves the running kernel's module alone, and is healed.

Packages, apt, DKMS and kernels are real; the driver is a stand-in of the real one's names, whose
module builds in seconds, and the GPU is a double. The host has two kernels: the one that runs, and
a newer one that boots next.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fleets
import pytest
from fleets import ROOT, Done, Host, Running, fleet, ok, until, words
from kernels import APT, META, TwoKernels, archive

sys.path.insert(0, str(ROOT / "tests" / "vm"))

import standin

pytestmark = pytest.mark.long

SETTINGS: dict[str, Any] = {"accelerator": "cuda", "driver": {"cuda": "12.2"}}

#: Of the branch that Debian 12 has, and newer than what it has.
VERSION, OTHER = "535.999.01", "535.999.02"

FAST = "-o Dpkg::Options::=--force-unsafe-io"
TREE = f"/usr/src/nvidia-current-{VERSION}"
LIBRARY = f"/{standin.LIBRARIES}/libnvidia-ml.so.{VERSION}"

#: Where an apply fails: in the middle, or before any change.
MODULES = "driver: Give the kernels in use their module"
REFUSED = "preflight"


class Gpu(TwoKernels):
    """A host that runs its older kernel and boots the newer one next."""

    def inventory(self, **settings: Any) -> Path:
        return self.fleet.inventory(self.folder, {**SETTINGS, **settings})

    def apply(self, **settings: Any) -> Done:
        """What a person sees of an apply in a pipe."""
        return fleet("apply", "-i", self.inventory(**settings), "--only", "driver,kernel")

    def complaint(self, place: str, *expected: str, **settings: Any) -> str:
        """The one line of an apply that fails at this place; it has these words."""
        done = self.apply(**settings)
        assert done.code == 1, done.out
        line = done.complaint
        assert line.startswith(f"{self.host.name}: {place}: "), line
        words(line, *expected)
        return line

    def finding(self, *expected: str) -> str:
        """The one line of doctor's that has these words."""
        done = fleet("doctor", "-i", self.inventory())
        lines = fleets.lines_about(done.out, self.host)
        found = [line for line in lines if all(word in line for word in expected)]
        assert len(found) == 1, f"{expected} in {len(found)} of:\n{done.out}{done.err}"
        return found[0]

    def module(self, release: str) -> dict[str, tuple[int, int, str]]:
        """The module files of a kernel: inode, time and content of each."""
        folder = self.host.path(f"/lib/modules/{release}/updates/dkms")
        return {
            file.name: (
                file.stat().st_ino,
                file.stat().st_mtime_ns,
                hashlib.sha256(file.read_bytes()).hexdigest(),
            )
            for file in folder.glob("nvidia-current*.ko")
        }

    def well(self) -> None:
        """Apply, and see that nothing is wrong any more."""
        ok(self.apply())
        self.sound()

    def sound(self) -> None:
        """See that both kernels have a module and that doctor finds nothing but the demo, which
        is not there."""
        assert self.module(self.new)
        done = fleet("doctor", "-i", self.inventory())
        told = fleets.lines_about(done.out, self.host)
        wrong = [line for line in told if ": note: " not in line and "the demo is not" not in line]
        assert wrong == []

    def take_module(self, release: str) -> None:
        """Have a kernel without a module, as one that came while DKMS could not build."""
        self.host.sh(
            f"rm -rf /lib/modules/{release}/updates/dkms/nvidia* "
            f"/var/lib/dkms/nvidia-current/*/{release} "
            f"/var/lib/dkms/nvidia-current/kernel-{release}-*; depmod {release}"
        )
        assert not self.module(release)

    def enable(self, folder: str, version: str, origin: str) -> None:
        """Build the stand-in packages of a version, and make them a source of the host's apt."""
        there = standin.repository(self.host.path(folder), version)
        listed = (there / "Packages").read_bytes()
        digest = f"{hashlib.sha256(listed).hexdigest()} {len(listed)} Packages"
        release = f"Origin: {origin}\nLabel: {origin}\nSuite: stable\nSHA256:\n {digest}\n"
        (there / "Release").write_text(release)
        source = f"Types: deb\nURIs: file:{folder}\nSuites: ./\nTrusted: yes\n"
        self.host.path(f"/etc/apt/sources.list.d/{there.name}.sources").write_text(source)
        self.host.sh("apt-get -qq update")


def library() -> bytes:
    """A shared library that ldconfig takes for NVIDIA's management library: nothing but a name."""
    text = b"\0libnvidia-ml.so.1\0".ljust(24, b"\0")
    # Of the dynamic section: STRTAB 5, STRSZ 10, SONAME 14, NULL 0. The header takes 64 bytes and
    # its two segments 56 each.
    table = 64 + 2 * 56
    dynamic = struct.pack("<8q", 5, table, 10, len(text), 14, 1, 0, 0)
    size = table + len(text) + len(dynamic)
    # ET_DYN, EM_X86_64; segments: everything is loaded (1), and the dynamic section (2).
    start = struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 64, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, size, size, 4096)
    at = table + len(text)
    part = struct.pack("<IIQQQQQQ", 2, 4, at, at, at, len(dynamic), len(dynamic), 8)
    return b"\x7fELF\x02\x01\x01" + bytes(9) + start + load + part + text + dynamic


@pytest.fixture(scope="module")
def gpu(can_boot: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gpu]:
    """A host that runs the main suite's kernel, has the security suite's newer one and a driver
    for both, and on which nothing is wrong."""
    name = f"t-{os.getpid()}-faults"
    try:
        # The host that tells which kernels there are; the next one says that it runs one of them.
        asked = fleets.boot(name, 1).hosts[0]
        asked.sh("apt-get -qq update", 300)
        found = archive(asked)
        (_, new), (version, old) = found[0], found[-1]
        if old == new:
            pytest.skip("the archive has one kernel only: none can boot next")
        made = fleets.boot(name, 2, "--gpus", "bare", "--kernel", old)
        del made.hosts[0]
        gpu = Gpu(made, old, new, tmp_path_factory.mktemp("faults"))
        gpu.enable("/srv/standin", VERSION, "Stand-in")
        names = (f"{META}={version}", f"linux-image-{new}", f"linux-headers-{old}")
        chosen = " ".join(("initramfs-tools", "dkms", *names, f"linux-headers-{new}"))
        gpu.host.sh(f"{APT} {FAST} install {chosen}", 600)
        ok(gpu.apply())
        gpu.host.path(LIBRARY).write_bytes(library())
        gpu.host.sh("ldconfig")
        gpu.well()
        yield gpu
    finally:
        fleets.take_down(name)


@pytest.fixture(autouse=True)
def running(gpu: Gpu) -> Iterator[None]:
    """Whatever goes wrong and however it is healed, the running kernel's module stays the same
    file; and each test leaves the host well."""
    before = gpu.module(gpu.old)
    assert before
    yield
    assert gpu.module(gpu.old) == before


def test_a_hold_on_a_package_that_is_not_installed(gpu: Gpu) -> None:
    gpu.host.sh("apt-mark hold linux-image-amd64")
    gpu.finding("warning", "protect nothing", "apt-mark unhold linux-image-amd64")
    ok(gpu.apply())
    gpu.host.sh("apt-mark unhold linux-image-amd64")
    gpu.sound()


def test_the_device_of_unified_memory_that_is_gone(gpu: Gpu) -> None:
    gpu.host.sh("rm /dev/nvidia-uvm")
    gpu.finding("error", "CUDA programs cannot start", "no /dev/nvidia-uvm", "--only driver")
    ok(gpu.apply())
    assert gpu.host.sh("ls /dev/nvidia-uvm") == "/dev/nvidia-uvm"
    gpu.sound()


def test_an_apt_lock_that_another_process_holds(gpu: Gpu) -> None:
    host, seconds = gpu.host, 20
    host.sh(f"{APT} {FAST} --allow-change-held-packages remove nvidia-modprobe")
    hold = (
        "import fcntl, time; f = open('/var/lib/dpkg/lock-frontend', 'w'); "
        f"fcntl.lockf(f, fcntl.LOCK_EX); time.sleep({seconds})"
    )
    started = time.monotonic()
    holder = host.sh(f'setsid python3 -c "{hold}" >/dev/null 2>&1 & echo $!')
    line = gpu.finding("note", "apt or dpkg runs", "python3 (pid ")
    words(line, f"(pid {holder})", "apply waits up to ten minutes")
    done = ok(gpu.apply())
    assert time.monotonic() - started > seconds
    assert host.sh("dpkg-query -W -f '${db:Status-Status}' nvidia-modprobe") == "installed"
    log = re.search(r"log: (\S+)", done.out)
    assert log is not None
    words((ROOT / log[1]).read_text(), f"apt is in use by python3 (pid {holder}): waiting up to")
    gpu.well()


def test_a_dkms_build_that_fails(gpu: Gpu) -> None:
    gpu.host.sh(f"sed -i '1i #error it does not build' {TREE}/nvidia.c")
    gpu.take_module(gpu.new)
    gpu.complaint(
        MODULES,
        f"unsafe to reboot into kernel {gpu.new}",
        "the DKMS build failed",
        "#error it does not build",
        "do not reboot this host",
        "set driver.branch to a branch that builds for it, or boot another kernel",
    )
    gpu.finding("error", f"the DKMS build for kernel {gpu.new} failed", "driver.branch")
    assert fleet("forecast", "-i", gpu.inventory()).code == 4
    gpu.host.sh(f"sed -i 1d {TREE}/nvidia.c")
    gpu.well()


@contextmanager
def small_boot(host: Host, mib: int) -> Iterator[None]:
    """/boot on a filesystem of its own with hardly any room."""
    host.sh(f"cp -a /boot /root/boot; mount -t tmpfs -o size={mib}m tmpfs /boot")
    try:
        host.sh("cp -a /root/boot/. /boot/")
        yield
    finally:
        host.sh("umount /boot; rm -r /root/boot")


def test_a_full_boot(gpu: Gpu) -> None:
    gpu.take_module(gpu.new)
    with small_boot(gpu.host, 100):
        expected = ("/boot has ", " MiB free", gpu.new, "apt-get purge linux-image-RELEASE")
        gpu.complaint(REFUSED, *expected)
        gpu.finding("warning", "/boot is nearly full", "MiB free, 2 kernels", "apt-get purge")
    gpu.well()


def test_headers_that_the_archive_does_not_have_any_more(gpu: Gpu) -> None:
    host = gpu.host
    host.sh(f"{APT} {FAST} remove linux-headers-{gpu.new}")
    gpu.take_module(gpu.new)
    sources = "/etc/apt/sources.list.d"
    host.sh(f"mkdir /root/sources; cd {sources}; mv $(ls | grep -v standin) /root/sources")
    gpu.complaint(
        MODULES,
        f"unsafe to reboot into kernel {gpu.new}: no headers for kernel {gpu.new}",
        "do not reboot this host",
        "the package sources have no headers for it: install a kernel that they have headers for",
    )
    gpu.finding("error", "the next kernel", f"no headers for kernel {gpu.new}", "--only driver")
    host.sh(f"mv /root/sources/* {sources}/; rmdir /root/sources")
    gpu.well()


def test_a_driver_of_mixed_origins(gpu: Gpu) -> None:
    host = gpu.host
    gpu.enable("/srv/other", OTHER, "Elsewhere")
    held = "--allow-change-held-packages"
    host.sh(f"{APT} {FAST} {held} install libcuda1={OTHER}-1")
    gpu.complaint(
        REFUSED,
        "several versions or origins",
        f"{OTHER}-1",
        f"{VERSION}-1",
        "leave one source enabled, install them all in one version, then apply",
    )
    words(gpu.finding("warning", "come from several places"), "Elsewhere: libcuda1", "Stand-in: ")
    host.sh("rm -r /srv/other /etc/apt/sources.list.d/other.sources; apt-get -qq update")
    host.sh(f"{APT} {FAST} {held} --allow-downgrades install libcuda1={VERSION}-1")
    gpu.well()


def test_a_driver_that_a_run_file_installed(gpu: Gpu) -> None:
    gpu.host.sh("install -m 755 /bin/true /usr/bin/nvidia-uninstall")
    gpu.complaint(
        REFUSED,
        "a .run file installed the driver here and driver.source is distribution",
        "run nvidia-uninstall on the host, or set driver.source to runfile or present",
    )
    gpu.finding("error", "a .run file installed a driver over the packages'", "--silent")
    gpu.host.sh("rm /usr/bin/nvidia-uninstall")
    gpu.well()


def test_a_connection_that_is_lost_in_the_middle_of_a_build(gpu: Gpu, tmp_path: Path) -> None:
    host, conf = gpu.host, f"{TREE}/dkms.conf"
    gpu.take_module(gpu.new)
    slow = "touch /root/builds; sleep 15; "
    host.sh(f"cp {conf} {conf}.was; sed -i 's|^MAKE\\[0\\]=\"|&{slow}|' {conf}")
    apply = Running(tmp_path, "apply", "-i", gpu.inventory(), "--only", "driver,kernel")
    until(lambda: host.path("/root/builds").exists() or apply.ended, "a build")
    host.sh(f"mv {conf}.was {conf}; rm /root/builds")
    # The process of sshd that serves the session in which dkms runs.
    host.sh(
        "p=$(pgrep -xo dkms); until [ $(cat /proc/$p/comm) = sshd ]; do "
        "p=$(awk '/^PPid:/ {print $2}' /proc/$p/status); done; kill -9 $p"
    )
    # What it started goes on by itself; another build waits for its end.
    assert host.try_("flock -n /run/gpufleet-dkms.lock true").returncode == 1
    done = apply.wait()
    assert done.code == 1
    words(done.complaint, f"{host.name}: {MODULES}: ", "apply again when the host answers")
    assert not gpu.module(gpu.new)
    gpu.well()


def test_a_host_that_does_not_come_back_from_a_reboot(gpu: Gpu) -> None:
    host = gpu.host
    # It boots, and sshd waits for somebody at the console.
    drop_in = host.path("/etc/systemd/system/ssh.service.d/wait.conf")
    drop_in.parent.mkdir()
    wait = "until [ -e /root/console ]; do sleep 0.5; done"
    drop_in.write_text(f'[Service]\nTimeoutStartSec=600\nExecStartPre=/bin/sh -c "{wait}"\n')
    before = host.sh("cat /proc/sys/kernel/random/boot_id")
    gpu.complaint(
        "driver: Boot the kernel that shall run",
        "it did not come back from its reboot in 10 s",
        "look at its console",
        kernel={"reboot": "when-safe", "reboot_timeout": 10},
    )
    drop_in.unlink()
    drop_in.parent.rmdir()
    host.path("/root/console").touch()
    until(lambda: fleets.listens(22, host.address), "sshd")
    assert host.settled().sh("cat /proc/sys/kernel/random/boot_id; rm /root/console") != before
    gpu.well()
