"""Where a host is and how to reach it with ssh, read from pyinfra's inventory data."""

from __future__ import annotations

import getpass
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyinfra.api.host import Host

    from gpufleet.settings import Demo


@dataclass(frozen=True)
class Target:
    """One host: its address, what ssh needs, and where its demo listens on it."""

    name: str
    address: str
    connector: str = "ssh"
    user: str | None = None
    port: int | None = None
    key: str | None = None
    known_hosts: str | None = None
    strict_host_key_checking: str = "accept-new"
    config_file: str | None = None
    sudo: bool = False
    demo_address: str = "127.0.0.1"
    demo_port: int = 7860

    def __str__(self) -> str:
        """user@address:port, as messages name the way to a host."""
        if self.connector != "ssh":
            return f"@{self.connector}"
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"{self.user or getpass.getuser()}@{address}:{self.port or 22}"

    @property
    def demo_is_local(self) -> bool:
        """Whether the demo answers on the host only, so that a tunnel must lead to it."""
        return ip_address(self.demo_address).is_loopback

    def ssh(self, *options: str) -> list[str]:
        """The ssh command that reaches this host as pyinfra does; options come before the host."""
        command = ["ssh", *options]
        if self.port:
            command += ["-p", str(self.port)]
        if self.user:
            command += ["-l", self.user]
        if self.key:
            command += ["-i", self.key, "-o", "IdentitiesOnly=yes"]
        if self.known_hosts:
            command += ["-o", f"UserKnownHostsFile={self.known_hosts}"]
        if self.config_file:
            command += ["-F", self.config_file]
        # The default of pyinfra's SSH connector, not of ssh.
        command += ["-o", f"StrictHostKeyChecking={self.strict_host_key_checking}"]
        return [*command, self.address]

    @property
    def demo_on_host(self) -> str:
        """address:port at which the host itself reaches its demo."""
        # A demo that listens everywhere answers the host itself too.
        address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.demo_address, self.demo_address)
        return f"[{address}]:{self.demo_port}" if ":" in address else f"{address}:{self.demo_port}"

    def forward(self, local: int) -> str:
        """The value of ssh's -L that brings the demo to 127.0.0.1:local."""
        return f"127.0.0.1:{local}:{self.demo_on_host}"


def target(host: Host, demo: Demo | None = None) -> Target:
    """The target that a pyinfra host is; `demo` are its settings, the defaults if None."""
    data = host.data.dict()

    def path(key: str) -> str | None:
        value = data.get(key)
        return str(value) if value else None

    name = type(host.connector).__name__.removesuffix("Connector").lower()
    place: dict[str, Any] = {}
    if demo is not None:
        place["demo_address"] = str(demo.bind)
        place["demo_port"] = demo.port
    return Target(
        name=host.name,
        address=str(data.get("ssh_hostname") or host.name),
        connector=name,
        user=path("ssh_user"),
        port=int(data["ssh_port"]) if data.get("ssh_port") else None,
        key=path("ssh_key"),
        known_hosts=path("ssh_known_hosts_file"),
        strict_host_key_checking=str(data.get("ssh_strict_host_key_checking") or "accept-new"),
        config_file=path("ssh_config_file"),
        sudo=bool(data.get("_sudo")),
        **place,
    )
