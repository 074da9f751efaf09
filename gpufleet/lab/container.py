"""One lab host: an overlay on the image, booted by systemd-nspawn in a control group of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from gpufleet.errors import FleetError
from gpufleet.lab import network
from gpufleet.lab.host import STOP_SECONDS, LabHost, kernel_lines
from gpufleet.lab.machine import mounts_below, remove_tree, run, unmount_below
from gpufleet.lab.network import Subnet

_PROPAGATED = Path("/run/systemd/nspawn/propagate")
#: Its locks are named after the folder's filesystem and inode, and outlive one that was killed.
_LOCKS = Path("/run/systemd/nspawn/locks")

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

# Containers share this machine's kernel: one that shall say it runs another has its uname diverted,
# which upgrades of the package respect. $1 release.
_DIVERT = r"""set -e
for path in /bin/uname /usr/bin/uname; do
    dpkg-query -S "$path" >/dev/null 2>&1 || continue
    dpkg-divert --quiet --local --rename --divert "$path.machine" --add "$path"
done
cat > /usr/bin/uname <<END
#!/bin/sh
# Written by fleet lab up --kernel: the release of the kernel that this host says it runs.
said=\$(/usr/bin/uname.machine "\$@") || exit
real=\$(/usr/bin/uname.machine -r)
case \$said in
    *"\$real"*) printf '%s\n' "\${said%%"\$real"*}$1\${said#*"\$real"}";;
    *) printf '%s\n' "\$said";;
esac
END
chmod 755 /usr/bin/uname
"""

_NSPAWN_SETTINGS = {
    # Hosts see cgroup2 alone, as servers do, even where this machine mixes both versions.
    "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
    # The network namespace is the host's own: so are its settings.
    "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network",
}


class Container(LabHost):
    """A host that shares this machine's kernel."""

    # It answers after 1 s; software emulation or a crowded machine needs much longer.
    boot_seconds = 90.0

    def __init__(
        self,
        name: str,
        directory: Path,
        subnet: Subnet,
        number: int,
        *,
        gpus: str | None = None,
        kernel: str | None = None,
        walled: bool = False,
    ) -> None:
        """`gpus` names a recording of the GPU double, `kernel` the release that uname tells.

        A `walled` host reaches nothing but the mirror host of its lab.
        """
        super().__init__(name, directory, subnet, number, walled=walled)
        self.root = directory / "root"
        self._gpus, self._kernel = gpus, kernel
        self._disk = directory / "disk"

    @property
    def _files(self) -> Path:
        """What the host has written: where its overlay's upper layer is."""
        return self._disk / "files"

    @property
    def archives(self) -> Path:
        """Where its apt keeps what it downloaded, seen in its upper layer."""
        return self._files / "var/cache/apt/archives"

    def prepare(
        self,
        disk_mib: int | None,
        host_key: Path,
        authorized_key: str,
        seed: Mapping[str, Path],
    ) -> None:
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
        for path, (text, mode) in self._own_files(host_key, authorized_key).items():
            self._write(path, text, mode)
        (self._files / "root").chmod(0o700)
        (self._files / "root/.ssh").chmod(0o700)
        if self._gpus is not None:
            from gpufleet.lab.gpu_double import recording

            recording.lay(self._gpus, self._files)
        if disk_mib is None:
            self.archives.mkdir(parents=True)
            for name, archive in seed.items():
                os.link(archive, self.archives / name)

    def _write(self, path: str, text: str, mode: int) -> None:
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

    def start(self, image: Path) -> None:
        """Mount, connect and boot; returns at once, while the host boots on."""
        self.clean()
        if not image.is_dir():
            raise FleetError(
                f"{self.name}: its image {image} is gone: `fleet lab down`, then up again"
            )
        self._mount_disk()
        if not mounts_below(self.root):
            self._mount_root(image)
        if self._kernel is not None:
            run("chroot", self.root, "sh", "-c", _DIVERT, "sh", self._kernel)
        network.make_host_network(self.name, self.subnet, self.number, self.walled)
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
        deadline = time.monotonic() + STOP_SECONDS
        while not self.running:
            if time.monotonic() > deadline:
                raise FleetError(f"{self.name} did not start: {self.last_words()}")
            time.sleep(0.01)

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
        deadline = time.monotonic() + STOP_SECONDS
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
        inside = (one for one in self._groups() if "payload" in one.parts)
        for group in inside:
            for pid in kernel_lines(group / "cgroup.procs"):
                status = kernel_lines(Path("/proc", pid, "status"))
                if any(line.split()[2:] == ["1"] for line in status if line.startswith("NSpid:")):
                    return int(pid)
        return None

    def clean(self) -> None:
        """Remove what a run of the host leaves on this machine; its filesystem stays."""
        super().clean()
        propagated = _PROPAGATED / f"gpufleet-{self.name}"
        if propagated.exists():
            propagated.rmdir()
        if self.root in mounts_below(self.root):
            root = self.root.stat()
            (_LOCKS / f"inode-{root.st_dev}:{root.st_ino}").unlink(missing_ok=True)


def key_pair(path: Path, comment: str) -> None:
    """An ed25519 key at `path` and its public half beside it, unless they are there."""
    if not path.with_suffix(".pub").exists():
        path.unlink(missing_ok=True)
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", path)
