"""Ubuntu hosts: how its kernels leak past plain holds and not past the pin, and what its older DKMS
hides.

Kernels, headers, NVIDIA's modules and libraries are the archive's own: installed from the release
pocket, so that all later ones are upgrades. Not real are the firmware, an empty package in place of
half a gigabyte; the GPU, which is a double; and on the DKMS host the driver, a module of a few
lines. Nothing is upgraded by the leaks: apt only says what it would do.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fleets
import pytest
from fleets import Done, Fleet, Host, fleet, ok, words

from gpufleet import render

pytestmark = pytest.mark.long

APT = (
    "DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends"
    " -o Dpkg::Options::=--force-unsafe-io"
)


@dataclass(frozen=True)
class Release:
    """A release of Ubuntu: its first kernel, a driver it came with, CUDA that runs on that."""

    image: str
    codename: str
    kernel: str
    branch: str
    cuda: str


JAMMY = Release("ubuntu:22.04", "jammy", "5.15.0-25-generic", "510", "11.6")
NOBLE = Release("ubuntu:24.04", "noble", "6.8.0-31-generic", "535", "12.2")


@dataclass
class Server:
    """A host with a GPU that runs the release's first kernel, and the kernel that is newest."""

    fleet: Fleet
    release: Release
    folder: Path
    settings: dict[str, Any]
    newest: str = ""

    #: Options with which apt knows the packages of the first day only.
    first = "-o Dir::Etc::SourceParts=/dev/null -o Dir::Etc::SourceList=/root/first.list"

    @property
    def host(self) -> Host:
        return self.fleet.hosts[0]

    def run(self, command: str, *options: str) -> Done:
        """A command of fleet's on the host."""
        path = self.fleet.inventory(self.folder, self.settings)
        return fleet(command, "-i", path, "--json", *options)

    def apply(self) -> Done:
        return self.run("apply", "--only", "driver,kernel")

    def upgrade(self) -> tuple[set[str], set[str]]:
        """What dist-upgrade would install, and what it would remove."""
        said = self.host.sh("LC_ALL=C apt-get -s dist-upgrade")
        return tuple(set(re.findall(rf"^{word} (\S+)", said, re.M)) for word in ("Inst", "Remv"))  # type: ignore[return-value]


@contextmanager
def server(release: Release, folder: Path, what: str) -> Iterator[Server]:
    """A fresh host; the test is skipped, with the lab's own reason, where there can be none."""
    fleets.require_image(release.image)
    name = f"t-{os.getpid()}-{release.codename}-{what}"
    try:
        options = ("--image", release.image, "--gpus", "bare", "--kernel", release.kernel)
        made = fleets.boot(name, 1, *options)
        host = made.hosts[0]
        host.sh("apt-get -qq update", 120)
        install(host, package(folder, "linux-firmware", "99999999"))
        # A small initrd: what is in it matters to nobody here.
        host.sh("mkdir -p /etc/initramfs-tools/conf.d")
        host.path("/etc/initramfs-tools/conf.d/small").write_text("MODULES=list\n")
        host.sh(f"{APT} install initramfs-tools zstd", 300)
        table = host.sh("apt-get indextargets --format '$(REPO_URI) $(RELEASE)'").splitlines()
        site = next(line.split()[0] for line in table if line.split()[1] == release.codename)
        source = f"deb {site} {release.codename} main restricted universe multiverse\n"
        host.path("/root/first.list").write_text(source)
        shown = host.sh("apt-cache depends linux-image-generic")
        newest = re.search(r"Depends: linux-image-([0-9]\S+-generic)$", shown, re.M)
        assert newest is not None, shown
        settings = {"accelerator": "cuda", "driver": {"cuda": release.cuda}}
        yield Server(made, release, folder, settings, newest[1])
    finally:
        fleets.take_down(name)


def package(folder: Path, name: str, version: str, *, postinst: str = "", **fields: str) -> Path:
    """A package of this test's own, with what lies in `folder`/`name`, if anything does."""
    control = folder / name / "DEBIAN"
    control.mkdir(parents=True)
    fields = {"Architecture": "all", "Maintainer": "nobody <nobody@example.org>", **fields}
    lines = {"Package": name, "Version": version, **fields, "Description": "stand-in"}
    (control / "control").write_text("".join(f"{key}: {text}\n" for key, text in lines.items()))
    if postinst:
        (control / "postinst").write_text(f"#!/bin/sh\nset -e\n{postinst}")
        (control / "postinst").chmod(0o755)
    archive = folder / f"{name}.deb"
    build = ["dpkg-deb", "--root-owner-group", "-Zgzip", "-b", str(folder / name), str(archive)]
    subprocess.run(build, check=True, capture_output=True)
    return archive


def install(host: Host, archive: Path) -> None:
    host.path(f"/root/{archive.name}").write_bytes(archive.read_bytes())
    host.sh(f"DEBIAN_FRONTEND=noninteractive dpkg -i /root/{archive.name}")


@pytest.fixture(scope="module", params=[JAMMY, NOBLE], ids=lambda release: release.codename)
def pinnable(
    request: pytest.FixtureRequest, can_boot: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server that was installed when its release was new, and never upgraded."""
    release: Release = request.param
    with server(release, tmp_path_factory.mktemp("ubuntu"), "pin") as made:
        driver = (
            f"linux-modules-nvidia-{release.branch}-server-generic"
            f" nvidia-headless-no-dkms-{release.branch}-server nvidia-utils-{release.branch}-server"
        )
        made.host.sh(f"{APT} {made.first} install linux-generic {driver}", 600)
        assert made.host.sh("uname -r; ls /boot/vmlinuz-*").split() == [
            release.kernel,
            f"/boot/vmlinuz-{release.kernel}",
        ]
        yield made


def kernel_packages(names: set[str]) -> set[str]:
    """Those that are a kernel, its headers or modules, or bring one."""
    kinds = "generic|image|headers|modules|objects|signatures"
    return {name for name in names if re.match(rf"linux-({kinds})(-|$)", name)}


def test_plain_holds_leak(pinnable: Server) -> None:
    host, new = pinnable.host, pinnable.newest
    running, branch = pinnable.release.kernel, pinnable.release.branch
    forecast = pinnable.run("forecast")
    assert forecast.code == 4
    assert forecast.document["hosts"][0]["upgrade"]["verdict"] == "unsafe"

    def held(*names: str) -> tuple[set[str], set[str]]:
        host.sh(f"apt-mark hold {' '.join(names)}")
        try:
            return pinnable.upgrade()
        finally:
            host.sh(f"apt-mark unhold {' '.join(names)}")

    comes, _ = held(f"linux-image-{running}", f"linux-headers-{running}")
    assert {f"linux-image-{new}", f"linux-headers-{new}"} <= comes

    comes, goes = held("linux-image-generic")
    assert "linux-generic" in goes
    assert f"linux-headers-{new}" in comes

    metas = ("linux-generic", "linux-image-generic", "linux-headers-generic")
    comes, goes = held(*metas)
    assert f"linux-image-{new}" in comes
    assert f"linux-headers-{new}" not in comes

    comes, goes = held(*metas, f"linux-modules-nvidia-{branch}-server-generic")
    assert kernel_packages(comes | goes) == set()
    if pinnable.release == NOBLE:  # and yet the libraries part from the module that stays
        assert f"libnvidia-compute-{branch}-server" in comes


def test_the_pin_closes_every_leak(pinnable: Server) -> None:
    host, new, running = pinnable.host, pinnable.newest, pinnable.release.kernel
    done = ok(pinnable.apply())
    assert {"driver", "kernel"} == set(done.changed(host.name))
    assert host.sh("cat /var/lib/gpufleet/kernel-pin") == running
    comes, goes = pinnable.upgrade()
    assert kernel_packages(comes | goes) == set()
    assert not [name for name in comes | goes if "nvidia" in name]
    assert ok(pinnable.run("forecast")).document["hosts"][0]["safe"] is True
    # Not by name either; and what a module would be built with can still be had.
    assert host.try_(f"apt-get -s install linux-image-{new}").returncode != 0
    reinstalled = host.sh(f"apt-get -s install --reinstall linux-headers-{running}")
    assert f"Inst linux-headers-{running} " in reinstalled
    assert host.show("ActiveState", "nvidia-persistenced.service") == "active"
    assert ok(pinnable.apply()).changed(host.name) == {}


_MODULE = """\
#include <linux/module.h>
#include <linux/version.h>
static int __init start(void)
{
#if LINUX_VERSION_CODE > KERNEL_VERSION(5, 15, 60)
	return gone_since_then();
#endif
	return 0;
}
static void __exit stop(void) { }
module_init(start);
module_exit(stop);
MODULE_VERSION("470.256.02");
MODULE_LICENSE("NVIDIA");
"""
_MEMORY = """\
#include <linux/module.h>
MODULE_VERSION("470.256.02");
MODULE_LICENSE("NVIDIA");
"""
_DKMS = """\
PACKAGE_NAME="nvidia"
PACKAGE_VERSION="470.256.02"
BUILT_MODULE_NAME[0]="nvidia"
DEST_MODULE_LOCATION[0]="/updates/dkms"
BUILT_MODULE_NAME[1]="nvidia-uvm"
DEST_MODULE_LOCATION[1]="/updates/dkms"
MAKE[0]="make -C /lib/modules/$kernelver/build M=$dkms_tree/$PACKAGE_NAME/$PACKAGE_VERSION/build"
CLEAN="true"
AUTOINSTALL="yes"
"""


@pytest.fixture
def built(can_boot: None, tmp_path: Path) -> Iterator[Server]:
    """Ubuntu 22.04 with a driver that DKMS can build for its first kernel, and not for newer."""
    with server(JAMMY, tmp_path, "dkms") as made:
        made.settings = {
            "accelerator": "cuda",
            "driver": {"cuda": "11.4", "source": "present"},
            "kernel": {"pin": False},
        }
        host, running = made.host, made.release.kernel
        host.sh(
            f"{APT} install dkms && "
            f"{APT} {made.first} install linux-image-{running} linux-headers-{running}",
            300,
        )
        assert host.sh("dpkg-query -W -f '${Version}' dkms").startswith("2.8.7")
        source = tmp_path / "nvidia-dkms-470-server/usr/src/nvidia-470.256.02"
        source.mkdir(parents=True)
        (source / "nvidia.c").write_text(_MODULE)
        (source / "nvidia-uvm.c").write_text(_MEMORY)
        (source / "Kbuild").write_text("obj-m := nvidia.o nvidia-uvm.o\n")
        (source / "dkms.conf").write_text(_DKMS)
        deb = package(
            tmp_path,
            "nvidia-dkms-470-server",
            "470.256.02-1",
            postinst="/usr/lib/dkms/common.postinst nvidia 470.256.02 /usr/share/nvidia '' $2\n",
            Source="nvidia-graphics-drivers-470-server",
            Depends="dkms",
        )
        install(host, deb)
        # A library of the driver's version, and a program: the double answers once they are there.
        library = "/usr/lib/x86_64-linux-gnu/libnvidia-ml.so"
        host.sh(
            f"gcc -shared -nostdlib -x c /dev/null -Wl,-soname,libnvidia-ml.so.1 "
            f"-o {library}.470.256.02 && ldconfig && install -m 755 /dev/null /usr/bin/nvidia-smi"
        )
        host.sh("modprobe nvidia && nvidia-smi")
        yield made


def test_a_failed_build_that_dkms_hides_is_told_and_mended(built: Server) -> None:
    host, old, new = built.host, built.release.kernel, built.newest
    ok(built.apply())
    file = "/lib/modules/{}/updates/dkms/nvidia.ko"
    before = host.sh(f"stat -c %Z {file.format(old)}")

    said = host.sh(f"{APT} install linux-image-{new} linux-headers-{new} 2>&1", 300)
    words(said, "Bad return status for module build")
    assert host.sh("dpkg --audit") == ""  # apt and dpkg call it a success

    doctor = built.run("doctor")
    assert doctor.code == 1
    findings = str(doctor.document["hosts"][0]["findings"])
    words(findings, new, "nvidia.c:6:", "error: implicit declaration", "gone_since_then")
    assert built.run("forecast").code == 4
    failed = built.apply()
    assert failed.code == 1
    words(failed.out, new, "nvidia.c:6:", "error: implicit declaration", "gone_since_then")

    # What a newer point release does.
    host.sh("sed -i 's/gone_since_then()/0/' /usr/src/nvidia-470.256.02/nvidia.c")
    ok(built.apply())
    vermagic = f"modinfo -k {new} -F vermagic nvidia"
    assert host.sh(vermagic).split()[0] == new
    assert ok(built.run("forecast")).document["hosts"][0]["safe"] is True

    # DKMS calls a module that is gone installed, and says so to whoever asks for it again.
    host.sh(f"rm {file.format(new)} && depmod {new}")
    assert f"{new}, x86_64: installed" in host.sh("dkms status")
    ok(built.apply())
    assert host.sh(vermagic).split()[0] == new
    assert host.sh(f"stat -c %Z {file.format(old)}") == before


def test_the_demos_sandbox_hides_no_gpu_from_it(can_boot: None) -> None:
    """Some lines of a unit imply a list of devices, after which all others are refused: with the
    systemd of 22.04, ProtectClock does."""
    lines = render.text("hardening.j2", accelerator="cuda", loopback=True)
    name = f"t-{os.getpid()}-sandbox"
    try:
        host = fleets.boot(name, 1, "--image", JAMMY.image).hosts[0]
        for extra in ("", "ProtectClock=yes\n"):
            unit = f"[Service]\nExecStart=/bin/sleep 60\nUser=nobody\n{lines}\n{extra}"
            host.path("/etc/systemd/system/sandboxed.service").write_text(unit)
            host.sh("systemctl daemon-reload && systemctl restart sandboxed")
            devices = host.sh("systemctl show -p DevicePolicy -p DeviceAllow sandboxed")
            implied = {"DeviceAllow=char-rtc r"} if extra else set()
            assert set(devices.splitlines()) == {"DevicePolicy=auto", *implied}
    finally:
        fleets.take_down(name)
