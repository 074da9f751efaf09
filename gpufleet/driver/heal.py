"""Decides what brings the GPU back after a kernel upgrade: which kernels to take care of, by which
steps, whether the module must be reloaded, and whether a reboot is safe."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from gpufleet.catalog import Drivers
from gpufleet.driver.picture import GpuPicture
from gpufleet.driver.plan import Choice, Refusal, allowed, choose, kernel_packages
from gpufleet.driver.verdict import INITRD_GROWTH_KIB, Flavour, Problem, problems
from gpufleet.kernel.picture import Kernel, KernelPicture
from gpufleet.kernel.release import age
from gpufleet.settings import Driver as DriverSettings
from gpufleet.settings import Kernel as KernelSettings
from gpufleet.settings import Settings

#: Sources whose packages make up one driver and must all be of one version: Debian's, Ubuntu's
#: and NVIDIA's own, and the open modules, which Debian builds from a source of their own.
_DRIVER_SOURCES = ("nvidia-graphics-drivers", "nvidia-open-gpu-kernel-modules")

#: How the packages of ready-made modules begin; a kernel's flavour may be called nvidia too.
_MODULES = "linux-modules-nvidia-"

#: Names of processes that belong to what gpufleet stops before it unloads the module. The demo is
#: a Python; whether another's Python is among them shows once the service is stopped.
_STOPPED = ("nvidia-persiste", "nv-fabricmanage", "nv-hostengine", "dcgm", "python")

#: What is left where a kernel can have no module: apply moves no kernel by itself.
MOVE_ON = (
    "the package sources have no headers for it: install a kernel that they have headers for, "
    "image and headers together, then apply"
)

StepKind = Literal["headers", "prebuilt", "dkms", "runfile", "depmod", "initramfs"]
Load = Literal["nothing", "load", "reload", "reboot"]
Reboot = Literal["not-needed", "safe", "unsafe"]

#: What a build or a package of modules mends; the rest is the initrd's.
_MODULE_PROBLEMS = frozenset({"no-headers", "no-module", "version", "vermagic", "flavour"})
_INITRD_PROBLEMS = frozenset({"no-initrd", "nouveau"})


@dataclass(frozen=True)
class Step:
    """One thing to do for exactly one kernel."""

    kind: StepKind
    release: str
    packages: tuple[str, ...] = ()
    """Names to install, for headers and prebuilt modules."""
    version: str = ""
    """Driver version to build: the installed one; empty where the host has only one anyway."""


@dataclass(frozen=True)
class Care:
    """A kernel that runs or boots next: what is wrong with it and what mends that."""

    release: str
    running: bool
    next: bool
    problems: tuple[Problem, ...]
    steps: tuple[Step, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class Decision:
    """What to do on a host, in order, and what a reboot would bring."""

    refusals: tuple[str, ...]
    """What forbids any change; each is one line: cause, where, what to do."""
    notes: tuple[str, ...]
    """What a person should know and that forbids nothing."""
    kernels: tuple[Care, ...]
    """The running kernel first, then the one that boots next where it is another."""
    load: Load
    target: str | None
    """The kernel that the next boot shall start."""
    boot: str | None
    """The kernel that GRUB must be set to so that `target` boots; None where it does already."""
    reboot: Reboot
    reasons: tuple[str, ...]
    """Why the reboot is safe or not."""

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(step for care in self.kernels for step in care.steps)

    @property
    def nothing(self) -> bool:
        """Whether everything is as it should be."""
        return (
            not (self.refusals or self.steps or self.boot)
            and self.load == "nothing"
            and self.reboot == "not-needed"
        )


def decide(
    kernels: KernelPicture,
    gpus: GpuPicture,
    choice: Choice,
    allowed: frozenset[Flavour],
    kernel: KernelSettings,
    driver: DriverSettings,
    *,
    sought: bool = False,
    tried: bool = False,
) -> Decision:
    """The state table of a kernel upgrade, as a value.

    `allowed` are the module flavours that all GPUs of the host take. `sought`: headers that are
    missing were asked for and the package sources do not have them. `tried`: so were all steps,
    and what is still wrong stays so.
    """
    lacking = frozenset(one.release for one in kernels.kernels if not one.headers)
    gone = lacking if sought or tried else frozenset()
    running, following = kernels.running, kernels.next_boot.release or kernels.running
    if kernel.drift == "revert" and kernels.kernel(kernels.pinned) is not None:
        following = kernels.pinned
    releases = (running, following) if following != running else (running,)
    cares = tuple(
        _care(kernels, gpus, choice, allowed, release, running, following, gone)
        for release in releases
    )
    load, loading = _load(kernels, gpus, cares[0])
    target, reasons = _target(kernels, gpus, allowed, cares, tried)
    last = problems(kernels, gpus, target, allowed)
    reboot: Reboot
    if last:
        reboot = "unsafe"
        reasons += tuple(f"kernel {target}: {problem.text}" for problem in last)
    elif target != running:
        reboot = "safe"
        reasons += (f"reboot pending, safe: kernel {target} has a working module",)
    elif load == "reboot":
        reboot = "safe"
        reasons += loading
    else:
        reboot = "not-needed"
    return Decision(
        refusals=_refusals(kernels, choice, driver, cares),
        notes=_notes(kernels, cares),
        kernels=cares,
        load=load,
        target=target,
        boot=target if target != (kernels.next_boot.release or running) else None,
        reboot=reboot,
        reasons=reasons if reboot != "not-needed" else (),
    )


def _care(
    kernels: KernelPicture,
    gpus: GpuPicture,
    choice: Choice,
    allowed: frozenset[Flavour],
    release: str,
    running: str,
    following: str,
    gone: frozenset[str],
) -> Care:
    found = problems(kernels, gpus, release, allowed)
    steps: list[Step] = []
    one = kernels.kernel(release)
    codes = {problem.code for problem in found}
    if one is not None and codes & _MODULE_PROBLEMS:
        steps += _module_steps(kernels, gpus, choice, one, gone)
    if one is not None and (steps or codes & _INITRD_PROBLEMS):
        steps.append(Step("initramfs", release))
    return Care(release, release == running, release == following, found, tuple(steps))


def _module_steps(
    kernels: KernelPicture,
    gpus: GpuPicture,
    choice: Choice,
    one: Kernel,
    gone: frozenset[str],
) -> list[Step]:
    """What puts a module of the installed driver version below this kernel, and no other's."""
    release = one.release
    if choice.source == "present":  # somebody else installed the driver; its DKMS can still build
        steps = []
    else:
        wanted = kernel_packages(choice, kernels, release)
        here = {package.name for package in kernels.packages if package.installed}
        absent = tuple(name for name in wanted if name not in here)
        modules = tuple(name for name in absent if name.startswith(_MODULES))
        headers = tuple(name for name in absent if name not in modules)
        seek = bool(headers) and not one.headers and release not in gone
        steps = [Step("headers", release, headers)] if seek else []
        if choice.prebuilt:
            # Installed and yet no module: its files are put back by installing it again.
            again = modules or tuple(name for name in wanted if name.startswith(_MODULES))
            steps += [Step("prebuilt", release, again)] if again else []
            return [*steps, Step("depmod", release)] if again else steps
    if not (one.headers or steps):
        return []  # nothing can be built, and nothing can be had to build it with
    kind: StepKind = "runfile" if choice.source == "runfile" and not one.dkms else "dkms"
    return [*steps, Step(kind, release, version=gpus.userland), Step("depmod", release)]


def _load(kernels: KernelPicture, gpus: GpuPicture, running: Care) -> tuple[Load, tuple[str, ...]]:
    """What makes the running system use the module on its disk, and why a reboot if one must."""
    one = kernels.kernel(running.release)
    bad = {problem.code for problem in running.problems} & (_MODULE_PROBLEMS | {"unsigned"})
    if not gpus.gpus or one is None or one.module is None or bad:
        return "nothing", ()
    if gpus.loaded == one.module.version:
        # Unified memory has a module of its own, and no CUDA program starts without its device.
        return "nothing" if "nvidia-uvm" in gpus.devices else "load", ()
    if not gpus.loaded and not gpus.nouveau_loaded:
        return "load", ()
    strangers = tuple(name for name in gpus.holders if not name.startswith(_STOPPED))
    was = f"module {gpus.loaded} is loaded" if gpus.loaded else "nouveau drives the GPU"
    if strangers:
        held = ", ".join(strangers)
        return "reboot", (f"{was}, {one.module.version} is on the disk, and {held} keeps it",)
    return "reload", ()


def _target(
    kernels: KernelPicture,
    gpus: GpuPicture,
    allowed: frozenset[Flavour],
    cares: Sequence[Care],
    tried: bool,
) -> tuple[str, tuple[str, ...]]:
    """The kernel that the next boot shall start, and why where it is not the obvious one."""
    running, following = cares[0], cares[-1]
    if following.ok or (following.steps and not tried):  # it works, or can be made to
        return following.release, ()
    if running.ok:
        return running.release, (f"kernel {following.release} is kept from booting",)
    if running.steps and not tried:
        return running.release, ()
    others = sorted(
        (
            one.release
            for one in kernels.kernels
            if not problems(kernels, gpus, one.release, allowed)
        ),
        key=age,
    )
    if not others:
        return following.release, ()
    why = f"kernel {running.release} cannot have a module; {others[-1]} has one"
    return others[-1], (why,)


def _refusals(
    kernels: KernelPicture, choice: Choice, driver: DriverSettings, cares: Sequence[Care]
) -> tuple[str, ...]:
    found: list[str] = []
    ours = choice.source not in {"runfile", "present"}
    if kernels.runfile and ours:
        found.append(
            f"a .run file installed the driver here and driver.source is {driver.source}: run "
            "nvidia-uninstall on the host, or set driver.source to runfile or present"
        )
    if versions := mixed(kernels) if ours else ():
        found.append(
            f"the driver's packages are of several versions or origins ({', '.join(versions)}): "
            "leave one source enabled, install them all in one version, then apply"
        )
    if kernels.broken and ours and (missing(kernels, choice) or _of(cares, "headers", "prebuilt")):
        found.append(
            f"apt-get check: {kernels.broken}: run apt-get --fix-broken install on the host, "
            "then apply"
        )
    for care in cares:
        if any(problem.code == "unsigned" for problem in care.problems) and not choice.prebuilt:
            found.append(
                f"Secure Boot is on and the module of kernel {care.release} is not signed: enrol "
                "a key at the host's console (mokutil --import), or turn Secure Boot off"
            )
    if full := boot_full(kernels, [care.release for care in cares if care.steps]):
        found.append(full)
    return tuple(found)


def _notes(kernels: KernelPicture, cares: Sequence[Care]) -> tuple[str, ...]:
    found = []
    if kernels.apt_lock:
        found.append(
            f"apt is in use by {kernels.apt_lock}: waiting up to 10 minutes; stop it if it hangs"
        )
    for care in cares:
        one = kernels.kernel(care.release)
        if one is not None and one.dkms_error and care.ok:
            found.append(
                f"the last DKMS build for kernel {care.release} failed ({one.dkms_error}); the "
                "module there works all the same"
            )
    return tuple(found)


def _of(cares: Iterable[Care], *kinds: StepKind) -> list[Step]:
    return [step for care in cares for step in care.steps if step.kind in kinds]


def mixed(kernels: KernelPicture) -> tuple[str, ...]:
    """`NAME VERSION` of one package for each driver version, where there is more than one."""
    versions: dict[str, str] = {}
    for package in kernels.packages:
        if package.source.startswith(_DRIVER_SOURCES) and package.status != "config-files":
            found = re.match(r"(?:\d+:)?(\d+(?:\.\d+)+)", package.version)
            if found and package.status != "not-installed":
                versions.setdefault(found[1], f"{package.name} {package.version}")
    return tuple(versions[key] for key in sorted(versions)) if len(versions) > 1 else ()


def missing(kernels: KernelPicture, choice: Choice) -> tuple[str, ...]:
    """The choice's packages that are not installed, in its order."""
    installed = {package.name for package in kernels.packages if package.installed}
    return tuple(name for name in choice.packages if name not in installed)


def boot_full(kernels: KernelPicture, releases: Sequence[str]) -> str:
    """One line if /boot cannot take the initrds of these kernels once they are made anew.

    A new initrd is written beside the old one, and grows.
    """
    if not releases or kernels.family == "other":
        return ""
    made = [kernels.kernel(release) for release in releases]
    sizes = [(one.initrd_bytes or 0) // 1024 for one in made if one is not None]
    need = max(sizes, default=0) + INITRD_GROWTH_KIB * len(sizes)
    if kernels.boot_free_kib >= need:
        return ""
    return (
        f"/boot has {kernels.boot_free_kib // 1024} MiB free and the initrd of "
        f"{', '.join(releases)} may need {need // 1024} MiB: remove a kernel that is not used "
        "(apt-get purge linux-image-RELEASE), then apply"
    )


def unhealed(kernels: KernelPicture, decision: Decision, kernel: KernelSettings) -> str:
    """One line for what is still wrong after every step was taken; empty if all is well.

    A host that is about to be rebooted into a kernel that works is well.
    """
    broken = [care for care in decision.kernels if not care.ok]
    if not broken:
        return ""
    care = broken[0]
    texts = "; ".join(problem.text for problem in care.problems)
    target = decision.target
    if not care.running:
        kept = target != care.release and kernels.grub.present
        how = f"GRUB keeps booting {target}" if kept else "do not reboot this host"
        return f"unsafe to reboot into kernel {care.release}: {texts}; {how}: {_remedy(care)}"
    if decision.reboot == "safe" and target != care.release:
        if kernel.reboot == "when-safe":
            return ""
        return (
            f"the GPU does not work on the running kernel: {texts}; kernel {target} has a module: "
            "reboot into it, or set kernel.reboot to when-safe and apply"
        )
    return f"the GPU does not work on the running kernel: {texts}: {_remedy(care)}"


def _remedy(care: Care) -> str:
    codes = {problem.code for problem in care.problems}
    if "no-headers" in codes:
        return MOVE_ON
    if codes & {"version", "flavour"}:
        return "install one driver version in the right flavour, then apply"
    if codes & {"no-module", "vermagic"}:
        return "set driver.branch to a branch that builds for it, or boot another kernel"
    if "no-initrd" in codes:
        return f"run update-initramfs -c -k {care.release} on the host and read what it says"
    if "nouveau" in codes:
        return f"run update-initramfs -u -k {care.release} on the host and read what it says"
    return "mend that, then apply"


@dataclass(frozen=True)
class Sight:
    """A host as it was last seen, and what is to be done there."""

    settings: Settings
    kernels: KernelPicture
    gpus: GpuPicture
    choice: Choice
    decision: Decision

    def steps(self, *kinds: StepKind) -> tuple[Step, ...]:
        """The steps of these kinds, kernel by kernel."""
        return tuple(step for step in self.decision.steps if step.kind in kinds)

    @property
    def module(self) -> str:
        """The name of the running kernel's module."""
        one = self.kernels.kernel(self.kernels.running)
        return one.module.name if one is not None and one.module else "nvidia"

    @property
    def wanted(self) -> bool:
        """Whether packages of the driver are to be installed."""
        return bool(missing(self.kernels, self.choice) or self.steps("prebuilt"))

    @property
    def unconfigured(self) -> bool:
        """Whether apt left a package of kernel or driver half-way."""
        half = {"half-configured", "unpacked", "triggers-pending", "triggers-awaited"}
        return any(package.status in half for package in self.kernels.packages)

    @property
    def keeps(self) -> bool:
        """Whether GRUB must be kept from booting a kernel without a module."""
        return self.decision.boot == self.kernels.running and self.kernels.grub.present

    @property
    def unhealed(self) -> str:
        """One line for what no step mended, or empty."""
        return unhealed(self.kernels, self.decision, self.settings.kernel)


def look(
    settings: Settings,
    drivers: Drivers,
    kernels: KernelPicture,
    gpus: GpuPicture,
    *,
    sought: bool = False,
    tried: bool = False,
) -> Sight | Refusal:
    """Choose the driver and decide; `sought` and `tried` as for `decide`."""
    cuda = settings.driver.cuda or drivers.environments.cuda
    choice = choose(settings.driver, kernels, gpus, drivers, cuda)
    if isinstance(choice, Refusal):
        return choice
    decision = decide(
        kernels,
        gpus,
        choice,
        allowed(gpus, drivers),
        settings.kernel,
        settings.driver,
        sought=sought,
        tried=tried,
    )
    return Sight(settings, kernels, gpus, choice, decision)


def fabric_problem(choice: Choice, gpus: GpuPicture) -> str:
    """One line if the fabric manager cannot serve this driver: CUDA would fail with error 802."""
    if not (choice.fabric_manager and gpus.userland):
        return ""
    if gpus.fabricmanager == "absent":
        return (
            "the NVSwitches need the fabric manager and it is not installed: set driver.source to "
            "one that has it (nvidia, nvidia-cn)"
        )
    if gpus.fabricmanager_version not in {"", gpus.userland}:
        return (
            f"the fabric manager {gpus.fabricmanager_version} does not match the driver "
            f"{gpus.userland}: install both in one version"
        )
    return ""


def idle_services(choice: Choice, gpus: GpuPicture) -> tuple[str, ...]:
    """The driver's services that should run and do not; none before the module is loaded."""
    if not (gpus.gpus and gpus.loaded):
        return ()
    units = []
    if gpus.persistenced not in {"active", "absent"}:
        units.append("nvidia-persistenced.service")
    if choice.fabric_manager and gpus.fabricmanager not in {"active", "absent"}:
        units.append("nvidia-fabricmanager.service")
    return tuple(units)


def gate(before: GpuPicture, after: Sight, target: str, said: str) -> tuple[str, ...]:
    """What does not work on a kernel that was just booted; each is a few words.

    `said` is what the services had to complain about.
    """
    kernels, gpus = after.kernels, after.gpus
    if kernels.running != target:
        return (f"kernel {kernels.running} runs, not {target}",)
    care = next(care for care in after.decision.kernels if care.running)
    found = [problem.text for problem in care.problems]
    if gpus.gpus and not gpus.loaded:
        found.append("the module is not loaded")
    if gpus.gpus and gpus.smi.error:
        found.append(f"nvidia-smi: {gpus.smi.error}")
    elif gpus.smi.installed and len(gpus.smi.gpus) != len(gpus.gpus):
        found.append(f"nvidia-smi lists {len(gpus.smi.gpus)} of {len(gpus.gpus)} GPUs")
    if len(gpus.gpus) < len(before.gpus):
        found.append(f"{len(gpus.gpus)} of {len(before.gpus)} GPUs are on the bus")
    if before.persistenced == "active" and gpus.persistenced != "active":
        found.append("nvidia-persistenced does not run")
    if before.fabricmanager == "active" and gpus.fabricmanager != "active":
        found.append("the fabric manager does not run")
    return (*found, *said.splitlines())
