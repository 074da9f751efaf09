"""Foretells whether the GPU works after the next reboot and after the next package upgrade, and
every reason why not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gpufleet.driver.picture import GpuPicture
from gpufleet.driver.verdict import NEW_KERNEL_KIB, Flavour, problems
from gpufleet.kernel.packages import (
    HEADERS,
    IMAGE,
    PREBUILT,
    concerns_gpu,
    is_dkms,
    is_driver,
    is_library,
    is_meta,
    is_modules,
)
from gpufleet.kernel.picture import Kernel, KernelPicture, Module, NextBoot, Package
from gpufleet.kernel.release import age
from gpufleet.settings import Settings
from gpufleet.upgrade.plan import NONE, Change, Upgrade, by_itself

BOTH: frozenset[Flavour] = frozenset({"open", "proprietary"})

Verdict = Literal["safe", "unsafe", "nothing", "off", "unknown"]


@dataclass(frozen=True)
class Reason:
    """One thing that would take the GPU away, and what mends or prevents it."""

    code: str
    text: str
    mend: str


@dataclass(frozen=True)
class Outlook:
    """What an installed kernel would do to the GPU."""

    release: str
    running: bool
    next: bool
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class Reboot:
    """The next reboot."""

    kernel: str | None
    why: str
    """How it is known that this kernel starts."""
    verdict: Verdict
    reasons: tuple[Reason, ...]


@dataclass(frozen=True)
class Coming:
    """An upgrade of packages: what it changes for the GPU."""

    verdict: Verdict
    """`nothing`: it touches neither kernel nor driver. `off`: it does not happen by itself.
    `unknown`: nothing could be said."""
    kernel: str | None
    """The kernel that boots after it."""
    kernels: tuple[str, ...]
    """Kernels that come."""
    libraries: str
    """Version of the driver's libraries after it, empty without a driver."""
    reasons: tuple[Reason, ...]


@dataclass(frozen=True)
class Forecast:
    """What will become of a host's GPUs."""

    gpu: bool
    """Whether there is a GPU to lose; without one everything is safe."""
    kernels: tuple[Outlook, ...]
    reboot: Reboot
    upgrade: Coming
    """`apt-get dist-upgrade`, now."""
    unattended: Coming
    """The part of it that unattended-upgrades makes by itself."""
    notes: tuple[str, ...]

    @property
    def safe(self) -> bool:
        return "unsafe" not in (self.reboot.verdict, self.upgrade.verdict)

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """Every reason, each once."""
        return tuple(dict.fromkeys((*self.reboot.reasons, *self.upgrade.reasons)))


@dataclass(frozen=True)
class After:
    """A host as an upgrade leaves it, before a reboot."""

    kernels: KernelPicture
    gpus: GpuPicture
    new: tuple[str, ...]
    """Kernels that came."""


def forecast(
    kernels: KernelPicture,
    gpus: GpuPicture,
    upgrade: Upgrade | None,
    settings: Settings,
    *,
    allowed: frozenset[Flavour] = BOTH,
    apply: str = "fleet apply",
) -> Forecast:
    """What happens to the GPU at the next reboot and at the next upgrade.

    `allowed` are the module flavours that every GPU of the host takes; `apply` is the command that
    applies to this host, for the advice.
    """
    upgrade = upgrade or NONE
    gpu = settings.accelerator == "cuda" or bool(gpus.gpus)
    following = kernels.next_boot.release
    outlooks = tuple(
        Outlook(
            one.release,
            one.release == kernels.running,
            one.release == following,
            tuple(p.text for p in problems(kernels, gpus, one.release, allowed)) if gpu else (),
        )
        for one in sorted(kernels.kernels, key=lambda kernel: age(kernel.release))
    )
    return Forecast(
        gpu,
        outlooks,
        _reboot(kernels, gpus, gpu, allowed, apply),
        _coming(kernels, gpus, gpu, upgrade, settings, allowed, apply),
        _unattended(kernels, gpus, gpu, upgrade, settings, allowed, apply),
        _notes(kernels, gpus, gpu, upgrade, settings),
    )


def _reboot(
    kernels: KernelPicture, gpus: GpuPicture, gpu: bool, allowed: frozenset[Flavour], apply: str
) -> Reboot:
    following, why = kernels.next_boot.release, kernels.next_boot.reason
    if not gpu:
        return Reboot(following, why, "safe", ())
    if following is None:
        text = f"nothing on the host tells which kernel boots next ({why})"
        unknown = Reason("unknown-kernel", text, "look at its boot loader by hand")
        return Reboot(None, why, "unsafe", (unknown,))
    found = tuple(
        Reason(problem.code, problem.text, mend(problem.code, following, apply))
        for problem in problems(kernels, gpus, following, allowed)
    )
    return Reboot(following, why, "unsafe" if found else "safe", found)


def mend(code: str, release: str, apply: str) -> str:
    """What to do about a problem of `verdict.problems`."""
    if code == "unsigned":
        return (
            "enrol a key at the host's console (mokutil --import), turn Secure Boot off, or on "
            "Ubuntu take the archive's signed modules: driver.source distribution"
        )
    if code == "no-initrd":
        return f"make room in /boot, then on the host: update-initramfs -c -k {release}"
    if code == "not-installed":
        return "choose an installed kernel in the boot loader, then update-grub"
    if code == "flavour":
        return f"set driver.modules to auto, then {apply} --only driver"
    return f"{apply} --only driver"


def _coming(
    kernels: KernelPicture,
    gpus: GpuPicture,
    gpu: bool,
    upgrade: Upgrade,
    settings: Settings,
    allowed: frozenset[Flavour],
    apply: str,
) -> Coming:
    following = kernels.next_boot.release
    if not upgrade.available:
        return Coming("unknown", following, (), gpus.userland, ())
    ours = tuple(change for change in upgrade.changes if concerns_gpu(change.name))
    if upgrade.error and gpu:
        text = f"apt cannot upgrade: {upgrade.error}"
        reason = Reason("apt", text, "on the host: apt-get --fix-broken install")
        return Coming("unsafe", following, (), gpus.userland, (reason,))
    if not ours:
        return Coming("nothing", following, (), gpus.userland, ())
    then = after(kernels, gpus, ours)
    kernel = then.kernels.next_boot.release
    found = _losses(kernels, gpus, then, ours, settings, allowed, apply) if gpu else ()
    return Coming("unsafe" if found else "safe", kernel, then.new, then.gpus.userland, found)


def _unattended(
    kernels: KernelPicture,
    gpus: GpuPicture,
    gpu: bool,
    upgrade: Upgrade,
    settings: Settings,
    allowed: frozenset[Flavour],
    apply: str,
) -> Coming:
    if upgrade.available and (upgrade.unattended is None or not upgrade.unattended.active):
        return Coming("off", kernels.next_boot.release, (), gpus.userland, ())
    return _coming(kernels, gpus, gpu, by_itself(upgrade), settings, allowed, apply)


def _losses(
    kernels: KernelPicture,
    gpus: GpuPicture,
    then: After,
    changes: Sequence[Change],
    settings: Settings,
    allowed: frozenset[Flavour],
    apply: str,
) -> tuple[Reason, ...]:
    """Every way in which these changes take the GPU away."""
    pins = settings.kernel.pin
    pin = f"{apply} --only kernel" if pins else f"set kernel.pin, then {apply} --only kernel"
    late = f"before it: {pin}; after it and before a reboot: {apply} --only driver"
    removed = [change.name for change in changes if change.is_removed]
    found: list[Reason] = []
    boots = then.kernels.next_boot.release
    if boots is not None:
        new = "comes and " if boots in then.new else ""
        found += [
            Reason(problem.code, f"kernel {boots} {new}boots next: {problem.text}", late)
            for problem in problems(then.kernels, then.gpus, boots, allowed)
        ]
    old, libraries = gpus.userland, then.gpus.userland
    if old and libraries and _major(old) != _major(libraries):
        text = f"the driver jumps from branch {_major(old)} to {_major(libraries)}"
        found.append(Reason("branch", text, f"{pin}; to migrate on purpose set driver.branch"))
    if gpus.loaded and libraries and libraries != gpus.loaded and libraries != old:
        text = (
            f"the libraries go to {libraries} while module {gpus.loaded} stays loaded: "
            "nvidia-smi and new CUDA programs fail until it is reloaded"
        )
        found.append(Reason("reload", text, f"before it: {pin}; after it: {apply} --only driver"))
    if metas := _named(removed, is_meta):
        text = f"it removes {metas}, so that kernels come without headers or modules later"
        found.append(Reason("meta-removed", text, f"{pin}, which holds all of them or none"))
    if gone := _named(removed, _is_driver_or_modules):
        found.append(Reason("driver-removed", f"it removes {gone}", pin))
    for release in _releases(removed, IMAGE):
        if release in (kernels.running, kernels.next_boot.release):
            what = "running" if release == kernels.running else "next"
            text = f"it removes kernel {release}, the {what} one"
            found.append(Reason("kernel-removed", text, pin))
    if then.new and _boot_needs(kernels) > kernels.boot_free_kib:
        text = (
            f"/boot has {kernels.boot_free_kib // 1024} MiB free and a new kernel with its initrd "
            f"may need {_boot_needs(kernels) // 1024} MiB"
        )
        found.append(Reason("boot-space", text, "purge kernels that nobody boots, or pin"))
    return tuple(found)


def _is_driver_or_modules(name: str) -> bool:
    return is_driver(name) or (is_modules(name) and not is_meta(name))


def _named(names: Iterable[str], kind: Callable[[str], bool]) -> str:
    """Up to three of the names that are of a kind, and how many more."""
    chosen = [name for name in names if kind(name)]
    more = f" and {len(chosen) - 3} more" if len(chosen) > 3 else ""
    return ", ".join(chosen[:3]) + more


def _releases(names: Iterable[str], pattern: re.Pattern[str]) -> tuple[str, ...]:
    """The kernel releases that package names carry, each once."""
    found = (match["release"] for name in names if (match := pattern.match(name)))
    return tuple(dict.fromkeys(found))


def _boot_needs(kernels: KernelPicture) -> int:
    """What a new kernel takes of /boot, KiB."""
    return max((k.initrd_bytes or 0 for k in kernels.kernels), default=0) // 1024 + NEW_KERNEL_KIB


def after(kernels: KernelPicture, gpus: GpuPicture, changes: Sequence[Change]) -> After:
    """The pictures as they would be after these changes, so that the same verdict judges them.

    A build by DKMS is taken to succeed where the headers are: whether it does is known only
    afterwards. dkms builds for the running and for the newest kernel (Debian's
    /usr/lib/dkms/common.postinst), and removes the old version from all.
    """
    coming = [change for change in changes if not change.is_removed]
    names = {package.name for package in kernels.packages if package.installed}
    names = (names | {c.name for c in coming}) - {c.name for c in changes if c.is_removed}
    removed = [change.name for change in changes if change.is_removed]
    new = tuple(
        release
        for release in _releases((c.name for c in coming if c.is_new), IMAGE)
        if kernels.kernel(release) is None
    )
    gone = [r for r in _releases(removed, IMAGE) if r not in _releases(names, IMAGE)]
    libraries = _newest(c.new or "" for c in coming if is_library(c.name)) or gpus.userland
    if gpus.userland and any(map(is_library, removed)) and not any(map(is_library, names)):
        libraries = ""
    built = any(map(is_dkms, names)) or any(kernel.dkms for kernel in kernels.kernels)
    rebuilt = _newest(c.new or "" for c in coming if is_dkms(c.name))
    like = _like(kernels)
    headers = set(_releases((c.name for c in coming), HEADERS))
    lost = set(_releases(removed, HEADERS))
    fresh = [Kernel(r, False, _initrd(kernels), like.nouveau_in_initrd, None) for r in new]
    stay = [one for one in (*kernels.kernels, *fresh) if one.release not in gone]
    newest = max((one.release for one in stay), key=age, default="")
    seen: list[Kernel] = []
    for one in stay:
        has = one.release in headers or (one.headers and one.release not in lost)
        module = one.module
        prebuilt = _prebuilt(one.release, (c.name for c in coming), libraries, like.module)
        if prebuilt is not None:
            module = prebuilt
        elif one.release in _releases(removed, PREBUILT):
            module = None
        elif built and (rebuilt or one.release in new):
            version = rebuilt or (like.module.version if like.module else libraries)
            due = one.release in (kernels.running, newest, *new)
            own = module is not None and one.release in _releases(names, PREBUILT)
            if not own:
                module = _build(one.release, version, like.module) if has and due else None
        seen.append(replace(one, headers=has, module=module))
    then = replace(
        kernels,
        kernels=tuple(seen),
        packages=_packages(kernels.packages, changes),
    )
    then = replace(then, next_boot=_next_boot(kernels, [one.release for one in seen], new))
    return After(then, replace(gpus, userland=libraries), new)


def _like(kernels: KernelPicture) -> Kernel:
    """The kernel that a new one will resemble: the one that boots next, else one with a module."""
    following = kernels.kernel(kernels.next_boot.release) or kernels.kernel(kernels.running)
    if following is not None and following.module is not None:
        return following
    others = [one for one in kernels.kernels if one.module is not None]
    return others[-1] if others else following or Kernel("", False, None, False, None)


def _initrd(kernels: KernelPicture) -> int | None:
    """The size of the initrd that a new kernel gets; None where /boot cannot take it."""
    if _boot_needs(kernels) > kernels.boot_free_kib:
        return None
    return max((one.initrd_bytes or 0 for one in kernels.kernels), default=0) or 1


def _prebuilt(
    release: str, coming: Iterable[str], libraries: str, like: Module | None
) -> Module | None:
    """The module that the archive built for exactly this kernel, if it comes."""
    for match in filter(None, map(PREBUILT.match, coming)):
        if match["release"] == release:
            version = libraries if _major(libraries) == match["branch"] else match["branch"]
            licence = "Dual MIT/GPL" if match["kind"].endswith("-open") else "NVIDIA"
            return Module("nvidia", version, f"{release} ", licence, "the archive")
    return None


def _build(release: str, version: str, like: Module | None) -> Module:
    """The module that DKMS will build, signed as those that it built before."""
    licence = like.license if like else ""
    name, signer = (like.name, like.signer) if like else ("nvidia", "")
    return Module(name, version, f"{release} ", licence, signer)


def _packages(before: Sequence[Package], changes: Sequence[Change]) -> tuple[Package, ...]:
    """The packages of kernel and driver after the changes."""
    packages = {package.name: package for package in before}
    for change in changes:
        old = packages.get(change.name)
        if change.new is None:
            packages.pop(change.name, None)
        elif old is not None:
            packages[change.name] = replace(old, version=change.new)
        else:
            packages[change.name] = Package(change.name, change.new, "", "install", "installed")
    return tuple(packages.values())


def _next_boot(kernels: KernelPicture, releases: Sequence[str], new: Sequence[str]) -> NextBoot:
    """The kernel that boots once the packages have run update-grub."""
    newest = max(releases, key=age, default=None)
    before = kernels.next_boot
    grub = kernels.grub
    if set(releases) == {one.release for one in kernels.kernels}:
        return before
    if not grub.present:
        return NextBoot(newest, "the newest kernel")
    entry = grub.next_entry or (grub.saved_entry if grub.default == "saved" else grub.default)
    if entry in ("", "0"):
        return NextBoot(newest, "the newest kernel is the first entry of grub.cfg")
    if before.release is not None and before.release in entry:
        if before.release in releases:
            return NextBoot(before.release, before.reason)
        return NextBoot(newest, f"{entry} is gone, and GRUB takes its first entry instead")
    return NextBoot(newest, f"GRUB's default {entry} may mean another kernel then")


def _notes(
    kernels: KernelPicture, gpus: GpuPicture, gpu: bool, upgrade: Upgrade, settings: Settings
) -> tuple[str, ...]:
    """What a person should know and that takes no GPU away."""
    if not gpu:
        return ("no GPU to lose",)
    found: list[str] = []
    if settings.accelerator == "cpu":
        found.append("accelerator is cpu: apply leaves kernel and driver of this host alone")
    if not upgrade.available:
        found.append("no apt-get here: what an upgrade would do is not known")
        return tuple(found)
    kept = [name for name in upgrade.kept_back if concerns_gpu(name)]
    held = {package.name for package in kernels.packages if package.held}
    if by_hold := [name for name in kept if name in held]:
        found.append(f"the holds keep out what is newer of {', '.join(by_hold)}")
    if others := [name for name in kept if name not in held]:
        found.append(f"kept back without a hold of their own: {', '.join(others)}")
    if any(map(is_dkms, (c.name for c in upgrade.changes))) or (
        _releases((c.name for c in upgrade.changes if c.is_new), IMAGE)
        and any(one.dkms for one in kernels.kernels)
    ):
        found.append("DKMS builds the module during the upgrade; whether it succeeds shows then")
    if upgrade.lists_age_s is None:
        found.append("the host has no package lists: run apt-get update there for a forecast")
    elif upgrade.stale:
        days = upgrade.lists_age_s // 86_400
        found.append(f"its package lists are {days} days old: newer packages are not seen")
    return tuple(found)


def _major(version: str) -> str:
    return version.partition(".")[0]


def upstream(version: str) -> str:
    """A package's version without the distribution's part: 1:535.309.01-0+deb12u1 -> 535.309.01."""
    match = re.match(r"(?:\d+:)?(\d+(?:\.\d+)*)", version)
    return match[1] if match else version


def _newest(versions: Iterable[str]) -> str:
    """The newest upstream version; a transitional package of an older branch does not count."""
    found = {upstream(version) for version in versions if version}
    return max(found, key=lambda v: tuple(map(int, re.findall(r"\d+", v))), default="")
