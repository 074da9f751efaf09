"""Operations that install distribution packages."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from pyinfra import host
from pyinfra.api import QuoteString, StringCommand, operation

from gpufleet.apt import APT, INSTALL
from gpufleet.base.facts import AptPackages
from gpufleet.base.plan import lists_are_stale, missing


@operation()
def installed(packages: Sequence[str], *, update: bool = False) -> Generator[StringCommand]:
    """Install the packages that are missing, finishing an interrupted dpkg first.

    The package lists are updated when they are older than a day, or always with `update`.
    """
    found = host.get_fact(AptPackages, packages=tuple(packages))
    if found.interrupted:
        yield StringCommand("DEBIAN_FRONTEND=noninteractive dpkg --configure -a --force-confold")
    absent = missing(packages, found)
    if not absent:
        host.noop("all packages are installed")
        return
    if update or lists_are_stale(found):
        yield StringCommand(APT, "update")
    yield StringCommand(INSTALL, "--", *(QuoteString(name) for name in absent))
