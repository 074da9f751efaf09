"""Labs: fleets of throwaway hosts on this machine, brought up, looked at and taken down."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, replace
from ipaddress import IPv4Network
from pathlib import Path
from typing import TypeVar

from gpufleet.errors import FleetError, UsageError
from gpufleet.lab import image as images
from gpufleet.lab import machine, network, sources, state
from gpufleet.lab.container import Container, key_pair
from gpufleet.lab.locks import locked
from gpufleet.lab.machine import Progress, say_nothing
from gpufleet.lab.state import STATE, HostRecord, LabRecord

DEFAULT_NAME = "lab"
DEFAULT_IMAGE = "debian:12"
# A container answers after 1 s; software emulation or a crowded machine needs much longer.
_BOOT_SECONDS = 90.0
# ext4 and a booted host's own files need about this much.
_LEAST_DISK_MIB = 64

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Host:
    """One host of a lab, as it was when it was looked at."""

    name: str
    address: str
    running: bool


@dataclass(frozen=True)
class Lab:
    """A lab as it was when it was looked at; `key` opens root on every host of it."""

    name: str
    image: str
    subnet: str
    hosts: tuple[Host, ...]
    directory: Path

    @property
    def key(self) -> Path:
        """The private key that root of every host accepts."""
        return self.directory / "key"

    @property
    def known_hosts(self) -> Path:
        """The hosts' keys, made before they booted: nothing is trusted on first use."""
        return self.directory / "known_hosts"

    def host(self, host: str | Host) -> Host:
        """The host called `host`; UsageError lists those there are."""
        name = host.name if isinstance(host, Host) else host
        for each in self.hosts:
            if each.name == name:
                return each
        known = ", ".join(each.name for each in self.hosts)
        raise UsageError(f"lab {self.name} has no host {name!r}: it has {known}")

    def ssh_command(self, host: str | Host, *command: str) -> list[str]:
        """The ssh call that runs `command`, or a login shell, on `host` as root."""
        return [
            *("ssh", "-F", "/dev/null", "-i", str(self.key), "-o", "IdentitiesOnly=yes"),
            *("-o", f"UserKnownHostsFile={self.known_hosts}", "-o", "StrictHostKeyChecking=yes"),
            # A host that dies takes its end of the connection with it.
            *("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"),
            *("-o", "LogLevel=ERROR", f"root@{self.host(host).address}", *command),
        ]

    def run(
        self, host: str | Host, command: str, *, timeout: float | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the shell line `command` on `host` over SSH; the exit status is not checked."""
        ssh = self.ssh_command(host, command)
        options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]
        return subprocess.run(
            [ssh[0], *options, *ssh[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def root(self, host: str | Host) -> Path:
        """The filesystem of `host` as this machine sees it, running or not."""
        return self.directory / "hosts" / self.host(host).name / "root"


def _container(lab: LabRecord, host: HostRecord) -> Container:
    name = lab.host_name(host)
    return Container(name, lab.directory / "hosts" / name, lab.subnet, host.number)


def _look(lab: LabRecord) -> Lab:
    containers = [_container(lab, host) for host in lab.hosts]
    hosts = tuple(Host(each.name, str(each.address), each.running) for each in containers)
    return Lab(lab.name, lab.image, lab.network, hosts, lab.directory)


def load(name: str = DEFAULT_NAME) -> Lab:
    """The lab called `name`; FleetError where it is not up."""
    lab = state.load(name)
    if lab is None or not lab.hosts:
        raise FleetError(f"no lab {name!r} is up on this machine: `fleet lab up` starts one")
    return _look(lab)


def labs() -> list[Lab]:
    """Every lab on this machine, by name; half-made ones with the hosts they have."""
    found = (state.load(name) for name in state.names())
    return [_look(lab) for lab in found if lab]


def up(
    name: str = DEFAULT_NAME,
    hosts: int = 2,
    image: str | None = None,
    *,
    disk_mib: int | None = None,
    progress: Progress = say_nothing,
) -> Lab:
    """Bring the lab called `name` up to at least `hosts` hosts that answer SSH.

    What runs is left alone, what died is booted again on its own filesystem, what is half-made
    is completed. `image` is as in ``debian:12``; by default what the lab has, or debian:12.
    New hosts get a filesystem of `disk_mib` MiB, by default all of this machine's. UsageError
    for arguments that cannot be met, FleetError where this machine cannot have a lab.
    """
    existing = state.load(name)
    wanted = sources.release(image or (existing.image if existing else DEFAULT_IMAGE))
    if existing and existing.image != wanted.name:
        raise UsageError(
            f"lab {name} runs {existing.image}, not {wanted.name}: "
            f"`fleet lab down --name {name}` first, or give another --name"
        )
    if not 1 <= hosts <= network.MOST_HOSTS:
        raise UsageError(f"a lab has 1 to {network.MOST_HOSTS} hosts, not {hosts}")
    if disk_mib is not None and disk_mib < _LEAST_DISK_MIB:
        raise UsageError(f"a host's disk has at least {_LEAST_DISK_MIB} MiB, not {disk_mib}")
    machine.require_root()
    machine.ensure_packages(wanted, progress)
    machine.require_kernel()
    root = Path(existing.image_root) if existing else _image(wanted, progress)
    with locked(state.lab_directory(name), progress):
        lab = state.load(name) or _found(name, wanted, root)
        # A smaller number takes no host away: that is what `down` is for.
        for number in range(len(lab.hosts) + 1, hosts + 1):
            lab = lab.with_host(HostRecord(number, disk_mib))
        state.save(lab)
        network.change_machine()
        network.ensure_bridge(lab.name, lab.subnet)
        lab = _prepare_hosts(lab, progress)
        _boot_hosts(lab, progress)
        return _look(lab)


def _image(wanted: sources.Release, progress: Progress) -> Path:
    in_use = [Path(lab.image_root) for lab in map(state.load, state.names()) if lab]
    return images.ensure(images.recipe(wanted), in_use, progress)


def _found(name: str, wanted: sources.Release, root: Path) -> LabRecord:
    """A new lab with a network of its own, written down before any of it exists."""
    with locked(STATE):
        others = [lab for lab in map(state.load, state.names()) if lab]
        before = STATE / "machine.json"
        if not before.exists():
            state.write_whole(before, json.dumps(network.machine_settings()) + "\n")
        taken = network.networks_in_use() + [IPv4Network(lab.network) for lab in others]
        subnet = network.free_subnet(taken)
        lab = LabRecord(name, wanted.name, str(root), str(subnet.network))
        state.save(lab)
    return lab


def _prepare_hosts(lab: LabRecord, progress: Progress) -> LabRecord:
    """Give every new host its key and files, and write the exact known_hosts."""
    keys = lab.directory / "host_keys"
    keys.mkdir(mode=0o700, exist_ok=True)
    key_pair(lab.directory / "key", f"gpufleet lab {lab.name}")
    authorized = (lab.directory / "key.pub").read_text()
    new = [host for host in lab.hosts if not host.prepared]
    if new:
        _keep_archives(lab)
    seed = {path.name: path for path in _archives(lab).glob("*.deb")}

    def prepare(host: HostRecord) -> HostRecord:
        container = _container(lab, host)
        host_key = keys / container.name
        key_pair(host_key, f"root@{container.name}")
        container.remove()
        container.prepare(host.disk_mib, host_key, authorized, seed)
        return replace(host, prepared=True)

    for host in _in_parallel(prepare, new, progress, "preparing"):
        lab = lab.with_host(host)
    known = []
    for host in lab.hosts:
        container = _container(lab, host)
        public = keys.joinpath(f"{container.name}.pub").read_text().split()
        known.append(f"{container.name},{container.address} {public[0]} {public[1]}\n")
    state.write_whole(lab.directory / "known_hosts", "".join(known))
    state.save(lab)
    return lab


def _boot_hosts(lab: LabRecord, progress: Progress) -> None:
    """Boot what does not run, and wait until every host lets us in."""
    given_up = threading.Event()
    seen = _look(lab)

    def boot(host: HostRecord) -> None:
        container = _container(lab, host)
        if container.running:
            container.reconnect()
        else:
            container.start(Path(lab.image_root))
        _await_login(seen, container, given_up)

    doing = "checking" if all(host.running for host in seen.hosts) else "booting"
    _in_parallel(boot, lab.hosts, progress, doing, given_up)


def _await_login(lab: Lab, container: Container, given_up: threading.Event) -> None:
    deadline = time.monotonic() + _BOOT_SECONDS
    complaint = "SSH does not answer"
    while not given_up.is_set():
        if not container.running:
            raise FleetError(
                f"{container.name} stopped while booting: {container.last_words()}; "
                f"see {container.console}"
            )
        if _greets(str(container.address)):
            login = lab.run(container.name, "true", timeout=30)
            if login.returncode == 0:
                return
            complaint = login.stderr.strip().rpartition("\n")[2] or complaint
        if time.monotonic() > deadline:
            raise FleetError(
                f"{container.name} did not let us in within {_BOOT_SECONDS:.0f} s ({complaint}); "
                f"see {container.console}"
            )
        time.sleep(0.05)


def _greets(address: str) -> bool:
    """Whether an SSH server introduces itself at `address`."""
    try:
        with socket.create_connection((address, 22), timeout=1) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def _in_parallel(
    work: Callable[[HostRecord], _Result],
    hosts: Sequence[HostRecord],
    progress: Progress,
    doing: str,
    given_up: threading.Event | None = None,
) -> list[_Result]:
    """What `work` returns for each of `hosts`, all at once; the first error ends the wait.

    `given_up` is set when it does, or on Ctrl-C, for work that looks at it.
    """
    if not hosts:
        return []
    with ThreadPoolExecutor(max_workers=min(len(hosts), 16)) as pool:
        pending = [pool.submit(work, host) for host in hosts]
        try:
            progress(f"{doing} {len(hosts)} host{'s' * (len(hosts) != 1)}", None)
            results = [done.result() for done in as_completed(pending)]
        except BaseException:
            if given_up:
                given_up.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def down(name: str = DEFAULT_NAME, *, progress: Progress = say_nothing) -> bool:
    """Stop every host of the lab called `name` and remove all it has on this machine.

    Whatever was left by a lab that was killed half-made, or by a reboot, goes too. Returns
    whether there was anything; packages that the hosts downloaded are kept for the next lab.
    """
    directory = state.lab_directory(name)
    machine.require_root()
    there = directory.exists()
    if there:
        with locked(directory, progress):
            lab = state.load(name)
            if lab:
                _keep_archives(lab)
                _in_parallel(
                    lambda host: _container(lab, host).remove(), lab.hosts, progress, "stopping"
                )
                network.remove_bridge(lab.name, lab.subnet)
            machine.remove_tree(directory)
    _leave_machine()
    return there


def _leave_machine() -> None:
    """Once no lab is left, put this machine back as the first lab found it."""
    if not STATE.is_dir():
        return
    with locked(STATE):
        before = STATE / "machine.json"
        if state.names():
            return
        if before.exists():
            network.restore_machine(json.loads(before.read_text()))
            before.unlink()
        # Not empty where another command is just making a lab, or keeps something beside.
        with suppress(OSError):
            STATE.rmdir()
            STATE.parent.rmdir()


def _archives(lab: LabRecord) -> Path:
    """Package archives that hosts of this release have downloaded before."""
    return images.CACHE / "apt" / lab.image.replace(":", "-")


def _keep_archives(lab: LabRecord) -> None:
    """Link what the hosts' apt has downloaded into the cache; apt checks it again when used."""
    cache = _archives(lab)
    cache.mkdir(parents=True, exist_ok=True)
    for host in lab.hosts:
        if host.disk_mib is not None:
            continue  # a filesystem of its own: nothing to link from
        for archive in _container(lab, host).archives.glob("*.deb"):
            kept = cache / archive.name
            if archive.is_file() and not archive.is_symlink() and not kept.exists():
                os.link(archive, kept)
