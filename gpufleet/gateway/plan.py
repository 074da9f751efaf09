"""Decides what nginx asks whom: its configuration, its units, and what keeps watch over it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from gpufleet import render
from gpufleet.errors import FleetError
from gpufleet.managed.plan import ManagedFile
from gpufleet.settings import Settings

#: The name of the fleet's nginx, which its units and folders begin with.
GATEWAY = "minigpt4-gateway"

#: The application's own limit of a request (modeldemo/gate.py), rounded up: it says more than
#: nginx does.
MAX_BODY = "32m"

#: The page's idle connections come from here, so that they can be told from work.
IDLE_ADDRESS = "127.0.0.3"

_SYSTEMD = PurePosixPath("/etc/systemd/system")

# nginx's own test, with its files in a folder of its own: that of the unit is there only while it
# runs.
_CHECK = 'd=$(mktemp -d) && nginx -t -q -p "$d" -c {}; r=$?; rm -rf "$d"; (exit $r)'


@dataclass(frozen=True)
class Backend:
    """One that nginx may ask: its address:port, and how many questions it takes beside others."""

    address: str
    weight: int = 1


@dataclass(frozen=True)
class Balancer:
    """An nginx of its own and who is behind it."""

    name: str
    title: str
    listen: str
    """address:port"""
    backends: tuple[Backend, ...]
    user: str
    wanted_by: str
    part_of: str = ""
    """The unit that it stops with, if any."""
    local: bool = False
    """Whether all it asks are processes of its own host."""
    drain_seconds: int = 330
    """What one that is taken out gets for its last answer: longer than any may take."""

    @property
    def unit(self) -> str:
        return f"{self.name}.service"

    @property
    def watch(self) -> str:
        return f"{self.name}-watch.service"

    @property
    def program(self) -> str:
        """What starts it and tells it whom to leave out."""
        return f"/etc/{self.name}/balance"


def paths(name: str) -> tuple[str, ...]:
    """Every file of the balancer of this name, in the order in which they are written."""
    return (
        *(f"/etc/{name}/{file}" for file in ("balance", "probes", "nginx.conf")),
        *(str(_SYSTEMD / f"{name}{kind}.service") for kind in ("", "-watch")),
    )


def files(balancer: Balancer) -> tuple[ManagedFile, ...]:
    """What a balancer is made of, each checked by who reads it before it lands."""
    program, probes, configuration, unit, watch = paths(balancer.name)
    metrics = "each process has its own: /metrics/0 …" if balancer.local else "ask each host"
    values = {
        "name": balancer.name,
        "title": balancer.title,
        "listen": balancer.listen,
        "backends": balancer.backends,
        "user": balancer.user,
        "local": balancer.local,
        "loopback": balancer.local and balancer.listen.startswith(("127.", "[::1]")),
        "low_port": int(balancer.listen.rpartition(":")[2]) < 1024,
        "part_of": balancer.part_of,
        "wanted_by": balancer.wanted_by,
        "cookie": balancer.name.replace("-", "_"),
        "metrics": metrics,
        "max_body": MAX_BODY,
        "drain_seconds": balancer.drain_seconds,
        "idle_address": IDLE_ADDRESS,
        "program": program,
        "folder": str(PurePosixPath(program).parent),
    }
    asked = "".join(
        f'url = "http://{one.address}/healthz"\noutput = "/dev/null"\n' for one in balancer.backends
    )
    watching = {
        "title": f"{balancer.title}: whom to leave out",
        "wanted_by": balancer.unit,
        "part_of": balancer.unit,
    }
    verify = "systemd-analyze verify {}"
    return (
        ManagedFile(program, render.text("balancer.sh.j2", **values), "755", validate="sh -n {}"),
        ManagedFile(probes, f"# Written by gpufleet: what {balancer.name} asks.\n{asked}"),
        ManagedFile(configuration, render.text("balancer.nginx.j2", **values), validate=_CHECK),
        ManagedFile(
            unit, render.text("balancer.service.j2", **values, watch=False), validate=verify
        ),
        ManagedFile(
            watch,
            render.text("balancer.service.j2", **{**values, **watching}, watch=True),
            validate=verify,
        ),
    )


@dataclass(frozen=True)
class Running:
    """A balancer as its host has it."""

    active: bool = False
    """nginx and its watch."""
    enabled: bool = False
    fresh: bool = False
    """Whether nginx was started from the unit that is there."""
    watch_fresh: bool = False
    """The same of its watch, and of the program that it runs."""
    loaded: str = ""
    """sha256 of the configuration that was marked last, empty if none was."""
    there: tuple[str, ...] = ()
    """Its files that the host has."""


def parse(lines: Iterable[str]) -> Running:
    """Read the BalancerState fact's lines: key=value; `there` may repeat."""
    pairs = [line.split("=", 1) for line in lines if "=" in line]
    value = dict(pairs)
    return Running(
        active=value.get("active") == "yes",
        enabled=value.get("enabled") == "yes",
        fresh=value.get("fresh") == "yes",
        watch_fresh=value.get("watch_fresh") == "yes",
        loaded=value.get("loaded", ""),
        there=tuple(path for key, path in pairs if key == "there"),
    )


def digest(wanted: Iterable[ManagedFile]) -> str:
    """sha256 of the configuration among a balancer's files."""
    return next(file.sha256 for file in wanted if file.path.endswith("/nginx.conf"))


def is_right(found: Running, configuration: str) -> bool:
    """Whether nginx runs, at boot too, with the configuration of this digest."""
    runs = found.active and found.enabled and found.fresh and found.watch_fresh
    return runs and found.loaded == configuration


@dataclass(frozen=True)
class Member:
    """A host of the inventory, as a gateway sees it."""

    name: str
    address: str
    """Where others reach it: its name or ssh_hostname."""
    settings: Settings


def gateway(own: Member, fleet: Sequence[Member]) -> Balancer:
    """The gateway that a host is before all hosts of the fleet that serve the same model.

    Raises FleetError, one line, where a host cannot be reached from it, or where its own port is
    taken by its own demo.
    """
    settings = own.settings
    if settings.gateway.port == settings.demo.port:
        raise FleetError(
            f"{own.name}: gateway.port is {settings.gateway.port}, which demo.port is too: "
            "set another one"
        )
    backends = []
    for member in fleet:
        demo = member.settings.demo
        if member.settings.model != settings.model or member.settings.runtime != "modern":
            continue
        itself = member.name == own.name
        if demo.bind.is_loopback and not itself:
            raise FleetError(
                f"{member.name}: its demo listens on {demo.bind} only, where the gateway "
                f"{own.name} cannot reach it: set its demo.bind to an address of the network"
            )
        address = member.address
        if not demo.bind.is_unspecified:
            address = str(demo.bind)
        elif itself:
            address = "127.0.0.1" if demo.bind.version == 4 else "::1"
        weight = max(demo.processes, 1)
        backends.append(Backend(join(address, demo.port), weight))
    return Balancer(
        name=GATEWAY,
        title=f"Gateway of the model demo ({settings.model})",
        listen=join(str(settings.gateway.bind), settings.gateway.port),
        backends=tuple(backends),
        user=settings.user,
        wanted_by="multi-user.target",
    )


def join(address: str, port: int) -> str:
    """address:port, an IPv6 address in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
