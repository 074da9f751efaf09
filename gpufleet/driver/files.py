"""The driver's own files on a host: what keeps nouveau out, and the boot guard."""

from __future__ import annotations

from collections.abc import Iterable

from gpufleet import render
from gpufleet.demo.plan import UNIT as DEMO
from gpufleet.driver.picture import GpuPicture
from gpufleet.managed.plan import ManagedFile

NOUVEAU = "/etc/modprobe.d/gpufleet-nouveau.conf"
GUARD = "gpufleet-boot-guard.service"
_GUARD_UNIT = f"/etc/systemd/system/{GUARD}"
_GUARD_PROGRAM = "/usr/local/lib/gpufleet/boot-guard"
_GUARD_WANTED = f"/etc/systemd/system/multi-user.target.wants/{GUARD}"

#: What GpuFacts looks at, beside the driver itself, so that files cost no command of their own.
OWNED = (NOUVEAU, _GUARD_PROGRAM, _GUARD_UNIT, _GUARD_WANTED)

#: Seconds that the boot guard may take: a build takes 4 minutes on 2 cores.
_GUARD_SECONDS = 900


def nouveau() -> list[ManagedFile]:
    """What keeps nouveau out."""
    return [ManagedFile(NOUVEAU, render.text("nouveau.conf.j2"))]


def guard() -> list[ManagedFile]:
    """The boot guard: what it runs, then its unit, whose check looks for the program."""
    unit = render.text(
        "boot-guard.service.j2",
        program=_GUARD_PROGRAM,
        seconds=_GUARD_SECONDS,
        before=(DEMO, "nvidia-persistenced.service", "nvidia-fabricmanager.service"),
    )
    return [
        ManagedFile(_GUARD_PROGRAM, render.text("boot-guard.sh.j2"), "755", validate="sh -n {}"),
        ManagedFile(_GUARD_UNIT, unit, validate="systemd-analyze verify {}"),
    ]


def differ(files: Iterable[ManagedFile], gpus: GpuPicture) -> bool:
    """Whether a file is not on the host as it should be."""
    there = dict(gpus.owned)
    return any(there.get(file.path) != f"{file.mode} {file.sha256}" for file in files)


def lie(files: Iterable[ManagedFile], gpus: GpuPicture) -> bool:
    """Whether any of the files is on the host."""
    there = dict(gpus.owned)
    return any(file.path in there for file in files)


def guarded(gpus: GpuPicture) -> bool:
    """Whether the boot guard runs at the next boot."""
    return _GUARD_WANTED in dict(gpus.owned)
