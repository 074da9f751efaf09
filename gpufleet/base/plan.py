"""Decides which distribution packages a host lacks and whether dpkg needs mending first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: What a person at the host and the deploy itself need: rsync brings weights and wheels, git and
#: git-lfs fetch models by hand, tmux keeps long jobs over a lost connection, the rest finds faults.
PACKAGES = (
    "ca-certificates",
    "curl",
    "git",
    "git-lfs",
    "iproute2",
    "pciutils",
    "python3",
    "rsync",
    "tmux",
)


@dataclass(frozen=True)
class Packages:
    """What dpkg says: which of the asked packages are installed, and whether it was interrupted."""

    installed: frozenset[str]
    interrupted: bool
    lists_age_s: int | None
    """Seconds since the package lists were last updated; None if there are none."""


def missing(wanted: Sequence[str], found: Packages) -> list[str]:
    """The packages to install, in the order asked."""
    return [name for name in wanted if name not in found.installed]


def lists_are_stale(found: Packages) -> bool:
    """Whether to update the package lists before an install: none, or older than a day."""
    return found.lists_age_s is None or found.lists_age_s > 86_400


def parse(lines: Iterable[str]) -> Packages:
    """Read the AptPackages fact's lines: key, tab, value."""
    installed: set[str] = set()
    interrupted = False
    age: int | None = None
    for line in lines:
        key, _, value = line.partition("\t")
        if key == "installed":
            installed.add(value)
        elif key == "interrupted":
            interrupted = True
        elif key == "lists_age_s":
            age = int(value)
    return Packages(frozenset(installed), interrupted, age)
