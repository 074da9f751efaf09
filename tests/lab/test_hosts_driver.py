"""The distribution's own driver and two of its kernels on a Debian 12 host: built, foretold, healed
and pinned.

Packages, DKMS builds and kernels are real; the GPU is a double, which shows a module as loaded once
modprobe was asked for it. A build takes about four minutes on two cores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import fleets
import pytest
from fleets import Done, Fleet, fleet, ok, words
from kernels import APT, META, PAST_THE_PIN, TwoKernels, archive, modinfo

pytestmark = pytest.mark.long

#: Debian 12 has the 535 driver, which runs CUDA up to 12.2 and not what the demo is locked to.
SETTINGS = {"accelerator": "cuda", "driver": {"cuda": "12.2"}}
UNPINNED = {**SETTINGS, "kernel": {"pin": False}}


class Gpu(TwoKernels):
    """A host of the lab, and how commands go over it."""

    def run(self, command: str, *options: str, pin: bool = True) -> Done:
        """A command of fleet's on the host, with or without a pin in its settings."""
        settings = SETTINGS if pin else UNPINNED
        path = self.fleet.inventory(self.folder, settings)
        return fleet(command, "-i", path, "--json", *options)

    def apply(self, *, pin: bool = True) -> Done:
        return self.run("apply", "--only", "driver,kernel", pin=pin)

    def forecast(self, *, pin: bool = True) -> Done:
        return self.run("forecast", pin=pin)

    def module(self, release: str) -> dict[str, str]:
        return modinfo(self.host, release, "nvidia-current")

    def kernels(self) -> set[str]:
        return set(self.host.sh("ls /boot | sed -n 's/^vmlinuz-//p'").split())


@pytest.fixture(scope="module")
def gpu(can_boot: None, deployed: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gpu]:
    """A host whose kernel is the one of the main suite, while the security suite has a newer."""
    found = archive(deployed.hosts[0])
    if len(found) < 2:
        pytest.skip("the archive has one kernel only: nothing can be upgraded")
    (_, new), (version, old) = found[0], found[-1]
    name = f"t-{os.getpid()}-driver"
    try:
        made = fleets.boot(name, 1, "--gpus", "bare", "--kernel", old)
        host = made.hosts[0]
        host.sh(f"apt-get -qq update && {APT} install initramfs-tools {META}={version}", 300)
        yield Gpu(made, old, new, tmp_path_factory.mktemp("driver"))
    finally:
        fleets.take_down(name)


def test_a_bare_host_gets_the_driver_for_the_kernel_that_runs(gpu: Gpu) -> None:
    host = gpu.host
    assert host.sh("uname -r") == gpu.old
    assert gpu.run("doctor", pin=False).code == 1
    done = ok(gpu.apply(pin=False))
    assert "driver" in done.changed(host.name)
    module = gpu.module(gpu.old)
    assert module["vermagic"].split()[0] == gpu.old
    packages = host.sh("dpkg-query -W -f '${Version}\n' nvidia-kernel-dkms nvidia-smi libcuda1")
    assert {version.partition("-")[0] for version in packages.split()} == {module["version"]}
    assert "nouveau" in host.sh("modprobe --showconfig | grep '^blacklist'")
    # Nothing is left to do, and nothing was pinned.
    assert ok(gpu.apply(pin=False)).changed(host.name) == {}
    assert host.sh("apt-mark showhold") == ""
    # What doctor finds is that no demo was asked for, and what the next test looks at.
    found = gpu.run("doctor", pin=False).document["hosts"][0]["findings"]
    codes = {finding["code"] for finding in found}
    assert codes == {"no-demo", "upgrade-no-headers", "upgrade-no-module"}


def test_the_forecast_sees_the_kernel_that_would_come_without_a_module(gpu: Gpu) -> None:
    done = gpu.forecast(pin=False)
    assert done.code == 4
    (said,) = done.document["hosts"]
    assert said["reboot"]["verdict"] == "safe"
    assert said["upgrade"]["verdict"] == "unsafe"
    words(" ".join(str(reason) for reason in said["upgrade"]["reasons"]), gpu.new, "headers")


def test_the_pin_keeps_the_next_kernel_out(gpu: Gpu) -> None:
    host = gpu.host
    done = ok(gpu.apply())
    assert list(done.changed(host.name)) == ["kernel"]
    assert ok(gpu.apply()).changed(host.name) == {}
    holds = "dpkg-query -W -f '${db:Status-Want} ${db:Status-Status} ${Package}\n'"
    held = host.sh(f"{holds} | sed -n 's/^hold installed //p'").split()
    assert {META, f"linux-image-{gpu.old}", "nvidia-kernel-dkms", "libcuda1"} <= set(held)
    host.sh(f"{APT} dist-upgrade", 300)
    assert gpu.kernels() == {gpu.old}
    assert ok(gpu.forecast()).document["hosts"][0]["safe"] is True
    # By name it does not come either, and what the running kernel needs still does.
    assert host.try_(f"apt-get -s install linux-image-{gpu.new}").returncode != 0
    host.sh(f"apt-get -s install --reinstall linux-headers-{gpu.old}")


def test_a_kernel_that_came_past_the_pin_is_foretold_and_healed_under_it(gpu: Gpu) -> None:
    host, before = gpu.host, gpu.module(gpu.old)
    host.sh(f"{APT} {PAST_THE_PIN} install linux-image-{gpu.new}", 300)
    assert gpu.kernels() == {gpu.old, gpu.new}
    assert gpu.module(gpu.new) == {}  # DKMS found no headers, and said nothing
    forecast = gpu.forecast()
    assert forecast.code == 4
    (said,) = forecast.document["hosts"]
    assert said["reboot"]["kernel"] == gpu.new
    codes = {reason["code"] for reason in said["reboot"]["reasons"]}
    assert codes >= {"no-headers", "no-module"}
    assert gpu.run("doctor").code == 1

    done = ok(gpu.apply())
    assert "driver" in done.changed(host.name)
    assert gpu.module(gpu.new)["vermagic"].split()[0] == gpu.new
    assert gpu.module(gpu.new)["version"] == before["version"]
    # The running kernel's module was left alone, and the pin still holds it.
    assert gpu.module(gpu.old) == before
    assert ok(gpu.forecast()).document["hosts"][0]["safe"] is True
    assert ok(gpu.apply()).changed(host.name) == {}
    assert host.sh("cat /var/lib/gpufleet/kernel-pin") == gpu.old
