"""What a host's kernels are: a value that every decision about kernel and driver starts from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gpufleet.managed.plan import Files

Family = Literal["debian", "rhel", "other"]


@dataclass(frozen=True)
class Module:
    """The NVIDIA module that modprobe would load for one kernel, as modinfo tells."""

    name: str
    """nvidia, or nvidia-current where Debian built it."""
    version: str
    vermagic: str
    license: str
    """`Dual MIT/GPL` is the open flavour, `NVIDIA` the proprietary one."""
    signer: str
    """Who signed it, empty if nobody did."""


@dataclass(frozen=True)
class Kernel:
    """One installed kernel: /boot/vmlinuz-RELEASE is there."""

    release: str
    """As `uname -r` prints it once it runs."""
    headers: bool
    """/lib/modules/RELEASE/build/include is there, so that a module can be built for it."""
    initrd_bytes: int | None
    """Size of its initrd; None where there is none."""
    nouveau_in_initrd: bool
    module: Module | None
    dkms: tuple[tuple[str, str], ...] = ()
    """(MODULE/VERSION, state) of `dkms status -k RELEASE` for NVIDIA's modules, such as
    ("nvidia-current/535.247.01", "installed")."""
    dkms_error: str = ""
    """The line of make.log that says why the last build failed, empty if none failed."""


@dataclass(frozen=True)
class NextBoot:
    """The kernel that the next reboot starts, and how that is known."""

    release: str | None
    """None where nothing on the host tells."""
    reason: str
    """Such as `grubenv next_entry` or `first entry of grub.cfg`."""


@dataclass(frozen=True)
class Package:
    """A package as dpkg (or rpm) has it."""

    name: str
    version: str
    source: str
    want: str
    """dpkg's Status-Want: install, hold, deinstall …"""
    status: str
    """dpkg's Status-Status: installed, half-configured, not-installed …"""

    @property
    def installed(self) -> bool:
        return self.status == "installed"

    @property
    def held(self) -> bool:
        """Held in force: a hold on a package that is not installed protects nothing."""
        return self.want == "hold" and self.installed


@dataclass(frozen=True)
class Grub:
    """How GRUB is set up; `present` is False in a container or under another boot loader."""

    present: bool
    default: str = ""
    """The effective GRUB_DEFAULT: /etc/default/grub, then grub.d/*.cfg in their order."""
    dropins: tuple[str, ...] = ()
    """Files of /etc/default/grub.d that set GRUB_DEFAULT, in the order they are read."""
    entries: tuple[tuple[str, str], ...] = ()
    """(id path such as `gnulinux-advanced-U>gnulinux-K-advanced-U`, release) in grub.cfg's order,
    recovery entries left out."""
    saved_entry: str = ""
    next_entry: str = ""
    env_writable: bool = False
    """Whether GRUB itself can clear next_entry: not on LVM, RAID, btrfs or zfs. Where it cannot, a
    trial boot would be repeated at every boot."""
    written: str = ""
    """The default that grub.cfg has, which is `default` as it was when grub.cfg was last made."""
    boots: str = ""
    """The release that `written` boots where next_entry is not set; empty if none is known."""
    boots_reason: str = ""
    next_boots: tuple[str, bool] = ("", False)
    """The release that next_entry boots, and whether next_entry names an entry at all."""


@dataclass(frozen=True)
class KernelPicture:
    """Everything about a host's kernels, read by one script in one round trip."""

    family: Family
    os: str
    """os-release ID."""
    os_version: str
    running: str
    boot_id: str
    kernels: tuple[Kernel, ...]
    next_boot: NextBoot
    grub: Grub
    boot_free_kib: int
    secure_boot: bool
    packages: tuple[Package, ...]
    """Installed or half-installed packages of kernel, headers and driver."""
    holds: frozenset[str]
    """What `apt-mark showhold` (or `dnf versionlock list`) lists, in force or not."""
    preferences: tuple[tuple[str, str], ...] = ()
    """(file, text) of apt preferences that name kernel or driver packages."""
    unattended: tuple[tuple[str, str], ...] = ()
    """(option, value) of apt-config for unattended-upgrades: Package-Blacklist,
    Remove-Unused-Kernel-Packages, Automatic-Reboot, and APT::Periodic."""
    audit: tuple[str, ...] = ()
    """Names that `dpkg --audit` complains about."""
    broken: str = ""
    """The first complaint of `apt-get check`, empty if there is none."""
    runfile: bool = False
    """/usr/bin/nvidia-uninstall is there: a .run file installed a driver."""
    apt_lock: str = ""
    """The process that holds dpkg's lock now, such as `unattended-upgr (pid 812)`."""
    pinned: str = ""
    """The release that gpufleet pinned (/var/lib/gpufleet/kernel-pin), empty if it pinned none."""
    own_holds: tuple[str, ...] = ()
    """Packages that gpufleet itself held (/var/lib/gpufleet/kernel-holds)."""
    managed: Files = field(default_factory=lambda: Files({}, {}))
    """The pin's files as they lie there, and gpufleet's records of them."""
    nouveau_blacklisted: bool = False
    """A file of modprobe.d on the host's disk keeps nouveau from being loaded."""
    trusted_signers: tuple[str, ...] = ()
    """Keys that the running kernel has: `MODULE.signer` must be among them under Secure Boot."""
    dnf: tuple[tuple[str, str], ...] = ()
    """(option, value) of dnf.conf that can undo a pin: exclude, excludepkgs, installonly_limit."""

    def kernel(self, release: str | None) -> Kernel | None:
        """The installed kernel of that release."""
        return next((each for each in self.kernels if each.release == release), None)
