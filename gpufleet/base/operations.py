"""Operations that install distribution packages."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from pyinfra import host
from pyinfra.api import QuoteString, StringCommand, operation

from gpufleet.base.facts import AptPackages
from gpufleet.base.plan import lists_are_stale, missing

#: Waits for another apt (unattended-upgrades, an apply that was killed) instead of failing.
APT = "DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=600"


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
    yield StringCommand(
        APT,
        "install -y --no-install-recommends -o Dpkg::Options::=--force-confold --",
        *(QuoteString(name) for name in absent),
    )
