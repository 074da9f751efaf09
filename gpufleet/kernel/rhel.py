"""The pin on the RHEL family: version locks and grubby instead of holds and GRUB files."""

from __future__ import annotations

import fnmatch
import re
import shlex
from collections.abc import Iterable

from gpufleet.kernel.packages import is_driver
from gpufleet.kernel.picture import KernelPicture

#: What versionlock holds; with kernel-devel a module can still be built, as it stays here.
KERNEL = (
    "kernel",
    "kernel-core",
    "kernel-modules",
    "kernel-modules-core",
    "kernel-modules-extra",
    "kernel-devel",
    "kernel-devel-matched",
)


def locks(picture: KernelPicture) -> tuple[str, ...]:
    """Packages to lock at the version they have: the kernel's and the driver's, if installed."""
    return tuple(
        dict.fromkeys(
            package.name
            for package in picture.packages
            if package.installed and (package.name in KERNEL or is_driver(package.name))
        )
    )


def pin(picture: KernelPicture, release: str) -> tuple[str, ...]:
    """Commands that lock this kernel and the driver, and boot it by default.

    A kernel package is installed in several versions side by side, so its lock names the one.
    """
    commands = []
    specs = [
        f"{name}-{_nevra(release)}" if name in KERNEL else name
        for name in locks(picture)
        if not _locked(picture, name)
    ]
    if specs:
        commands.append(shlex.join(["dnf", "-q", "versionlock", "add", *specs]))
    if picture.next_boot.release != release:
        commands.append(shlex.join(["grubby", "--set-default", f"/boot/vmlinuz-{release}"]))
    return tuple(commands)


def unpin(picture: KernelPicture) -> tuple[str, ...]:
    """Commands that lift gpufleet's own locks; other people's stay."""
    if not picture.own_holds:
        return ()
    return (shlex.join(["dnf", "-q", "versionlock", "delete", *picture.own_holds]),)


def _nevra(release: str) -> str:
    """5.14.0-427.el9.x86_64 -> 5.14.0-427.el9: a lock names version and release, any arch."""
    return re.sub(r"\.(x86_64|aarch64|ppc64le|s390x)$", "", release)


def _locked(picture: KernelPicture, name: str) -> bool:
    """Whether versionlock has a line for the package: NAME-EPOCH:VERSION-RELEASE.*, or in the
    TOML of dnf 5 its bare name. A line that begins with ! excludes one version: no lock."""
    shape = re.compile(rf"{re.escape(name)}(-(\d+:)?\d[^ -]*-[^ -]+)?")
    return any(shape.fullmatch(hold) for hold in picture.holds)


def leaks(picture: KernelPicture, release: str) -> Iterable[str]:
    for name in locks(picture):
        if not _locked(picture, name):
            yield f"{name} is not locked: apply again, or dnf versionlock add {name}"
    if picture.next_boot.release != release:
        yield (
            f"{picture.next_boot.release} boots by default, not {release}: "
            f"grubby --set-default /boot/vmlinuz-{release}"
        )
    yield from warnings(picture)


def warnings(picture: KernelPicture) -> tuple[str, ...]:
    """What in dnf.conf breaks healing or the pin."""
    found = []
    for option, value in picture.dnf:
        if option.startswith("exclude") and any(
            fnmatch.fnmatchcase("kernel-devel", word) for word in re.split(r"[ ,]+", value)
        ):
            found.append(
                f"dnf.conf has {option}={value}, which keeps kernel-devel out too, so that no "
                "module can be built: remove it, the version lock pins the kernel"
            )
        elif option == "installonly_limit" and value.strip().isdecimal():
            limit = int(value)
            if 0 < limit <= len(picture.kernels):
                found.append(
                    f"dnf.conf has installonly_limit={limit} and {len(picture.kernels)} kernels "
                    "are installed: the next one evicts the oldest, be it pinned: set it to 0"
                )
    return tuple(found)
