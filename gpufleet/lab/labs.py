"""Labs: fleets of throwaway hosts on this machine, brought up, looked at and taken down."""

from __future__ import annotations

import json
import os
import re
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
from typing import Any, TypeVar

from gpufleet.errors import FleetError, UsageError
from gpufleet.lab import disk as disks
from gpufleet.lab import image as images
from gpufleet.lab import machine, network, qemu, sources, state
from gpufleet.lab import walled as mirrors
from gpufleet.lab.container import Container, key_pair
from gpufleet.lab.host import LabHost
from gpufleet.lab.locks import locked
from gpufleet.lab.machine import Progress, say_nothing
from gpufleet.lab.pci import Device
from gpufleet.lab.state import MIRROR, STATE, HostRecord, LabRecord
from gpufleet.lab.vm import VirtualMachine

DEFAULT_NAME = "lab"
DEFAULT_IMAGE = "debian:12"
# ext4 and a booted host's own files need about this much.
_LEAST_DISK_MIB = 64
_RELEASE = re.compile(r"[0-9]+\.[0-9]+[A-Za-z0-9.+~_-]*")

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
    vm: bool = False
    #: The host beside the others that a walled lab's hosts download from.
    mirror_host: Host | None = None

    @property
    def mirror(self) -> mirrors.Mirror:
        """The mirror of a walled lab; UsageError for a lab that has none."""
        if self.mirror_host is None:
            raise UsageError(f"lab {self.name} has no mirror host: `fleet lab up --walled` has one")
        return mirrors.Mirror(self, self.mirror_host)

    @property
    def settings(self) -> dict[str, Any]:
        """What inventories of this lab set for every host: the mirror of a walled lab."""
        return self.mirror.settings() if self.mirror_host else {}

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
        for each in (*self.hosts, self.mirror_host):
            if each is not None and each.name == name:
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
        """The filesystem of the container `host` as this machine sees it, running or not."""
        return self.directory / "hosts" / self.host(host).name / "root"


def _host(lab: LabRecord, host: HostRecord) -> LabHost:
    name = lab.host_name(host)
    directory = lab.directory / "hosts" / name
    if lab.vm:
        return VirtualMachine(name, directory, lab.subnet, host.number, lab.pci)
    shown = {"gpus": host.gpus, "kernel": host.kernel}
    behind = lab.walled and host.number != MIRROR
    return Container(name, directory, lab.subnet, host.number, **shown, walled=behind)


def _look(lab: LabRecord) -> Lab:
    def look(host: HostRecord) -> Host:
        made = _host(lab, host)
        return Host(made.name, str(made.address), made.running)

    hosts = tuple(map(look, lab.hosts))
    mirror = look(lab.mirror) if lab.mirror else None
    return Lab(lab.name, lab.image, lab.network, hosts, lab.directory, lab.vm, mirror)


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


def strays(name: str = DEFAULT_NAME) -> dict[str, int]:
    """Host -> packets that it sent, or tried to send, to anything but the mirror of its lab.

    UsageError for a lab that is not walled, FleetError where it is not up.
    """
    lab = load(name)
    return lab.mirror.strays()


def up(
    name: str = DEFAULT_NAME,
    hosts: int = 2,
    image: str | None = None,
    *,
    vm: bool = False,
    walled: bool = False,
    pci: Sequence[str] = (),
    disk_mib: int | None = None,
    gpus: Sequence[str] = (),
    kernel: str | None = None,
    progress: Progress = say_nothing,
) -> Lab:
    """Bring the lab called `name` up to at least `hosts` hosts that answer SSH.

    What runs is left alone, what died is booted again on its own filesystem, what is half-made
    is completed. `image` is as in ``debian:12``; by default what the lab has, or debian:12.
    New hosts get a filesystem of `disk_mib` MiB, by default all of this machine's. The hosts of
    a new lab are virtual machines where `vm` says so, each with the PCI devices `pci`, such as
    ``10de:20b5:0302``. Those of a `walled` lab reach nothing but a mirror host that it has
    besides. A lab stays what it is. New containers show what the recordings `gpus` of
    the GPU double have, host by host in turn, and say that they run the kernel of the release
    `kernel`. UsageError for arguments that cannot be met, FleetError where this machine cannot
    have a lab.
    """
    existing = state.load(name)
    wanted = sources.release(image or (existing.image if existing else DEFAULT_IMAGE))
    if existing and existing.image != wanted.name:
        raise UsageError(
            f"lab {name} runs {existing.image}, not {wanted.name}: "
            f"`fleet lab down --name {name}` first, or give another --name"
        )
    if existing and vm and not existing.vm:
        raise UsageError(
            f"lab {name} runs containers: "
            f"`fleet lab down --name {name}` first, or give another --name"
        )
    if existing and walled and not existing.walled:
        raise UsageError(
            f"lab {name} is not walled: "
            f"`fleet lab down --name {name}` first, or give another --name"
        )
    vm = existing.vm if existing else vm
    walled = existing.walled if existing else walled
    if vm and walled:
        raise UsageError("virtual machines cannot be walled: leave --vm or --walled out")
    if pci and not vm:
        raise UsageError("only virtual machines have PCI devices of their own: give --vm too")
    if (gpus or kernel) and vm:
        raise UsageError(
            "a virtual machine has a kernel of its own and no GPU double: leave --gpus and "
            "--kernel out, and give --pci for devices on its bus"
        )
    for each in gpus:
        from gpufleet.lab.gpu_double import recording  # needs YAML, a lab without GPUs does not

        recording.load(each)
    if kernel is not None and not _RELEASE.fullmatch(kernel):
        raise UsageError(f"--kernel {kernel}: no kernel release, such as 6.1.0-50-amd64")
    try:
        list(map(Device.parse, pci))
    except ValueError as error:
        raise UsageError(str(error)) from None
    if existing and pci and existing.pci != tuple(pci):
        raise UsageError(
            f"lab {name} has other PCI devices: "
            f"`fleet lab down --name {name}` first, or give another --name"
        )
    if not 1 <= hosts <= network.MOST_HOSTS:
        raise UsageError(f"a lab has 1 to {network.MOST_HOSTS} hosts, not {hosts}")
    if disk_mib is not None and disk_mib < _LEAST_DISK_MIB:
        raise UsageError(f"a host's disk has at least {_LEAST_DISK_MIB} MiB, not {disk_mib}")
    if disk_mib is not None and vm:
        raise UsageError(f"a virtual machine's disk has {disks.DISK_MIB} MiB: leave --disk-mib out")
    machine.require_root()
    machine.ensure_packages(wanted, progress)
    if vm:
        qemu.ensure_packages(progress)
    machine.require_kernel()
    if walled:
        mirrors.require_direct_way()
    root = Path(existing.image_root) if existing else _image(wanted, vm, progress)
    with locked(state.lab_directory(name), progress):
        lab = state.load(name) or _found(name, wanted, root, vm, walled, tuple(pci))
        # A smaller number takes no host away: that is what `down` is for.
        for number in range(len(lab.hosts) + 1, hosts + 1):
            shown = gpus[(number - 1) % len(gpus)] if gpus else None
            lab = lab.with_host(HostRecord(number, disk_mib, gpus=shown, kernel=kernel))
        state.save(lab)
        network.change_machine()
        behind = {each.number: lab.host_name(each) for each in lab.hosts} if lab.walled else {}
        network.ensure_bridge(lab.name, lab.subnet, behind)
        lab = _prepare_hosts(lab, progress)
        _boot_hosts(lab, progress)
        seen = _look(lab)
        if lab.walled:
            seen.mirror.furnish(progress)
        return seen


def _image(wanted: sources.Release, vm: bool, progress: Progress) -> Path:
    in_use = [Path(lab.image_root) for lab in map(state.load, state.names()) if lab]
    if vm:
        return disks.ensure(disks.recipe(wanted), in_use, progress)
    return images.ensure(images.recipe(wanted), in_use, progress)


def _found(
    name: str, wanted: sources.Release, root: Path, vm: bool, walled: bool, pci: tuple[str, ...]
) -> LabRecord:
    """A new lab with a network of its own, written down before any of it exists."""
    with locked(STATE):
        others = [lab for lab in map(state.load, state.names()) if lab]
        before = STATE / "machine.json"
        if not before.exists():
            state.write_whole(before, json.dumps(network.machine_settings()) + "\n")
        taken = network.networks_in_use() + [IPv4Network(lab.network) for lab in others]
        subnet = network.free_subnet(taken)
        lab = LabRecord(name, wanted.name, str(root), str(subnet.network), vm, pci)
        if walled:
            lab = lab.with_host(HostRecord(MIRROR))
        state.save(lab)
    return lab


def _prepare_hosts(lab: LabRecord, progress: Progress) -> LabRecord:
    """Give every new host its key and files, and write the exact known_hosts."""
    keys = lab.directory / "host_keys"
    keys.mkdir(mode=0o700, exist_ok=True)
    key_pair(lab.directory / "key", f"gpufleet lab {lab.name}")
    authorized = (lab.directory / "key.pub").read_text()
    new = [host for host in lab.every_host if not host.prepared]
    if new:
        _keep_archives(lab)
    seed = {path.name: path for path in _archives(lab).glob("*.deb")}

    def prepare(host: HostRecord) -> HostRecord:
        made = _host(lab, host)
        host_key = keys / made.name
        key_pair(host_key, f"root@{made.name}")
        made.remove()
        # What walled hosts install shall come from the mirror.
        made.prepare(host.disk_mib, host_key, authorized, {} if made.walled else seed)
        return replace(host, prepared=True)

    for host in _in_parallel(prepare, new, progress, "preparing"):
        lab = lab.with_host(host)
    known = []
    for host in lab.every_host:
        made = _host(lab, host)
        public = keys.joinpath(f"{made.name}.pub").read_text().split()
        known.append(f"{made.name},{made.address} {public[0]} {public[1]}\n")
    state.write_whole(lab.directory / "known_hosts", "".join(known))
    state.save(lab)
    return lab


def _boot_hosts(lab: LabRecord, progress: Progress) -> None:
    """Boot what does not run, and wait until every host lets us in."""
    given_up = threading.Event()
    seen = _look(lab)

    def boot(host: HostRecord) -> None:
        made = _host(lab, host)
        if made.running:
            made.reconnect()
        else:
            made.start(Path(lab.image_root))
        _await_login(seen, made, given_up)

    running = all(_host(lab, host).running for host in lab.every_host)
    _in_parallel(boot, lab.every_host, progress, "checking" if running else "booting", given_up)


def _await_login(lab: Lab, host: LabHost, given_up: threading.Event) -> None:
    deadline = time.monotonic() + host.boot_seconds
    complaint = "SSH does not answer"
    while not given_up.is_set():
        if not host.running:
            raise FleetError(
                f"{host.name} stopped while booting: {host.last_words()}; see {host.console}"
            )
        if _greets(str(host.address)):
            login = lab.run(host.name, "true", timeout=30)
            if login.returncode == 0:
                return
            complaint = login.stderr.strip().rpartition("\n")[2] or complaint
        if time.monotonic() > deadline:
            raise FleetError(
                f"{host.name} did not let us in within {host.boot_seconds:.0f} s ({complaint}); "
                f"see {host.console}"
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
                    lambda host: _host(lab, host).remove(), lab.every_host, progress, "stopping"
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
    for host in lab.every_host:
        archives = _host(lab, host).archives
        if host.disk_mib is not None or archives is None:
            continue  # a filesystem of its own: nothing to link from
        for archive in archives.glob("*.deb"):
            kept = cache / archive.name
            if archive.is_file() and not archive.is_symlink() and not kept.exists():
                os.link(archive, kept)
