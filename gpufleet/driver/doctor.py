"""Finds everything that is wrong with a host's kernel, driver and demo: cause, evidence, mend."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from gpufleet.demo.plan import Service
from gpufleet.driver import forecast
from gpufleet.driver.forecast import BOTH, mend
from gpufleet.driver.picture import GpuPicture
from gpufleet.driver.verdict import NEW_KERNEL_KIB, Flavour, Problem, problems
from gpufleet.kernel.packages import is_driver, is_library, is_meta, is_modules
from gpufleet.kernel.picture import Kernel, KernelPicture, Package
from gpufleet.kernel.plan import idle_holds
from gpufleet.settings import Settings
from gpufleet.upgrade.plan import Unattended, Upgrade

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or that a person should know."""

    code: str
    """For programs; stable."""
    severity: Severity
    """`error`: the GPU or the demo does not work now or after a reboot. `warning`: it may stop
    doing so later. `note`: nothing is wrong."""
    cause: str
    evidence: str
    """What was seen on the host."""
    mend: str
    """The command or setting that mends it."""


def findings(
    kernels: KernelPicture,
    gpus: GpuPicture,
    service: Service | None,
    upgrade: Upgrade | None,
    settings: Settings,
    *,
    allowed: frozenset[Flavour] = BOTH,
    pin: Sequence[str] = (),
    apply: str = "fleet apply",
) -> tuple[Finding, ...]:
    """Everything that is wrong on a host, errors first.

    `allowed` are the module flavours that every GPU takes; `pin` are the leaks that the kernel
    concern finds in the pin, one line each with what to do after a colon; `apply` is the command
    that applies to this host. A host without a GPU whose accelerator is `cpu` is judged by its
    packages and demo.
    """
    gpu = settings.accelerator == "cuda" or bool(gpus.gpus)
    found: list[Finding] = []
    if gpu:
        found += _bus(kernels, gpus, settings, apply)
        found += _running(kernels, gpus, allowed, apply)
        found += _loaded(kernels, gpus, apply)
        found += _daemons(gpus, apply)
        found += _kernels(kernels, gpus, allowed, apply)
        found += _driver_packages(kernels, gpus, upgrade, settings)
    found += _packages(kernels)
    if gpu:
        found += _pin(kernels, upgrade, settings, pin, apply)
        found += _upgrade(kernels, gpus, upgrade, settings, allowed, apply)
    found += _demo(service, settings, apply)
    return in_order(found)


def in_order(found: Iterable[Finding]) -> tuple[Finding, ...]:
    """Each once, errors first, then warnings."""
    order = {"error": 0, "warning": 1, "note": 2}
    return tuple(sorted(dict.fromkeys(found), key=lambda finding: order[finding.severity]))


def wrong(found: Iterable[Finding]) -> bool:
    """Whether anything is wrong: errors or warnings."""
    return any(finding.severity != "note" for finding in found)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _address(text: str) -> str:
    """A PCI address as the kernel writes it; nvidia-smi has a longer domain: 00000000:17:00.0."""
    domain, _, rest = text.strip().lower().partition(":")
    return f"{domain[-4:]:0>4}:{rest}"


def _bus(
    kernels: KernelPicture, gpus: GpuPicture, settings: Settings, apply: str
) -> Iterable[Finding]:
    if not gpus.gpus:
        yield Finding(
            "no-gpu",
            "error",
            "no NVIDIA GPU on the PCI bus",
            "no device of vendor 10de and class 03",
            "look at power, seating or passthrough of the card; for a host without one set "
            "accelerator to cpu",
        )
    by_nouveau = [gpu.address for gpu in gpus.gpus if gpu.driver == "nouveau"]
    if by_nouveau or gpus.nouveau_loaded:
        bound = f"nouveau drives {', '.join(by_nouveau)}" if by_nouveau else "nouveau is loaded"
        yield Finding(
            "nouveau-bound",
            "error",
            "nouveau is in the way of the NVIDIA module",
            bound,
            f"{apply} --only driver, then reboot",
        )
    elsewhere = [g for g in gpus.gpus if g.driver not in ("", "nvidia", "nouveau")]
    if elsewhere:
        yield Finding(
            "other-driver",
            "warning",
            "another kernel driver has the GPU, such as for passing it to a virtual machine",
            ", ".join(f"{gpu.address}: {gpu.driver}" for gpu in elsewhere),
            "unbind it there if this host is to use it",
        )
    listed = {_address(address) for address, _, _ in gpus.smi.gpus}
    unseen = [gpu.address for gpu in gpus.gpus if _address(gpu.address) not in listed]
    if not gpus.smi.gpus or by_nouveau or elsewhere:
        unseen = []  # nvidia-smi fails altogether, or the GPU is somebody else's
    if missing := list(dict.fromkeys((*gpus.lost, *unseen))):
        total = len({_address(gpu.address) for gpu in gpus.gpus} | set(map(_address, gpus.lost)))
        yield Finding(
            "fell-off-the-bus",
            "error",
            "a GPU does not answer any more, or nvidia-smi does not see it",
            f"nvidia-smi lists {len(listed)} of {total}; missing: {', '.join(missing)}",
            "on the host: journalctl -k -g 'NVRM|Xid'; reboot, and if it stays away look at the "
            "card; a GPU that the open or the proprietary module does not take needs the other "
            "one: driver.modules auto",
        )


def _running(
    kernels: KernelPicture, gpus: GpuPicture, allowed: frozenset[Flavour], apply: str
) -> Iterable[Finding]:
    """What is wrong on the running kernel's disk."""
    if kernels.kernel(kernels.running) is None:
        yield Finding(
            "running-not-installed",
            "warning",
            "the running kernel is not installed, so that nothing can be built for it",
            f"uname -r is {kernels.running}; no /boot/vmlinuz-{kernels.running}",
            "reboot into an installed kernel",
        )
        return
    for problem in problems(kernels, gpus, kernels.running, allowed):
        yield _broken(kernels, gpus, kernels.running, problem, "the running kernel", apply)


def _broken(
    kernels: KernelPicture, gpus: GpuPicture, release: str, problem: Problem, which: str, apply: str
) -> Finding:
    evidence = _evidence(kernels, gpus, kernels.kernel(release), problem.code)
    cause = f"the GPU does not work on {which}: {problem.text}"
    return Finding(problem.code, "error", cause, evidence, mend(problem.code, release, apply))


def _evidence(kernels: KernelPicture, gpus: GpuPicture, kernel: Kernel | None, code: str) -> str:
    """The value that a problem of `verdict.problems` was seen by."""
    if kernel is None:
        return "not in /boot"
    release, module = kernel.release, kernel.module
    if code == "no-headers":
        return f"no /lib/modules/{release}/build/include"
    if code == "no-initrd":
        return f"/boot/initrd.img-{release} is missing or empty"
    if code == "nouveau":
        return f"lsinitramfs /boot/initrd.img-{release}"
    if module is None:
        states = ", ".join(f"{name}: {state}" for name, state in kernel.dkms) or "nothing"
        return f"modinfo -k {release} nvidia finds none; dkms status: {states}"
    if code == "version":
        return f"modinfo says {module.version}, the libraries are {gpus.userland}"
    if code == "vermagic":
        return f"vermagic {module.vermagic}"
    if code == "flavour":
        return f"licence {module.license}"
    return f"signer {module.signer or 'none'}; Secure Boot {'on' if kernels.secure_boot else 'off'}"


def _loaded(kernels: KernelPicture, gpus: GpuPicture, apply: str) -> Iterable[Finding]:
    """What is wrong in memory: module, libraries, device files, nvidia-smi."""
    kernel = kernels.kernel(kernels.running)
    on_disk = kernel.module.version if kernel and kernel.module else ""
    explained = False
    again = f"{apply} --only driver (reloads it where nothing uses it), or reboot"
    if gpus.gpus and not gpus.loaded and on_disk:
        explained = True
        yield Finding(
            "not-loaded",
            "error",
            "the NVIDIA module is on the disk and not loaded",
            f"/sys/module/nvidia is not there; modinfo says {on_disk}",
            f"on the host: modprobe nvidia; or {apply} --only driver",
        )
    if gpus.loaded and gpus.userland and gpus.loaded != gpus.userland:
        explained = True
        users = f"; in use by {', '.join(gpus.holders)}" if gpus.holders else ""
        yield Finding(
            "mismatch",
            "error",
            "module and libraries are of different versions",
            f"loaded {gpus.loaded}, libraries {gpus.userland}{users}",
            again,
        )
    elif gpus.loaded and on_disk and gpus.loaded != on_disk:
        yield Finding(
            "loaded-old",
            "warning",
            "another version of the module is loaded than the one on the disk",
            f"loaded {gpus.loaded}, on the disk {on_disk}",
            again,
        )
    if not gpus.smi.installed:
        yield Finding(
            "no-smi",
            "error",
            "nvidia-smi is not installed",
            "no such command",
            f"{apply} --only driver",
        )
    elif gpus.smi.error and not explained:
        yield Finding("smi", "error", "nvidia-smi fails", gpus.smi.error, f"{apply} --only driver")
    names = {name.removeprefix("/dev/") for name in gpus.devices}
    if gpus.loaded and "nvidia-uvm" not in names:
        yield Finding(
            "no-uvm",
            "error",
            "CUDA programs cannot start: the device file of unified memory is missing",
            f"no /dev/nvidia-uvm beside {', '.join(sorted(names)) or 'no /dev/nvidia*'}",
            f"{apply} --only driver",
        )


def _daemons(gpus: GpuPicture, apply: str) -> Iterable[Finding]:
    if gpus.loaded and gpus.persistenced != "active":
        yield Finding(
            "persistenced",
            "warning",
            "the persistence daemon does not run: GPUs lose their state between programs",
            f"nvidia-persistenced.service is {gpus.persistenced}",
            f"{apply} --only driver",
        )
    state = f"nvidia-fabricmanager.service is {gpus.fabricmanager}"
    version = gpus.loaded or gpus.userland
    manager = gpus.fabricmanager_version
    if gpus.nvswitch and gpus.fabricmanager != "active":
        yield Finding(
            "fabricmanager",
            "error",
            "the GPUs are joined by NVSwitches, and CUDA fails (error 802) without their manager",
            f"{state}{f' at {manager}' if manager else ''}; driver {version or 'none'}",
            f"{apply} --only driver",
        )
    elif not gpus.nvswitch and gpus.fabricmanager == "failed":
        yield Finding(
            "fabricmanager-not-needed",
            "warning",
            "a fabric manager fails on a host without NVSwitches",
            state,
            "on the host: systemctl disable --now nvidia-fabricmanager",
        )
    if gpus.nvswitch and manager and version and forecast.upstream(manager) != version:
        yield Finding(
            "fabricmanager-version",
            "error",
            "the fabric manager must be of exactly the driver's version",
            f"fabric manager {manager}, driver {version}",
            f"{apply} --only driver",
        )


def _kernels(
    kernels: KernelPicture, gpus: GpuPicture, allowed: frozenset[Flavour], apply: str
) -> Iterable[Finding]:
    running, following = kernels.running, kernels.next_boot.release
    if following is None:
        yield Finding(
            "next-unknown",
            "warning",
            "nothing on the host tells which kernel the next reboot starts",
            kernels.next_boot.reason,
            "look at its boot loader by hand",
        )
    elif following != running:
        broken = problems(kernels, gpus, following, allowed)
        why = f"running {running}, next {following}: {kernels.next_boot.reason}"
        for problem in broken:
            yield _broken(kernels, gpus, following, problem, f"the next kernel {following}", apply)
        if broken:
            text = "a reboot would take the GPU away"
            yield Finding(
                "unsafe", "error", text, why, f"do not reboot before {apply} --only driver"
            )
        else:
            text = "a reboot into another kernel is pending, and safe"
            yield Finding("reboot-pending", "note", text, why, "reboot when it suits")
    for kernel in kernels.kernels:
        matters = kernel.release in (running, following)
        if kernel.dkms_error:
            hidden = kernel.module is None and not kernels.audit
            yield Finding(
                "dkms-failed",
                "error" if matters and kernel.module is None else "warning",
                f"the DKMS build for kernel {kernel.release} failed"
                + (", and dpkg counts it as a success" if hidden else ""),
                kernel.dkms_error,
                "a newer point release of the branch, or another one (driver.branch), then "
                f"{apply} --only driver; the log: /var/lib/dkms/nvidia*/*/build/make.log",
            )
        if matters and kernel.dkms and kernel.module is not None and not kernel.headers:
            yield Finding(
                "no-headers-left",
                "warning",
                f"kernel {kernel.release} has a module and no headers: the next driver update "
                "takes it away",
                f"no /lib/modules/{kernel.release}/build/include",
                f"{apply} --only driver",
            )
    if kernels.kernels and kernels.boot_free_kib < NEW_KERNEL_KIB:
        yield Finding(
            "boot-full",
            "warning",
            "/boot is nearly full: an initrd may come out empty and the kernel not boot",
            f"{kernels.boot_free_kib // 1024} MiB free, {_count(len(kernels.kernels), 'kernel')}",
            "on the host: apt-get purge linux-image-RELEASE of kernels that nobody boots",
        )


def _driver_packages(
    kernels: KernelPicture, gpus: GpuPicture, upgrade: Upgrade | None, settings: Settings
) -> Iterable[Finding]:
    driver = [p for p in kernels.packages if p.installed and _of_driver(p.name)]
    if kernels.runfile and driver:
        yield Finding(
            "runfile-and-packages",
            "error",
            "a .run file installed a driver over the packages'",
            f"/usr/bin/nvidia-uninstall beside {_names(driver)}",
            "on the host: nvidia-uninstall --silent, then apt-get install --reinstall of the "
            "packages",
        )
    elif kernels.runfile and settings.driver.source not in ("runfile", "present"):
        yield Finding(
            "runfile",
            "warning",
            "a .run file installed the driver, and driver.source is another",
            f"/usr/bin/nvidia-uninstall; driver.source {settings.driver.source}",
            "set driver.source to runfile or present, or on the host: nvidia-uninstall --silent",
        )
    origins: dict[str, list[str]] = {}
    for name, origin in upgrade.came_from if upgrade else ():
        if origin and _of_driver(name):
            origins.setdefault(origin, []).append(name)
    if len(origins) > 1:
        yield Finding(
            "mixed-origins",
            "warning",
            "the driver's packages come from several places, whose versions do not go together",
            "; ".join(f"{origin}: {_some(names)}" for origin, names in origins.items()),
            "leave one of them in /etc/apt (driver.source) and install the branch again",
        )
    versions: dict[str, list[str]] = {}
    for package in driver:
        if is_library(package.name) and not _transitional(package, driver):
            versions.setdefault(forecast.upstream(package.version), []).append(package.name)
    if len(versions) > 1:
        yield Finding(
            "mixed-versions",
            "error",
            "libraries of more than one driver version are installed",
            "; ".join(f"{version}: {_some(names)}" for version, names in versions.items()),
            "remove the packages of the version that is not wanted",
        )

    held = {package.name for package in kernels.packages if package.held}
    here = {package.name for package in driver} - held
    moved = {o.package: o.moved_to for o in gpus.offers if o.moved_to and o.package in here}
    if moved:
        yield Finding(
            "branch-moved",
            "warning",
            "an installed package's name says one branch and brings another today",
            "; ".join(f"{name} brings {branch}" for name, branch in sorted(moved.items())),
            "keep it by kernel.pin, or migrate on purpose: driver.branch",
        )


def _transitional(package: Package, driver: Iterable[Package]) -> bool:
    """Whether an old branch's package only leads to the new branch's: Ubuntu keeps
    libnvidia-compute-535-server as an empty package that depends on 580's."""
    match = re.match(r"libnvidia-compute-(\d+)", package.name)
    return match is not None and any(
        (other := re.match(r"libnvidia-compute-(\d+)", each.name)) is not None
        and int(other[1]) > int(match[1])
        for each in driver
    )


def _of_driver(name: str) -> bool:
    return is_driver(name) or is_modules(name)


def _names(packages: Iterable[Package]) -> str:
    return _some([f"{package.name} {package.version}" for package in packages])


def _some(names: Sequence[str], limit: int = 3) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:limit]) + _more(len(names) - limit)


def _packages(kernels: KernelPicture) -> Iterable[Finding]:
    """What is wrong with dpkg and apt themselves."""
    states = {package.name: package.status for package in kernels.packages}
    half = [p.name for p in kernels.packages if p.status in _HALF]
    if names := list(dict.fromkeys((*kernels.audit, *half))):
        told = [f"{name} ({states[name]})" if name in states else name for name in names]
        yield Finding(
            "half-configured",
            "error",
            "packages are installed by half, and apt refuses others until they are mended",
            f"dpkg --audit: {_some(told)}",
            "on the host: dpkg --configure -a, and read what it says",
        )
    if kernels.broken:
        yield Finding(
            "broken",
            "error",
            "dependencies of installed packages are not met",
            f"apt-get check: {kernels.broken}",
            "on the host: apt-get --fix-broken install",
        )
    if kernels.apt_lock:
        yield Finding(
            "apt-busy",
            "note",
            "apt or dpkg runs on the host now",
            kernels.apt_lock,
            "wait for it to end; apply waits up to ten minutes",
        )


_HALF = frozenset({"half-installed", "half-configured", "unpacked", "triggers-pending"})


def _pin(
    kernels: KernelPicture,
    upgrade: Upgrade | None,
    settings: Settings,
    audit: Sequence[str],
    apply: str,
) -> Iterable[Finding]:
    if idle := idle_holds(kernels):
        yield Finding(
            "idle-holds",
            "warning",
            "holds on packages that are not installed protect nothing",
            f"apt-mark showhold: {_some(idle)}",
            f"on the host: apt-mark unhold {' '.join(idle[:8])}",
        )
    if settings.kernel.pin and settings.accelerator == "cuda":
        yield from _leaks(kernels, list(audit), apply)
    pinned = kernels.pinned
    if pinned and pinned != kernels.running:
        yield Finding(
            "pin-drift",
            "warning",
            "another kernel runs than the pinned one",
            f"pinned {pinned}, running {kernels.running}",
            f"set kernel.drift to adopt or revert (now {settings.kernel.drift}), then {apply}",
        )
    unattended = upgrade.unattended if upgrade else None
    if unattended is not None and unattended.active:
        loose = _not_spared(kernels, unattended)
        if loose and not any(line.startswith("unattended-upgrades") for line in audit):
            yield Finding(
                "unattended",
                "warning",
                "unattended-upgrades may bring a kernel or driver by itself",
                f"its blacklist does not name {_some(loose)}",
                f"{apply} --only kernel",
            )
        if unattended.reboots:
            yield Finding(
                "unattended-reboot",
                "warning",
                "unattended-upgrades reboots this host by itself",
                "Unattended-Upgrade::Automatic-Reboot is true",
                f"{apply} --only kernel",
            )


def _leaks(kernels: KernelPicture, audit: Sequence[str], apply: str) -> Iterable[Finding]:
    """The pin's leaks: each, or, where nothing was pinned yet, that they are."""
    pin = f"{apply} --only kernel"
    if audit and not kernels.pinned:
        evidence = f"{audit[0].partition(': ')[0]}{_more(len(audit) - 1)}"
        yield Finding("not-pinned", "warning", "kernel and driver are not pinned", evidence, pin)
        return
    for line in audit:
        seen, _, to_do = line.rpartition(": ")
        to_do = to_do.replace("apply again", pin) if seen else pin
        yield Finding("pin", "warning", "the pin is not in force", seen or line, to_do)


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


def _not_spared(kernels: KernelPicture, unattended: Unattended) -> list[str]:
    """Packages that move kernel or driver on and that neither blacklist nor hold keeps."""
    return [
        package.name
        for package in kernels.packages
        if package.installed
        and not package.held
        and (is_meta(package.name, package.source) or is_driver(package.name, package.source))
        and not unattended.spares(package.name)
    ]


def _upgrade(
    kernels: KernelPicture,
    gpus: GpuPicture,
    upgrade: Upgrade | None,
    settings: Settings,
    allowed: frozenset[Flavour],
    apply: str,
) -> Iterable[Finding]:
    """What the next upgrade would take away."""
    if upgrade is None or not upgrade.available:
        return
    coming = forecast.forecast(kernels, gpus, upgrade, settings, allowed=allowed, apply=apply)
    itself = {reason.code for reason in coming.unattended.reasons}
    for reason in coming.upgrade.reasons:
        if reason.code == "apt":
            continue  # apt-get check says the same
        how = "unattended-upgrades" if reason.code in itself else "apt-get dist-upgrade"
        yield Finding(
            f"upgrade-{reason.code}",
            "warning",
            f"the next {how} takes the GPU away",
            reason.text,
            reason.mend,
        )
    if upgrade.stale:
        days = (
            "none" if upgrade.lists_age_s is None else f"{upgrade.lists_age_s // 86_400} days old"
        )
        yield Finding(
            "stale-lists",
            "note",
            "the package lists are too old to tell what an upgrade would bring",
            days,
            "on the host: apt-get update",
        )


def _demo(service: Service | None, settings: Settings, apply: str) -> Iterable[Finding]:
    if service is None:
        return
    if service.revision_on_disk is None and service.active == "inactive":
        text = "the demo is not installed"
        yield Finding("no-demo", "error", text, f"no unit {service.name}", apply)
        return
    try:
        answer = json.loads(service.health)
    except ValueError:
        answer = None
    answer = answer if isinstance(answer, dict) else {}
    logs = f"on the host: journalctl -u {_journal(service)} -n 50; then {apply}"
    if service.active != "active":
        down = [one for one in service.processes if one.active != "active"] or [service]
        evidence = ", ".join(f"{one.name} is {one.active}" for one in down)
        yield Finding("demo-down", "error", "the demo does not run", evidence, logs)
    elif answer.get("status") != "ok":
        said = str(answer.get("error") or answer.get("status") or "no answer")
        yield Finding("demo-ill", "error", "the demo is not well", f"/healthz: {said}", logs)
    elif service.revision_running != service.revision_on_disk:
        evidence = f"running {service.revision_running}, on disk {service.revision_on_disk}"
        text = "the demo runs an older revision than the one on the disk"
        yield Finding("demo-old", "warning", text, evidence, apply)
    if not service.enabled:
        text = "the demo does not start at boot"
        evidence = f"{service.name} is not enabled"
        yield Finding("demo-not-enabled", "warning", text, evidence, apply)


def _journal(service: Service) -> str:
    """The unit whose journal says what the demo logged: a pattern where there are several."""
    return f"'{service.name.replace('@', '@*')}'" if service.processes else service.name
