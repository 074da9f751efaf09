"""One lab host that is a virtual machine: a kernel, a GRUB and reboots of its own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpufleet.errors import FleetError
from gpufleet.lab import network, pci, qemu
from gpufleet.lab.host import LabHost
from gpufleet.lab.machine import remove_tree, run
from gpufleet.lab.network import Subnet

# /root belongs to root alone, and sshd insists on it.
_FOLDERS = {"root": 0o700, "root/.ssh": 0o700}


class VirtualMachine(LabHost):
    """A host in QEMU: its disk holds what differs from the base disk of its image."""

    # Under software emulation it answers after 25 s; four on two processors need four times that.
    boot_seconds = 600.0

    def __init__(
        self, name: str, directory: Path, subnet: Subnet, number: int, devices: Sequence[str] = ()
    ) -> None:
        super().__init__(name, directory, subnet, number)
        self._devices = devices

    @property
    def _disk(self) -> Path:
        return self.directory / "disk.qcow2"

    @property
    def _given(self) -> Path:
        """The files that are its own, read by it when it boots for the first time."""
        return self.directory / "host.tar"

    def prepare(
        self,
        disk_mib: int | None,
        host_key: Path,
        authorized_key: str,
        seed: Mapping[str, Path],
    ) -> None:
        remove_tree(self.directory)
        self.directory.mkdir(parents=True)
        files = self._own_files(host_key, authorized_key)
        # PID 1 makes one up and keeps it, before any file can be given to it.
        del files["etc/machine-id"]
        files["etc/systemd/network/10-lab.network"] = (self._link_settings(), 0o644)
        now = time.time()
        self._given.touch(0o600)
        with tarfile.open(self._given, "w") as tar:
            for folder, mode in _FOLDERS.items():
                member = tarfile.TarInfo(folder)
                member.type, member.mode, member.mtime = tarfile.DIRTYPE, mode, now
                tar.addfile(member)
            for path, (text, mode) in files.items():
                member, data = tarfile.TarInfo(path), text.encode()
                member.size, member.mode, member.mtime = len(data), mode, now
                tar.addfile(member, io.BytesIO(data))

    def _link_settings(self) -> str:
        """The file of systemd-networkd, with the address that a container would have."""
        mtu = network.link_mtu(self.subnet.bridge) or 1500
        prefix = self.subnet.network.prefixlen
        return (
            "[Match]\nType=ether\n\n"
            f"[Link]\nMTUBytes={mtu}\n\n"
            f"[Network]\nAddress={self.address}/{prefix}\nGateway={self.subnet.gateway}\n"
            "LinkLocalAddressing=no\nIPv6AcceptRA=no\n"
        )

    def start(self, image: Path) -> None:
        """Connect and boot; returns at once, while the host boots on."""
        self.clean()
        if not image.is_file():
            raise FleetError(
                f"{self.name}: its base disk {image} is gone: `fleet lab down`, then up again"
            )
        if not self._disk.exists():
            new = self._disk.with_suffix(".new")
            run("qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "raw", new)
            new.rename(self._disk)
        network.make_host_tap(self.subnet, self.number)
        self._cgroup.mkdir(parents=True)
        done = subprocess.run(
            [
                "sh",
                "-c",
                'echo $$ > "$0/cgroup.procs" && exec "$@"',
                self._cgroup,
                *self._command(),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd="/",
            env={"PATH": os.environ["PATH"]},
            # Ctrl-C is for this command: what it started is taken down with the lab.
            start_new_session=True,
            check=False,
        )
        if done.returncode:
            said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()
            raise FleetError(f"{self.name} did not start: {said[-1].strip()}")

    def _command(self) -> list[str]:
        beside = [sys.executable, "-I", pci.__file__, *self._devices, "--"]
        return [
            *(beside if self._devices else []),
            *qemu.machine(self.name, shared=bool(self._devices)),
            *qemu.disk(self._disk, "qcow2"),
            *qemu.link(self.subnet.link(self.number), network.hardware_address(self.address)),
            *qemu.console(self.console),
            *qemu.given("host", self._given),
            # Returns once the machine is made, with an error where it cannot be.
            "-daemonize",
        ]
