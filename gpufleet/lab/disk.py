"""The base disks of virtual machines: a server as its installer leaves it, kernel and GRUB too."""

from __future__ import annotations

import json
import os
import re
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from gpufleet.errors import FleetError
from gpufleet.lab import image, qemu
from gpufleet.lab.machine import Progress, remove_tree, run, say_nothing
from gpufleet.lab.sources import Release

#: Sparse: a fresh host takes about 1 GiB of it, and its own disk only what it writes.
DISK_MIB = 8192
# Where partitions start since disks have 4096-byte sectors; GRUB's core lies before it.
_START_MIB = 1

# The smallest kernel of each distribution that boots here, with its headers, and what boots it.
_KERNELS = {
    "debian": ("linux-image-cloud-amd64", "linux-headers-cloud-amd64"),
    "ubuntu": ("linux-image-virtual", "linux-headers-virtual"),
}
_BOOT_PACKAGES = ("grub-pc", "initramfs-tools", "zstd", "e2fsprogs", "systemd-timesyncd")
# A compiler and all that comes with it: under software emulation it takes minutes to install.
_COMPILER = ("dkms",)

# What ext4 has had since Linux 3.18, whatever this machine's own mkfs would choose: the image's
# GRUB and fsck must know all of it.
_MKE2FS = """
[defaults]
    base_features = sparse_super,large_file,filetype,resize_inode,dir_index,ext_attr
    default_mntopts = acl,user_xattr
    blocksize = 4096
    inode_size = 256
[fs_types]
    ext4 = {
        features = has_journal,extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize
    }
"""

# Read when a host boots for the first time: files that QEMU hands over, no disk of their own.
_UNIT = """\
[Unit]
Description=Files of this lab host
DefaultDependencies=no
ConditionPathExists=!/etc/ssh/ssh_host_ed25519_key
After=systemd-remount-fs.service
Before=sysinit.target systemd-networkd.service systemd-resolved.service

[Service]
Type=oneshot
ExecStart=/sbin/modprobe qemu_fw_cfg
ExecStart=/bin/tar -xf /sys/firmware/qemu_fw_cfg/by_name/opt/gpufleet/host/raw -C /
ExecStart=/bin/hostname -F /etc/hostname

[Install]
WantedBy=sysinit.target
"""

# No menu to wait at, and all that a kernel says on the console that this machine keeps. Guarding
# against flaws of processors costs most where there is none: under software emulation.
_GRUB = """\
GRUB_TIMEOUT=0
GRUB_RECORDFAIL_TIMEOUT=0
GRUB_CMDLINE_LINUX_DEFAULT=""
GRUB_CMDLINE_LINUX="console=tty0 console=ttyS0 mitigations=off"
"""

# An initrd of just what this machine needs. To make one takes a thousand processes, and each of
# them is slow under software emulation: with the modules listed it takes a third of the time.
_INITRAMFS = {
    "etc/initramfs-tools/conf.d/driver-policy": "MODULES=list\n",
    "etc/initramfs-tools/modules": "virtio_pci\nvirtio_blk\next4\n",
}

_INSTALLED = "gpufleet: GRUB is installed"
# PID 1 of the only boot that needs no GRUB; where it ends in any way but its own, the kernel
# panics. It goes on from memory, since a filesystem with a deleted open file stays writable.
_INSTALL = f"""\
#!/bin/sh -e
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
if [ "$0" = /install-grub ]; then
    mv "$0" /run/
    exec sh -e /run/install-grub
fi
update-initramfs -u
grub-install --target=i386-pc /dev/vda
update-grub
mount -o remount,ro /
echo "{_INSTALLED}" > /dev/ttyS0
echo o > /proc/sysrq-trigger
sleep 60
"""
_INSTALL_SECONDS = 400.0


@dataclass(frozen=True)
class Recipe:
    """All that decides what a base disk holds; another recipe is another disk."""

    root: image.Recipe
    size_mib: int = DISK_MIB
    # Raised when what this module writes changes, so that cached disks are made anew.
    revision: int = 1

    @property
    def directory(self) -> Path:
        """Where the disk is kept once it is made."""
        texts = (self.root.directory.name, str(self.size_mib), str(self.revision))
        digest = sha256(json.dumps(texts).encode()).hexdigest()[:12]
        release = self.root.release
        return image.IMAGES / f"vm-{release.distribution}-{release.version}-{digest}"


def recipe(release: Release) -> Recipe:
    """The recipe of `release`'s disk on this machine."""
    root = image.recipe(release)
    kernel = _KERNELS[release.distribution]
    return Recipe(replace(root, packages=(*root.packages, *kernel, *_BOOT_PACKAGES, *_COMPILER)))


def ensure(wanted: Recipe, in_use: Sequence[Path] = (), progress: Progress = say_nothing) -> Path:
    """The base disk of `wanted`, a raw file that is never written again; made when not there.

    Raises FleetError as image.ensure does, and where GRUB cannot be installed.
    """
    return image.kept(
        wanted.directory,
        "disk.img",
        lambda building: _make(wanted, building, progress),
        in_use,
        progress,
    )


def _make(wanted: Recipe, building: Path, progress: Progress) -> None:
    image.build(wanted.root, building, progress)
    root, disk = building / "root", building / "disk.img"
    progress(f"{wanted.root.release.name} disk: filling it", 0.97)
    identity = str(uuid.uuid4())
    _finish(root, identity)
    _partition(disk, wanted.size_mib)
    _fill(disk, wanted.size_mib, root, identity)
    progress(f"{wanted.root.release.name} disk: installing GRUB", 0.98)
    _install_grub(disk, root, identity)
    remove_tree(root)


def _finish(root: Path, identity: str) -> None:
    """What differs from a container."""
    files = {
        "etc/fstab": f"UUID={identity} / ext4 errors=remount-ro 0 1\n",
        "etc/default/grub.d/lab.cfg": _GRUB,
        **_INITRAMFS,
        "etc/systemd/system/gpufleet-lab.service": _UNIT,
        "install-grub": _INSTALL,
    }
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    (root / "install-grub").chmod(0o755)
    run("systemctl", f"--root={root}", "enable", "--quiet", "systemd-networkd", "gpufleet-lab")
    # Where an upgrade of GRUB puts itself.
    answers = (
        "grub-pc grub-pc/install_devices multiselect /dev/vda\n"
        "grub-pc grub-pc/install_devices_empty boolean false\n"
    )
    run("chroot", root, "debconf-set-selections", given=answers)


def _partition(disk: Path, size_mib: int) -> None:
    with disk.open("wb") as file:
        file.truncate(size_mib * 2**20)
    run("sfdisk", "--quiet", disk, given=f"label: dos\nstart={_START_MIB}MiB, type=83, bootable\n")


def _fill(disk: Path, size_mib: int, root: Path, identity: str) -> None:
    configuration = disk.with_name("mke2fs.conf")
    configuration.write_text(_MKE2FS)
    run(
        *("env", f"MKE2FS_CONFIG={configuration}", "mkfs.ext4", "-q", "-F", "-U", identity),
        *("-E", f"offset={_START_MIB * 2**20},root_owner=0:0", "-d", root, disk),
        f"{size_mib - _START_MIB}M",
    )
    configuration.unlink()


def _install_grub(disk: Path, root: Path, identity: str) -> None:
    """Boot the disk once without GRUB, so that its own GRUB installs itself from inside."""
    kernel = max((root / "boot").glob("vmlinuz-*"), key=lambda path: _numbers(path.name))
    initrd = kernel.with_name(kernel.name.replace("vmlinuz", "initrd.img"))
    arguments = f"root=UUID={identity} rw console=ttyS0 init=/install-grub panic=-1"
    console = disk.with_name("install-grub.log")
    command = [
        *qemu.machine(f"install-{disk.parent.name}"),
        *qemu.disk(disk, "raw"),
        *qemu.console(console),
        *("-no-reboot", "-kernel", str(kernel), "-initrd", str(initrd), "-append", arguments),
    ]
    try:
        done = subprocess.run(
            # Dies with us, so that nothing boots on when we are killed.
            ["setpriv", "--pdeathsig", "KILL", *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_INSTALL_SECONDS,
            start_new_session=True,
            env={"PATH": os.environ["PATH"]},
            check=False,
        )
        said = done.stderr.strip()
    except subprocess.TimeoutExpired:
        said = f"no end after {_INSTALL_SECONDS:.0f} s"
    words = console.read_text(errors="replace") if console.exists() else ""
    if _INSTALLED not in words:
        kept = image.IMAGES / "install-grub.log"
        kept.write_text(words)
        last = (words.strip() or said or "QEMU said nothing").splitlines()[-1].strip()
        raise FleetError(f"cannot install GRUB on the base disk: {said or last}; see {kept}")


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]
