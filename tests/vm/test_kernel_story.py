"""Kernel and driver on a virtual machine: upgraded behind the deploy's back, foretold, healed, and
booted on trial.

Kernels, GRUB, DKMS, apt and reboots are real. The driver is a stand-in (standin.py), since the real
one would take half an hour to build under software emulation; it binds a PCI device that shows the
ids of a GPU. The tests are one story, in order.
"""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
import standin
from fleets import Done, Fleet, Host, Running, fleet, ok, until, words
from kernels import APT, PAST_THE_PIN, TwoKernels, modinfo

pytestmark = pytest.mark.long

MODULE = "nvidia-current-open"
ONLY = ("--only", "driver,kernel")
#: Seconds; under software emulation a shell script that starts a thousand processes takes a minute.
PATIENCE = 900


class Story(TwoKernels):
    """The machine and its two kernels: the one it came with and the one that comes later."""

    def inventory(self, kernel: dict[str, Any], driver: dict[str, Any]) -> Path:
        settings = {"accelerator": "cuda", "kernel": kernel, "driver": driver}
        return self.fleet.inventory(self.folder, settings)

    def run(self, command: str, *options: str) -> Done:
        """A command of fleet's on the machine."""
        return fleet(command, "-i", self.inventory({}, {}), "--json", *options, timeout=PATIENCE)

    def apply(self, *, boot_guard: bool = False, **kernel: Any) -> Done:
        """Apply driver and kernel; `kernel` are settings of that concern."""
        path = self.inventory(kernel, {"boot_guard": boot_guard})
        return fleet("apply", "-i", path, "--json", *ONLY, timeout=PATIENCE)

    def module(self, release: str) -> dict[str, str]:
        return modinfo(self.host, release, MODULE)

    def bound(self) -> bool:
        """Whether the kernel's own word is that the driver has the GPU, and nvidia-smi agrees."""
        seen = self.host.try_("lspci -nnk -d 10de:").stdout
        answers = self.host.try_("nvidia-smi").returncode == 0
        driven = "Kernel driver in use: nvidia" in seen
        assert "[0302]" in seen
        assert answers == driven
        return driven

    def boots_next(self, release: str) -> None:
        """Have GRUB boot this kernel once, as a person does."""
        entries = self.host.sh("sed -n \"s/.*'\\(gnulinux-.*\\)' {.*/\\1/p\" /boot/grub/grub.cfg")
        menu, *rest = [line for line in entries.split() if "simple" not in line]
        (entry,) = [line for line in rest if f"-{release}-advanced-" in line]
        self.host.sh(f"grub-reboot '{menu}>{entry}'")

    def reboot(self) -> None:
        """Reboot from inside and wait for another boot id."""
        before = boot_id(self.host)
        self.host.try_("systemctl reboot")
        self.comes_back(before)

    def comes_back(self, before: str) -> None:
        """Wait for another boot than this one."""
        until(lambda: boot_id(self.host) not in ("", before), "it came back", PATIENCE, every=1)
        self.host.settled()


def boot_id(host: Host) -> str:
    return host.try_("cat /proc/sys/kernel/random/boot_id").stdout.strip()


# What the archive has of a kernel, downloaded with its entries in the package lists, becomes an
# archive of its own beside the stand-in. Under software emulation apt needs 20 s to read the lists
# of all of Debian, at every call. $1 kernel release.
_ARCHIVE = r"""set -e
mkdir /srv/archive && cd /srv/archive
set -- $(apt-get -s --no-install-recommends install "linux-image-$1" "linux-headers-$1" |
  sed -n 's/^Inst \([^ ]*\) .*/\1/p')
apt-get -qq download "$@"
apt-cache show --no-all-versions "$@" | sed 's|^Filename: .*/|Filename: ./|' > Packages
rm /etc/apt/sources.list.d/*
for part in archive standin; do echo "deb [trusted=yes] file:/srv/$part ./"; done \
  > /etc/apt/sources.list
apt-get -qq update
"""


@pytest.fixture(scope="module")
def story(host: Host, machines: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """The machine, whose package sources have a newer kernel of Debian's and the stand-in."""
    folder = tmp_path_factory.mktemp("story")
    repository = standin.repository(folder / "standin")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(repository, "srv/standin")
    (folder / "standin.tar").write_bytes(packed.getvalue())
    send(host, folder / "standin.tar", "tar -C / --no-same-owner -xf -")
    host.sh("apt-get -qq update", PATIENCE)
    old = host.sh("uname -r")
    listed = host.sh("apt-cache pkgnames linux-image-").split()
    kind = old.partition("-")[2].lstrip("0123456789-")  # cloud-amd64
    found = {name.removeprefix("linux-image-") for name in listed if name.endswith(f"-{kind}")}
    others = [name for name in found if re.match(r"\d+\.\d+\.\d+", name) and name != old]
    if not others:
        pytest.skip("the archive has one kernel only: nothing can be upgraded")
    new = max(others, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    host.sh(f"sh -c {shlex.quote(_ARCHIVE)} sh {new}", PATIENCE)
    return Story(machines, old, new, folder)


def send(host: Host, path: Path, command: str) -> None:
    """Run a command on the host with a file as its input."""
    with path.open("rb") as file:
        ssh = host.lab.ssh_command(host.name, command)
        subprocess.run(ssh, stdin=file, check=True, timeout=120)


def test_the_driver_is_built_for_the_real_kernel_and_loaded(story: Story) -> None:
    host = story.host
    assert not story.bound()
    changed = ok(story.apply()).changed(host.name)
    assert set(changed) == {"driver", "kernel"}
    module = story.module(story.old)
    assert module["vermagic"].split()[0] == story.old
    assert module["version"] == standin.VERSION
    assert story.bound()
    assert host.sh("cat /sys/module/nvidia/version") == standin.VERSION
    assert host.sh("systemctl is-active nvidia-persistenced") == "active"
    assert host.sh("cat /var/lib/gpufleet/kernel-pin") == story.old


def test_a_second_apply_changes_nothing(story: Story) -> None:
    assert ok(story.apply()).changed(story.host.name) == {}


def test_a_kernel_that_came_without_headers_is_foretold(story: Story) -> None:
    host = story.host
    # Not by an upgrade: the pin keeps it out. Somebody insists.
    assert host.try_(f"apt-get -s install linux-image-{story.new}").returncode != 0
    host.sh(f"{APT} {PAST_THE_PIN} install linux-image-{story.new}", PATIENCE)
    assert story.module(story.new) == {}  # DKMS found no headers, and said nothing
    assert f"gnulinux-{story.old}-advanced" in host.sh("grep 'set default=' /boot/grub/grub.cfg")
    story.boots_next(story.new)
    forecast = story.run("forecast")
    assert forecast.code == 4
    said = forecast.document["hosts"][0]
    assert said["reboot"]["kernel"] == story.new
    assert {reason["code"] for reason in said["reboot"]["reasons"]} >= {"no-headers", "no-module"}


def test_the_forecast_comes_true_and_apply_heals_the_running_kernel(story: Story) -> None:
    host, before = story.host, story.module(story.old)
    story.reboot()
    assert host.sh("uname -r") == story.new
    assert not story.bound()
    doctor = story.run("doctor")
    assert doctor.code == 1
    causes = [each["cause"] for each in doctor.document["hosts"][0]["findings"]]
    words(" ".join(causes), story.new)

    changed = ok(story.apply()).changed(host.name)
    assert "driver" in changed
    assert story.module(story.new)["vermagic"].split()[0] == story.new
    assert story.module(story.new)["version"] == standin.VERSION
    assert story.bound()
    assert story.module(story.old) == before
    assert host.sh("cat /var/lib/gpufleet/kernel-pin") == story.new


def test_a_trial_boot_falls_back_by_itself_when_the_gpu_does_not_work(story: Story) -> None:
    host = story.host
    # Its module is there and fits, so nothing speaks against a boot; only the boot shows it.
    host.sh(f"echo 'options {MODULE} fails_on={story.old}' > /etc/modprobe.d/standin.conf")
    story.boots_next(story.old)
    first = boot_id(host)
    tried = story.apply(reboot="when-safe", drift="adopt")
    assert tried.code == 1
    complaint = tried.out + tried.err
    words(complaint, f"kernel {story.old} failed its trial boot")
    host.settled()
    assert host.sh("uname -r") == story.new
    assert boot_id(host) != first
    assert story.bound()
    booted = host.sh("journalctl --list-boots --no-pager").splitlines()
    assert len(booted) >= 4  # the first, the broken one, the trial and the way back
    # Not tried again until somebody mends it.
    assert host.sh("cat /var/lib/gpufleet/trial-failed") == story.old


def test_a_trial_that_nobody_confirms_goes_back_by_itself(story: Story) -> None:
    """The laptop is gone as soon as the host reboots."""
    host, first = story.host, boot_id(story.host)
    host.sh("rm /etc/modprobe.d/standin.conf /var/lib/gpufleet/trial-failed")
    story.boots_next(story.old)
    path = story.inventory({"reboot": "when-safe", "reboot_timeout": 90}, {})
    laptop = Running(story.folder, "apply", "-i", path, *ONLY)
    until(lambda: boot_id(host) != first, "the host reboots", PATIENCE, every=0.5)
    laptop.kill()
    story.comes_back(first)
    trial = boot_id(host)
    assert host.sh("uname -r") == story.old
    words(host.sh("systemctl is-active gpufleet-trial"), "active")
    story.comes_back(trial)
    assert host.sh("uname -r") == story.new
    assert host.sh("cat /var/lib/gpufleet/trial-failed") == story.old
    words(host.sh("journalctl -b -1 -u gpufleet-trial -o cat"), "nobody confirmed")
    assert story.bound()
    host.sh("rm /var/lib/gpufleet/trial-failed")
    assert "kernel" not in ok(story.apply()).changed(host.name)


def test_revert_boots_the_pinned_kernel_again(story: Story) -> None:
    host = story.host
    story.boots_next(story.old)
    story.reboot()
    assert host.sh("uname -r; cat /var/lib/gpufleet/kernel-pin").split() == [story.old, story.new]
    ok(story.apply(drift="revert", reboot="when-safe"))
    assert host.sh("uname -r; cat /var/lib/gpufleet/kernel-pin").split() == [story.new] * 2
    assert story.bound()
    assert host.try_("test -e /etc/systemd/system/gpufleet-trial.service").returncode != 0


def test_the_boot_guard_builds_a_module_that_is_missing(story: Story) -> None:
    host = story.host
    ok(story.apply(boot_guard=True))
    host.sh(f"dkms remove -m {MODULE} -v {standin.VERSION} -k {story.new}")
    assert story.module(story.new) == {}
    story.reboot()
    until(
        lambda: host.try_("systemctl is-active gpufleet-boot-guard").stdout.strip() == "active",
        "the guard is done",
        PATIENCE,
        every=1,
    )
    words(
        host.sh("journalctl -b -u gpufleet-boot-guard -o cat"),
        f"building {MODULE} {standin.VERSION} for kernel {story.new}",
        "loaded module",
    )
    assert story.bound()
    ok(story.apply())
    assert host.try_("systemctl is-enabled gpufleet-boot-guard").returncode != 0
