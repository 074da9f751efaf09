"""One lab host: an overlay on the image, booted by systemd-nspawn in a control group of its own."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from gpufleet.errors import FleetError
from gpufleet.lab import network, trust
from gpufleet.lab.machine import (
    cgroup_root,
    mounts_below,
    remove_tree,
    run,
    unmount_below,
)
from gpufleet.lab.network import Subnet

_PROPAGATED = Path("/run/systemd/nspawn/propagate")
# An init that was asked to stop gets this long; 0.2 s is usual.
_STOP_SECONDS = 10.0

# The supervisor runs in one group, each boot in a new one, since nspawn divides it and a divided
# group takes no process. A boot ends with its nspawn, even one that was killed (cgroup.kill is
# Linux 5.14's). 133 is nspawn's word for: the host rebooted, start it again.
_SUPERVISE = """
cgroup=$1; shift
echo $$ > "$cgroup/supervisor/cgroup.procs" || exit
boot=0
while boot=$((boot + 1)); do
    mkdir "$cgroup/boot-$boot" || exit
    sh -c 'echo $$ > "$0/cgroup.procs" && exec "$@"' "$cgroup/boot-$boot" "$@"
    status=$?
    [ ! -e "$cgroup/boot-$boot/cgroup.kill" ] || echo 1 > "$cgroup/boot-$boot/cgroup.kill"
    [ $status = 133 ] || exit $status
done
"""

_NSPAWN_SETTINGS = {
    # Hosts see cgroup2 alone, as servers do, even where this machine mixes both versions.
    "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
    # The network namespace is the host's own: so are its settings.
    "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network",
}


class Container:
    """A host by its name and directory; it may run, be stopped, or not exist yet."""

    def __init__(self, name: str, directory: Path, subnet: Subnet, number: int) -> None:
        self.name = name
        self.directory = directory
        self.subnet = subnet
        self.number = number
        self.address = subnet.address(number)
        self.root = directory / "root"
        self.console = directory / "console.log"
        self._disk = directory / "disk"
        self._cgroup = cgroup_root() / f"gpufleet-{name}"

    @property
    def _files(self) -> Path:
        """What the host has written: where its overlay's upper layer is."""
        return self._disk / "files"

    @property
    def archives(self) -> Path:
        """Where its apt keeps what it downloaded, seen in its upper layer."""
        return self._files / "var/cache/apt/archives"

    @property
    def running(self) -> bool:
        """Whether any process of the host, or its supervisor, is alive."""
        try:
            return "populated 1" in (self._cgroup / "cgroup.events").read_text()
        except FileNotFoundError:
            return False

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
        unmount_below(self.directory)
        remove_tree(self.directory)
        self._disk.mkdir(parents=True)
        self.root.mkdir()
        if disk_mib is not None:
            disk = self.directory / "disk.img"
            with disk.open("wb") as file:
                file.truncate(disk_mib * 2**20)
            run("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", disk)
        self._mount_disk()
        files = {
            "etc/hostname": f"{self.name}\n",
            "etc/hosts": f"127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {self.name}\n",
            "etc/machine-id": f"{uuid.uuid4().hex}\n",
            "etc/resolv.conf": "".join(f"nameserver {ip}\n" for ip in network.name_servers()),
            "etc/environment": self._environment(),
            "root/.ssh/authorized_keys": authorized_key,
        }
        options = trust.apt_options()
        if options:
            files["etc/apt/apt.conf.d/90operator"] = "".join(f"{option}\n" for option in options)
        for path, text in files.items():
            self._write(path, trust.seen_from_host(text, self.subnet.gateway))
        self._write("etc/ssh/ssh_host_ed25519_key", host_key.read_text(), 0o600)
        public = host_key.with_suffix(".pub").read_text()
        self._write("etc/ssh/ssh_host_ed25519_key.pub", public)
        (self._files / "root").chmod(0o700)
        (self._files / "root/.ssh").chmod(0o700)
        if disk_mib is None:
            self.archives.mkdir(parents=True)
            for name, archive in seed.items():
                os.link(archive, self.archives / name)

    def _environment(self) -> str:
        variables = trust.proxy_variables()
        if variables:
            exempt = f"{variables.get('no_proxy', 'localhost,127.0.0.1')},{self.subnet.network}"
            variables |= {"no_proxy": exempt, "NO_PROXY": exempt}
        return "".join(f'{name}="{value}"\n' for name, value in variables.items())

    def _write(self, path: str, text: str, mode: int = 0o644) -> None:
        target = self._files / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(mode)

    def _mount_disk(self) -> None:
        image = self.directory / "disk.img"
        if image.exists() and self._disk not in mounts_below(self._disk):
            run("mount", "-o", "loop", image, self._disk)
        for part in ("files", "work"):
            (self._disk / part).mkdir(exist_ok=True)

    def _mount_root(self, image_root: Path) -> None:
        layers = f"lowerdir={image_root},upperdir={self._files},workdir={self._disk / 'work'}"
        try:
            run("mount", "-t", "overlay", f"gpufleet-{self.name}", "-o", layers, self.root)
        except FleetError:
            below = run("stat", "-f", "-c", "%T", self._disk).strip()
            raise FleetError(
                f"{self.name}: the {below} filesystem under {self._disk} cannot carry an overlay "
                "(a container's own cannot): mount a disk at /var/lib/gpufleet, or give --disk-mib"
            ) from None

    def start(self, image_root: Path) -> None:
        """Mount, connect and boot; returns at once, while the host boots on."""
        self.clean()
        if not image_root.is_dir():
            raise FleetError(
                f"{self.name}: its image {image_root} is gone: `fleet lab down`, then up again"
            )
        self._mount_disk()
        if not mounts_below(self.root):
            self._mount_root(image_root)
        network.make_host_network(self.name, self.subnet, self.number)
        (self._cgroup / "supervisor").mkdir(parents=True)
        self._delegate()
        with self.console.open("a") as console:
            # setsid forks: the host belongs to nobody's session and outlives this command.
            supervisor = ("setsid", "--fork", "sh", "-c", _SUPERVISE, "sh", str(self._cgroup))
            subprocess.run(
                [*supervisor, *self._boot_command()],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                cwd="/",
                env={"PATH": os.environ["PATH"], **_NSPAWN_SETTINGS},
                check=True,
            )
        deadline = time.monotonic() + _STOP_SECONDS
        while not self.running:
            if time.monotonic() > deadline:
                raise FleetError(f"{self.name} did not start: {self.last_words()}")
            time.sleep(0.01)

    def reconnect(self) -> None:
        """Plug a running host into its bridge, which may have been made anew."""
        network.connect_host(self.subnet, self.number)

    def _delegate(self) -> None:
        """Pass on to the host the controllers that this machine gives its groups."""
        for controller in (self._cgroup / "cgroup.controllers").read_text().split():
            (self._cgroup / "cgroup.subtree_control").write_text(f"+{controller}")

    def _boot_command(self) -> list[str]:
        namespace = network.namespace(self.name)
        return [
            # nspawn mounts /sys before it enters the namespace, and /sys shows the links of where
            # it was mounted: so it is started in there.
            *("nsenter", f"--net={namespace}"),
            *("systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit"),
            *("--settings=no", "--resolv-conf=off", "--timezone=off", "--link-journal=no"),
            *("--capability=CAP_NET_ADMIN", "--console=read-only", f"--directory={self.root}"),
            *(f"--machine=gpufleet-{self.name}", f"--hostname={self.name}"),
            f"--network-namespace-path={namespace}",
        ]

    def stop(self) -> None:
        """Ask the host's init to power off, and kill what is left after a while."""
        deadline = time.monotonic() + _STOP_SECONDS
        while (init := self._init()) is not None and time.monotonic() < deadline:
            # Asked again and again: an init that is still booting does not listen yet.
            self._ask_to_power_off(init)
            for _ in range(25):
                if not self.running:
                    return
                time.sleep(0.02)
        self._kill()

    def _ask_to_power_off(self, init: int) -> None:
        try:
            held = os.pidfd_open(init)
        except ProcessLookupError:
            return
        try:
            # Still ours now that the descriptor pins it: the number was not given to another.
            if self._init() == init:
                signal.pidfd_send_signal(held, signal.SIGRTMIN + 3)
        except ProcessLookupError:
            return
        finally:
            os.close(held)

    def _init(self) -> int | None:
        """The process that is PID 1 in the host, by this machine's number."""
        for listed in self._cgroup.glob("boot-*/payload/**/cgroup.procs"):
            for pid in _lines(listed):
                status = _lines(Path("/proc", pid, "status"))
                if any(line.split()[2:] == ["1"] for line in status if line.startswith("NSpid:")):
                    return int(pid)
        return None

    def _kill(self) -> None:
        """End every process of the host's own control group, and no other."""
        deadline = time.monotonic() + _STOP_SECONDS
        while self.running:
            if time.monotonic() > deadline:
                raise FleetError(f"{self.name}: its processes do not end; see {self._cgroup}")
            try:
                (self._cgroup / "cgroup.kill").write_text("1")
            except FileNotFoundError:  # Linux before 5.14
                self._kill_each()
            time.sleep(0.02)

    def _kill_each(self) -> None:
        for listed in self._cgroup.rglob("cgroup.procs"):
            for pid in _lines(listed):
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def clean(self) -> None:
        """Remove what a run of the host leaves on this machine; its filesystem stays."""
        self._remove_cgroup()
        network.remove_host_network(self.name, self.subnet, self.number)
        propagated = _PROPAGATED / f"gpufleet-{self.name}"
        if propagated.exists():
            propagated.rmdir()

    def _remove_cgroup(self) -> None:
        while self._cgroup.exists():
            self._kill()
            try:
                for group, _, _ in os.walk(self._cgroup, topdown=False):
                    os.rmdir(group)
            except OSError as error:
                # A supervisor whose starter was killed may enter just now.
                if error.errno != errno.EBUSY:
                    raise

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


def _lines(path: Path) -> list[str]:
    """The lines of a file of the kernel, none when what it told of has ended."""
    try:
        return path.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return []
    except OSError as error:
        if error.errno == errno.ENODEV:  # a control group that was just removed
            return []
        raise


def key_pair(path: Path, comment: str) -> None:
    """An ed25519 key at `path` and its public half beside it, unless they are there."""
    if not path.with_suffix(".pub").exists():
        path.unlink(missing_ok=True)
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", path)
