"""What containers and virtual machines share: the files of one host, a control group, an end."""

from __future__ import annotations

import errno
import os
import signal
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from gpufleet.errors import FleetError
from gpufleet.lab import network, trust
from gpufleet.lab.machine import cgroup_root, remove_tree, unmount_below
from gpufleet.lab.network import Subnet

#: An init that was asked to stop, or a process that was killed, gets this long; 0.2 s is usual.
STOP_SECONDS = 10.0


class LabHost(ABC):
    """A host by its name and directory; it may run, be stopped, or not exist yet."""

    #: How long it may take from its start until SSH answers.
    boot_seconds: ClassVar[float]

    def __init__(
        self, name: str, directory: Path, subnet: Subnet, number: int, *, walled: bool = False
    ) -> None:
        """A `walled` host reaches nothing but the mirror host of its lab."""
        self.walled = walled
        self.name = name
        self.directory = directory
        self.subnet = subnet
        self.number = number
        self.address = subnet.address(number)
        self.console = directory / "console.log"
        self._cgroup = cgroup_root() / f"gpufleet-{name}"

    @property
    def archives(self) -> Path | None:
        """Where its apt keeps what it downloaded, if this machine can see it."""
        return None

    @abstractmethod
    def prepare(
        self,
        disk_mib: int | None,
        host_key: Path,
        authorized_key: str,
        seed: Mapping[str, Path],
    ) -> None:
        """Lay down an empty disk and what differs from host to host, anew if it was half done.

        `seed` are package archives by name that the host need not download.
        """

    @abstractmethod
    def start(self, image: Path) -> None:
        """Connect and boot; returns at once, while the host boots on."""

    @property
    def running(self) -> bool:
        """Whether any process of the host, or its supervisor, is alive."""
        try:
            return "populated 1" in (self._cgroup / "cgroup.events").read_text()
        except FileNotFoundError:
            return False

    def reconnect(self) -> None:
        """Plug a running host into its bridge, which may have been made anew."""
        network.connect_host(self.subnet, self.number)

    def stop(self) -> None:
        """End the host, in order where its kind has one."""
        self._kill()

    def clean(self) -> None:
        """Remove what a run of the host leaves on this machine; its filesystem stays."""
        self._remove_cgroup()
        network.remove_host_network(self.name, self.subnet, self.number)

    def remove(self) -> None:
        """Stop the host and remove everything it has on this machine."""
        self.stop()
        self.clean()
        unmount_below(self.directory)
        remove_tree(self.directory)

    def last_words(self) -> str:
        """The last line of its console, for an error message."""
        if not self.console.exists():
            return "it never started"
        lines = self.console.read_text(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else "its console is silent"

    def _own_files(self, host_key: Path, authorized_key: str) -> dict[str, tuple[str, int]]:
        """What differs from host to host: path below the root -> text and mode."""
        known = f"127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {self.name}\n"
        if not self.walled:
            servers = "".join(f"nameserver {ip}\n" for ip in network.name_servers())
        else:
            known += f"{self.subnet.mirror} {' '.join(network.MIRROR_NAMES)}\n"
            # Nobody answers there: who asks for any other name is counted as a stray.
            servers = f"nameserver {self.subnet.gateway}\noptions timeout:1 attempts:1\n"
        files = {
            "etc/hostname": f"{self.name}\n",
            "etc/hosts": known,
            "etc/machine-id": f"{uuid.uuid4().hex}\n",
            "etc/resolv.conf": servers,
            "etc/environment": self._environment(),
            "root/.ssh/authorized_keys": authorized_key,
        }
        options = trust.apt_options()
        if options:
            files["etc/apt/apt.conf.d/90operator"] = "".join(f"{option}\n" for option in options)
        if self.walled:
            # It would ask for its server's SRV record first, and nobody answers for names.
            files["etc/apt/apt.conf.d/91walled"] = 'Acquire::EnableSrvRecords "false";\n'
        gateway = self.subnet.gateway
        own = {path: (trust.seen_from_host(text, gateway), 0o644) for path, text in files.items()}
        return own | {
            "etc/ssh/ssh_host_ed25519_key": (host_key.read_text(), 0o600),
            "etc/ssh/ssh_host_ed25519_key.pub": (host_key.with_suffix(".pub").read_text(), 0o644),
        }

    def _environment(self) -> str:
        variables = trust.proxy_variables()
        if variables:
            exempt = f"{variables.get('no_proxy', 'localhost,127.0.0.1')},{self.subnet.network}"
            variables |= {"no_proxy": exempt, "NO_PROXY": exempt}
        return "".join(f'{name}="{value}"\n' for name, value in variables.items())

    def _kill(self) -> None:
        """End every process of the host's own control group, and no other."""
        deadline = time.monotonic() + STOP_SECONDS
        while self.running:
            if time.monotonic() > deadline:
                raise FleetError(f"{self.name}: its processes do not end; see {self._cgroup}")
            try:
                (self._cgroup / "cgroup.kill").write_text("1")
            except FileNotFoundError:  # Linux before 5.14
                self._kill_each()
            time.sleep(0.02)

    def _kill_each(self) -> None:
        for group in self._groups():
            for pid in kernel_lines(group / "cgroup.procs"):
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def _groups(self) -> Iterator[Path]:
        """The host's control groups, the outermost first; any may vanish at any time."""
        # Not pathlib's glob, which raises for a folder that goes while it looks.
        for group, _, _ in os.walk(self._cgroup):
            yield Path(group)

    def _remove_cgroup(self) -> None:
        while self._cgroup.exists():
            self._kill()
            try:
                for group, _, _ in os.walk(self._cgroup, topdown=False):
                    os.rmdir(group)
            except OSError as error:
                # A supervisor whose starter was killed may enter just now, or leave.
                if error.errno not in (errno.EBUSY, errno.ENOENT):
                    raise


def kernel_lines(path: Path) -> list[str]:
    """The lines of a file of the kernel, none when what it told of has ended."""
    try:
        return path.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return []
    except OSError as error:
        if error.errno == errno.ENODEV:  # a control group that was just removed
            return []
        raise
