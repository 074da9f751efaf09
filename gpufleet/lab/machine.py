"""The operator's machine: what it must have before a lab can run on it, and how to call it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gpufleet.errors import FleetError
from gpufleet.lab import sources

#: Told of each step as it begins, and how far the work is from 0 to 1 where that is known.
Progress = Callable[[str, float | None], None]

# Command -> the package of Debian and Ubuntu that brings it.
_COMMANDS = {
    "ip": "iproute2",
    "mkfs.ext4": "e2fsprogs",
    "mmdebstrap": "mmdebstrap",
    "mount": "mount",
    "nft": "nftables",
    "rsync": "rsync",
    "setpriv": "util-linux",
    "ssh": "openssh-client",
    "systemd-nspawn": "systemd-container",
}
_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "uts")
# Bits of the effective capability set (linux/capability.h).
_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_CHROOT": 18, "CAP_SYS_ADMIN": 21, "CAP_MKNOD": 27}


def say_nothing(_step: str, _fraction: float | None) -> None:
    """The progress of someone who does not look."""


def run(*command: str | Path, given: str | None = None) -> str:
    """What `command` prints; FleetError with its last line of complaint where it fails."""
    try:
        done = subprocess.run(
            list(map(str, command)),
            input=given,
            stdin=subprocess.DEVNULL if given is None else None,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise FleetError(f"{command[0]}: not installed on this machine") from None
    if done.returncode:
        raise FleetError(f"`{' '.join(map(str, command))}`: {_last_line(done)}")
    return done.stdout


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return said[-1].strip() if said else f"failed with exit status {done.returncode}"


def succeeds(*command: str | Path) -> bool:
    """Whether `command` exits with 0; what it prints is dropped."""
    return (
        subprocess.run(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        ).returncode
        == 0
    )


def require_root() -> None:
    """FleetError unless this is root on Debian, Ubuntu or a derivative."""
    if not sources.distribution(sources.read_os_release()):
        raise FleetError("the lab needs Debian or Ubuntu with root; this machine runs neither")
    if os.geteuid() != 0:
        raise FleetError("the lab makes containers and needs root: run the command with sudo")


def require_kernel() -> None:
    """FleetError naming the first thing that this kernel, or the container we are in, lacks."""
    effective = next(
        int(line.split()[1], 16)
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("CapEff:")
    )
    for capability, bit in _CAPABILITIES.items():
        if not effective >> bit & 1:
            raise FleetError(
                f"this root lacks {capability}: the lab needs a machine or a privileged container"
            )
    for namespace in _NAMESPACES:
        if not Path("/proc/self/ns", namespace).exists():
            raise FleetError(f"this kernel has no {namespace} namespaces: the lab needs them")
    if "\toverlay\n" not in Path("/proc/filesystems").read_text() and not (
        shutil.which("modprobe") and succeeds("modprobe", "overlay")
    ):
        raise FleetError("this kernel has no overlay filesystem: load or build in `overlay`")
    cgroup_root()


def cgroup_root() -> Path:
    """Where cgroup2 is mounted (alone, or beside version 1); FleetError where it is not."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.startswith("cgroup2 ") and before.split()[4].startswith("/sys/fs/cgroup"):
            return Path(before.split()[4])
    raise FleetError(
        "no cgroup2 is mounted on this machine: "
        "mount -t cgroup2 cgroup2 /sys/fs/cgroup (or /sys/fs/cgroup/unified)"
    )


def ensure_packages(image: sources.Release, progress: Progress = say_nothing) -> list[str]:
    """Install what the lab needs and this machine lacks; returns the packages it installed.

    Needs root on Debian or Ubuntu. FleetError with apt's own last line where it cannot.
    """
    require_root()
    missing = set(which_missing(_COMMANDS))
    if image.distribution == "debian" and not Path(image.keyring).exists():
        missing.add("debian-archive-keyring")
    if image.distribution == "ubuntu" and not Path("/usr/share/distro-info/ubuntu.csv").exists():
        missing.add("distro-info-data")  # mmdebstrap knows Ubuntu's releases from it
    if missing:
        install(sorted(missing), progress)
    return sorted(missing)


def which_missing(commands: Mapping[str, str]) -> list[str]:
    """The packages of those `commands` (command -> package) that are not on PATH."""
    missing = {package for command, package in commands.items() if not shutil.which(command)}
    return sorted(missing)


def install(packages: Sequence[str], progress: Progress = say_nothing) -> None:
    """apt-get install `packages` without questions, waiting for another apt to finish."""
    progress(f"installing {', '.join(packages)} on this machine", None)
    apt = ("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-o", "DPkg::Lock::Timeout=600")
    try:
        run(*apt, "-qq", "update")
        run(*apt, "-qq", "install", "-y", "--no-install-recommends", *packages)
    except FleetError as error:
        raise FleetError(f"cannot install {' '.join(packages)} on this machine: {error}") from None


def mounts_below(directory: Path) -> list[Path]:
    """Mount points at and below `directory`, the innermost first."""
    # mountinfo writes space, tab, newline and backslash in octal.
    points = [
        line.split()[4].encode().decode("unicode_escape")
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
    ]
    inside = [Path(point) for point in points if Path(point).is_relative_to(directory)]
    return inside[::-1]


def unmount_below(directory: Path) -> None:
    """Unmount all at and below `directory`; what a shell still stands in is detached."""
    for point in mounts_below(directory):
        if not succeeds("umount", point):
            run("umount", "--lazy", point)


def remove_tree(directory: Path) -> None:
    """Delete `directory`, never entering a filesystem that is mounted in it."""
    if directory.exists():
        run("rm", "-rf", "--one-file-system", "--", directory)
