"""Decides in which order apply goes over the hosts: one canary of each kind, then batches."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gpufleet.pci import NVIDIA_GPUS

if TYPE_CHECKING:
    from gpufleet.settings import Settings

#: Run on each host by POSIX sh, needs no root; every line is a key, a tab and a value.
SCRIPT = (
    r"""
say() { printf '%s\t%s\n' "$1" "$2"; }
[ -r /etc/os-release ] && . /etc/os-release
say os "${ID-unknown} ${VERSION_ID-}"; say kernel "$(uname -r)"
"""
    + NVIDIA_GPUS
    + r"""
# As loaded; else as installed: the newest library wins, whichever folder it is in.
v=$(cat /sys/module/nvidia/version 2>/dev/null)
[ -n "$v" ] || for f in /usr/lib*/libnvidia-ml.so.*.* /usr/lib/*/libnvidia-ml.so.*.*; do
  [ -e "$f" ] && v=${f##*/libnvidia-ml.so.}
done
say driver "$v"
"""
)

# Parts of a kernel's release that name the distribution's version, which `Kind.os` holds.
_VERSION = re.compile(r"(el|fc|deb|bpo|rc|ubuntu|oe|amzn|tl)\d.*")


@dataclass(frozen=True)
class Kind:
    """What makes hosts alike, so that how an apply goes on one tells how it goes on the others."""

    os: str = ""
    """ID and VERSION_ID of os-release."""
    kernel: str = ""
    """The running kernel's flavour, such as generic or cloud-amd64."""
    gpus: tuple[str, ...] = ()
    """PCI device ids of the GPU models, each once, sorted."""
    driver: str = ""
    """Version of the module that is loaded, else of the libraries; empty without either."""


@dataclass(frozen=True)
class Member:
    """One host of a rolling apply: its kind, and its settings rolling.canary and rolling.batch."""

    name: str
    kind: Kind = Kind()
    canary: bool = True
    batch: int = 0

    def dump(self) -> str:
        """As one line of JSON, which `read` takes."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Batch:
    """Hosts that are applied to at once."""

    hosts: tuple[str, ...]
    canaries: bool = False

    def __str__(self) -> str:
        role = f" ({'canary' if len(self.hosts) == 1 else 'canaries'})" if self.canaries else ""
        return ", ".join(self.hosts) + role


def in_effect(hosts: Sequence[Settings]) -> bool:
    """Whether hosts with these settings are applied to one after the other, not all at once.

    They are where a batch size is set, or where a canary is to try the driver first. A fleet
    without either has nothing that one host could prove for the others.
    """
    if len(hosts) < 2:
        return False
    drivers = any(one.accelerator != "cpu" for one in hosts)
    return any(one.rolling.batch or (drivers and one.rolling.canary) for one in hosts)


def read(text: str) -> Member:
    """The member that `dump` wrote."""
    fields: dict[str, Any] = json.loads(text)
    kind = fields.pop("kind")
    return Member(**fields, kind=Kind(**{**kind, "gpus": tuple(kind["gpus"])}))


def parse(lines: Iterable[str]) -> Kind:
    """Read the script's lines; what is missing stays empty, and makes a kind of its own."""
    pairs = [line.split("\t", 1) for line in lines if "\t" in line]
    value = {key: text.strip() for key, text in pairs}
    return Kind(
        os=value.get("os", ""),
        kernel=flavour(value.get("kernel", "")),
        gpus=tuple(sorted({text.strip() for key, text in pairs if key == "gpu"})),
        driver=value.get("driver", ""),
    )


def flavour(release: str) -> str:
    """The flavour in a kernel's release: what follows its version, from the first word on.

    5.15.0-91-generic is generic, 6.1.0-18-cloud-amd64 is cloud-amd64, 5.14.0-362.el9.x86_64 is
    x86_64.
    """
    parts = re.split(r"[-.+~]", release)
    while parts and (not parts[0][:1].isalpha() or _VERSION.fullmatch(parts[0])):
        del parts[0]
    return "-".join(parts)


def batches(members: Sequence[Member]) -> list[Batch]:
    """The order in which apply goes if every host takes it well."""
    order: list[Batch] = []
    states: dict[str, str] = {}
    while batch := following(members, states):
        order.append(batch)
        states |= dict.fromkeys(batch.hosts, "done")
    return order


def following(members: Sequence[Member], states: Mapping[str, str]) -> Batch | None:
    """The hosts to apply to next, given how those before them ended; None where there are none.

    `states` are `events.HostState`s; a host that has none, or is `untouched`, is still to come.
    One host that failed, or was stopped, stops all that come after it. One that is unreachable
    proves nothing: if it was the canary of its kind, the next host of that kind becomes it.
    """
    if any(states.get(one.name) in ("failed", "stopped") for one in members):
        return None
    to_come = [one for one in members if states.get(one.name, "untouched") == "untouched"]
    proven = {one.kind for one in members if states.get(one.name) == "done"}
    careful = {one.kind for one in members if one.canary} - proven
    canaries: dict[Kind, Member] = {}
    # A host that shall be no canary is one only if its kind has no other left.
    for one in sorted(to_come, key=lambda one: not one.canary):
        if one.kind in careful:
            canaries.setdefault(one.kind, one)
    chosen = [one for one in to_come if canaries.get(one.kind) is one]
    if chosen:
        return Batch(tuple(one.name for one in chosen), canaries=True)
    sizes = _sizes(members)
    limit = float("inf")
    for one in to_come:
        # Of a batch of several kinds, each one's size holds.
        if len(chosen) < min(limit, sizes[one.kind]):
            limit = min(limit, sizes[one.kind])
            chosen.append(one)
    return Batch(tuple(one.name for one in chosen)) if chosen else None


def _sizes(members: Iterable[Member]) -> dict[Kind, float]:
    """How many hosts may go at once with those of each kind: the smallest that any of them says."""
    sizes: dict[Kind, float] = {}
    for one in members:
        sizes[one.kind] = min(sizes.get(one.kind, float("inf")), one.batch or float("inf"))
    return sizes


def stopped(failed: Mapping[str, str], batch: Batch, untouched: Sequence[str]) -> str:
    """One line for a rolling apply that did not go on.

    `failed` has the hosts of the last batch that failed, and where: concern and operation.
    """
    rest = f"{len(untouched)} host{'s' * (len(untouched) != 1)} untouched: {', '.join(untouched)}"
    if not failed:
        return f"stopped; {rest}"
    role = ("canaries " if len(failed) > 1 else "canary ") if batch.canaries else ""
    where = f": {next(iter(failed.values()))}" if len(failed) == 1 else ""
    return f"stopped after {role}{', '.join(failed)} failed{where}; {rest}"
