"""What a lab is made of, written down before it is made, so that it can always be taken down."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, replace
from ipaddress import IPv4Network
from pathlib import Path

from gpufleet.errors import FleetError, UsageError
from gpufleet.lab.network import Subnet

STATE = Path("/var/lib/gpufleet/lab")
_VERSION = 1
#: The number of a walled lab's mirror host; the hosts that are deployed to count from 1.
MIRROR = 0
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,30}[a-z0-9])?")


@dataclass(frozen=True)
class HostRecord:
    """One host of a lab; `prepared` once its own files are in place."""

    number: int
    disk_mib: int | None = None
    prepared: bool = False
    #: The recording that its GPU double replays.
    gpus: str | None = None
    #: The release of the kernel that it says it runs.
    kernel: str | None = None


@dataclass(frozen=True)
class LabRecord:
    """A lab as lab.json holds it. All else it owns has names that follow from these."""

    name: str
    image: str
    image_root: str
    network: str
    #: Virtual machines instead of containers; `image_root` is then their base disk.
    vm: bool = False
    #: PCI devices that each virtual machine has besides, as in ``10de:20b5:0302``.
    pci: tuple[str, ...] = ()
    hosts: tuple[HostRecord, ...] = ()
    #: The host that a walled lab has besides, and that its hosts alone can reach.
    mirror: HostRecord | None = None

    @property
    def walled(self) -> bool:
        """Whether the hosts reach nothing but the lab's mirror host."""
        return self.mirror is not None

    @property
    def every_host(self) -> tuple[HostRecord, ...]:
        """The hosts, and before them the mirror host of a walled lab."""
        return (self.mirror, *self.hosts) if self.mirror else self.hosts

    @property
    def directory(self) -> Path:
        """The lab's own files: state, key, known_hosts and its hosts' filesystems."""
        return lab_directory(self.name)

    @property
    def subnet(self) -> Subnet:
        """The lab's network."""
        return Subnet(IPv4Network(self.network))

    def host_name(self, host: HostRecord) -> str:
        """As in ``lab-1``, or ``lab-mirror``."""
        return f"{self.name}-{'mirror' if host.number == MIRROR else host.number}"

    def with_host(self, host: HostRecord) -> LabRecord:
        """The same lab, `host` in the place of the one with its number."""
        if host.number == MIRROR:
            return replace(self, mirror=host)
        others = [other for other in self.hosts if other.number != host.number]
        return replace(self, hosts=tuple(sorted([*others, host], key=lambda each: each.number)))


def lab_directory(name: str) -> Path:
    """Where the lab called `name` is kept; UsageError where it cannot be a lab's name."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot name a lab: use up to 32 lower-case letters, digits and dashes, "
            "a letter first"
        )
    return STATE / name


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path` so that it holds all of it or what it held before."""
    scratch = path.with_name(f".{path.name}.new")
    with scratch.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def save(lab: LabRecord) -> None:
    """Write lab.json, and before it mirror.json where the lab is walled."""
    document = {"version": _VERSION, **asdict(lab)}
    # A file of its own, so that a gpufleet that knows no mirror hosts can read every lab.json:
    # it has to, before it makes a lab of its own.
    mirror = document.pop("mirror")
    beside = lab.directory / "mirror.json"
    if mirror is not None:
        write_whole(beside, json.dumps(mirror, indent=2) + "\n")
    else:
        beside.unlink(missing_ok=True)  # of an `up` that was killed before it wrote lab.json
    write_whole(lab.directory / "lab.json", json.dumps(document, indent=2) + "\n")


def load(name: str) -> LabRecord | None:
    """The lab called `name`, or None; FleetError where its lab.json cannot be understood."""
    path = lab_directory(name) / "lab.json"
    try:
        document = json.loads(path.read_text())
        version = document.pop("version")
        if version != _VERSION:
            raise FleetError(
                f"{path}: version {version}, but this gpufleet knows {_VERSION}: "
                "take the lab down with the gpufleet that made it"
            )
        document["hosts"] = tuple(HostRecord(**host) for host in document["hosts"])
        document["pci"] = tuple(document.get("pci", ()))
        beside = path.with_name("mirror.json")
        if beside.exists():
            path = beside
            document["mirror"] = HostRecord(**json.loads(path.read_text()))
        return LabRecord(**document)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FleetError(f"{path}: not a lab's state ({error}): restore or remove it") from None


def names() -> list[str]:
    """Labs that have anything on this machine, whole or half-made."""
    if not STATE.is_dir():
        return []
    return sorted(path.name for path in STATE.iterdir() if _NAME.fullmatch(path.name))
