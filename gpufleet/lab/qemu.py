"""How QEMU is called: the machine that every virtual host of the lab is."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from gpufleet.errors import FleetError
from gpufleet.lab.machine import Progress, install, say_nothing, which_missing

#: Command -> the package of Debian and Ubuntu that brings it.
COMMANDS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "sfdisk": "fdisk",
}
# Of a host; taken from this machine as it is used. The demo's smallest model needs 1500.
_MEMORY_MIB = 2048
_PROCESSORS = 2


def ensure_packages(progress: Progress = say_nothing) -> None:
    """Install QEMU where it is missing; FleetError where this machine cannot run it."""
    if platform.machine() != "x86_64":
        raise FleetError(
            f"virtual machines are x86_64, and this machine is {platform.machine()}: "
            "leave --vm out, or use another machine"
        )
    missing = which_missing(COMMANDS)
    if missing:
        install(missing, progress)


def accelerators(kvm: Path = Path("/dev/kvm"), cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """QEMU's -accel options: KVM where processor and kernel have it, else software emulation."""
    flags = re.search(r"^flags\s*:.*", cpuinfo.read_text(), re.MULTILINE)
    # Without either flag a /dev/kvm serves only guests that were made for it.
    if flags and {"vmx", "svm"} & set(flags[0].split()) and os.access(kvm, os.R_OK | os.W_OK):
        return ["-accel", "kvm"]
    return ["-accel", "tcg,thread=multi,tb-size=256"]


def machine(name: str, shared: bool = False) -> list[str]:
    """A machine without disks or links, and with a screen that nobody sees.

    GRUB does not get past a machine without any. Its memory is `shared` where another process
    is a device of it.
    """
    memory = ["-machine", "pc"]
    if shared:
        memory = ["-machine", "pc,memory-backend=ram"]
        memory += ["-object", f"memory-backend-memfd,id=ram,size={_MEMORY_MIB}M,share=on"]
    return [
        *("qemu-system-x86_64", "-name", f"gpufleet-{name}", "-nodefaults", "-no-user-config"),
        # Page tables of five levels only cost time where there is little memory.
        *(*memory, *accelerators(), "-cpu", "max,la57=off"),
        *("-smp", str(_PROCESSORS), "-m", str(_MEMORY_MIB), "-vga", "std", "-display", "none"),
        # What makes keys needs random numbers at once.
        *("-device", "virtio-rng-pci"),
    ]


def disk(path: Path, kind: str) -> list[str]:
    """The machine's disk: /dev/vda."""
    return ["-drive", f"file={_escaped(path)},format={kind},if=virtio,discard=unmap"]


def console(log: Path) -> list[str]:
    """A serial port, ttyS0, whose output `log` keeps over all boots."""
    return [
        *("-chardev", f"file,id=console,path={_escaped(log)},append=on"),
        *("-serial", "chardev:console"),
    ]


def link(tap: str, address: str) -> list[str]:
    """A network card with the MAC `address` on the tap device `tap`."""
    return [
        *("-netdev", f"tap,id=lan,ifname={tap},script=no,downscript=no"),
        *("-device", f"virtio-net-pci,netdev=lan,mac={address},romfile="),
    ]


def given(name: str, path: Path) -> list[str]:
    """The bytes of `path`, for the host to read in /sys/firmware/qemu_fw_cfg."""
    return ["-fw_cfg", f"name=opt/gpufleet/{name},file={_escaped(path)}"]


def _escaped(path: Path) -> str:
    return str(path).replace(",", ",,")
