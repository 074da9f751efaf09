"""Decides which driver a host gets: source, branch, module flavour and packages, with reasons."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from gpufleet.catalog import DriverPackages, Drivers, Generation
from gpufleet.driver.picture import Gpu, GpuPicture, Offer, Smi
from gpufleet.driver.verdict import FLAVOURS, Flavour
from gpufleet.kernel.picture import KernelPicture
from gpufleet.settings import Driver

Source = Literal["distribution", "nvidia", "nvidia-cn", "runfile", "present"]

#: From this branch on NVIDIA advises the open modules (its driver installation guide, Kernel
#: Modules).
_OPEN_ADVISED = 560

#: Keys that DKMS signs with, by the names that dkms, shim-signed and update-secureboot-policy
#: give them: one that the firmware trusts means that what DKMS builds is loaded.
_OWN_KEY = re.compile(r"DKMS|Secure Boot Module Signature|MOK", re.IGNORECASE)

#: A row of nvidia-smi: PCI address with eight digits of domain, name, MiB, driver version.
_ROW = re.compile(r"([0-9A-Fa-f]{8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-7]), (.*), ([^,]*), ([^,]*)")

_BRANCH = re.compile(r"-([1-9][0-9]{2})(?=-|$)")
_BOTH: frozenset[Flavour] = frozenset({"open", "proprietary"})


@dataclass(frozen=True)
class Choice:
    """The driver that a host shall have."""

    source: Source
    branch: str
    """Such as 535."""
    flavour: Flavour
    prebuilt: bool
    """ABI-versioned linux-modules-nvidia-* packages bring the module; else DKMS builds it."""
    packages: tuple[str, ...]
    """Userland, nvidia-smi, the module's source for DKMS, persistenced, fabric manager."""
    fabric_manager: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Refusal:
    """Why no driver fits; each finding is one line that ends with what to do."""

    findings: tuple[str, ...]


def parse(lines: Iterable[str]) -> GpuPicture:
    """Read the GPU script's lines: key, tab, tab-separated values; others are passed over.

    Raises ValueError for a line whose values are not the script's.
    """
    rows: dict[str, list[list[str]]] = {}
    for line in lines:
        key, tab, rest = line.partition("\t")
        if tab:
            rows.setdefault(key, []).append(rest.split("\t"))
        else:
            rows.setdefault(key, []).append([])

    def of(key: str, values: int) -> list[list[str]]:
        # Whoever carried the lines may have taken an empty value at the end away.
        return [[*row, *[""] * (values - len(row))] for row in rows.get(key, [])]

    def one(key: str) -> str:
        return of(key, 1)[0][0] if key in rows else ""

    units = _units(of("unit", 2))
    return GpuPicture(
        gpus=tuple(Gpu(address, device, bound) for address, device, bound in of("gpu", 3)),
        smi=_smi(of("smi", 1), of("smi_line", 1)),
        loaded=one("loaded"),
        userland=one("userland"),
        nouveau_loaded="nouveau" in rows,
        # Modules that use one another count as users too: those go together.
        refcount=sum(max(int(used) - int(by), 0) for used, by in of("module", 2)),
        holders=tuple(f"{name} (pid {pid})" for name, pid in of("holder", 2)),
        nvswitch="nvswitch" in rows,
        persistenced=units.get("nvidia-persistenced.service", "absent"),
        fabricmanager=units.get("nvidia-fabricmanager.service", "absent"),
        fabricmanager_version=one("fabricmanager"),
        devices=tuple(name for (name,) in of("device", 1)),
        owned=tuple((path, f"{mode} {digest}") for path, mode, digest in of("owned", 3)),
        lost=tuple(dict.fromkeys(address for (address,) in of("lost", 1))),
        offers=tuple(
            Offer(name, version, _moved(name, needs)) for name, version, needs in of("offer", 3)
        ),
    )


def _units(pairs: Iterable[list[str]]) -> dict[str, str]:
    """ActiveState by unit; a unit that there is none of is left out."""
    found: dict[str, dict[str, str]] = {}
    one: dict[str, str] = {}
    # systemctl show orders a unit's properties as it likes; a name that comes again is the next.
    for key, value in pairs:
        if key in one:
            one = {}
        one[key] = value
        if len(one) == 3:
            found[one["Id"]] = one
    return {
        name: properties["ActiveState"]
        for name, properties in found.items()
        if properties["LoadState"] != "not-found"
    }


def _smi(ended: list[list[str]], lines: list[list[str]]) -> Smi:
    if not ended:
        return Smi(installed=False)
    status = int(ended[0][0])
    if status == 127:  # the shell's word for: a name that leads to no program
        return Smi(installed=False)
    gpus: list[tuple[str, str, int]] = []
    version = ""
    complaints: list[str] = []
    for (line,) in lines:
        row = _ROW.fullmatch(line.strip())
        if row is None:
            complaints += [line.strip()] if line.strip() else []
            continue
        gpus.append((row[1], row[2], int(row[3]) if row[3].isdigit() else 0))
        version = row[4]
    error = "; ".join(dict.fromkeys(complaints))
    if status in (124, 137):  # timeout's own: it ran out, or had to kill
        error = "; ".join([*([error] if error else []), "nvidia-smi did not answer within 20 s"])
    elif status and not error:
        error = f"nvidia-smi ended with status {status} and said nothing"
    return Smi(True, tuple(gpus), version, error)


def _moved(name: str, needs: str) -> str:
    """The other branch that a transitional package depends on, empty if it is none."""
    branch = _BRANCH.search(name)
    if branch is None:
        return ""
    same = (
        rf"{re.escape(name[: branch.start(1)])}([1-9][0-9]{{2}}){re.escape(name[branch.end(1) :])}"
    )
    for need in re.split(r"[,|] *", needs):
        other = re.fullmatch(same, need.split(" ", 1)[0])
        if other and other[1] != branch[1]:
            return other[1]
    return ""


def choose(
    driver: Driver,
    kernels: KernelPicture,
    gpus: GpuPicture,
    drivers: Drivers,
    cuda: str | None,
) -> Choice | Refusal:
    """The driver for these GPUs, or every reason why none fits.

    `cuda` is the CUDA version of the environment, such as 13.0; None asks for none.
    """
    if not gpus.gpus:
        return Refusal(("no NVIDIA GPU on the PCI bus: set accelerator to cpu, or check the host",))
    return _Chooser(driver, kernels, gpus, drivers, cuda).choose()


def allowed(gpus: GpuPicture, drivers: Drivers) -> frozenset[Flavour]:
    """The module flavours that every GPU of the host takes; both where there is none."""
    flavours = _BOTH
    for gpu in gpus.gpus:
        flavours &= frozenset(_generation(gpu, drivers).modules)
    return flavours


def kernel_packages(choice: Choice, kernels: KernelPicture, release: str) -> tuple[str, ...]:
    """What exactly this kernel needs: its headers and, if prebuilt, its modules.

    Names for the RHEL family are dnf's specs, whose release has the architecture in it. EL 9 and
    later have a package that brings headers of the very kernel that is installed.
    """
    if kernels.family == "debian":
        headers = f"linux-headers-{release}"
    elif kernels.family == "rhel":
        old = _number(kernels.os_version) < 9
        headers = f"kernel-devel-{release}" if old else f"kernel-devel-matched-{release}"
    else:
        return ()
    if not choice.prebuilt:
        return (headers,)
    return headers, prebuilt_package(choice.branch, choice.flavour, release)


def prebuilt_package(branch: str, flavour: Flavour, release: str) -> str:
    """Ubuntu's package of the ready-made modules of one kernel.

    ABI-versioned: the metas of these jump kernel and driver together.
    """
    return f"linux-modules-nvidia-{branch}-server{_suffix(flavour)}-{release}"


def installed_branch(kernels: KernelPicture, gpus: GpuPicture) -> str:
    """The branch of the driver that is on the host, empty if there is none."""
    if gpus.userland or gpus.loaded:
        return (gpus.userland or gpus.loaded).partition(".")[0]
    for package in kernels.packages:
        if package.installed and package.source.startswith("nvidia-graphics-drivers"):
            found = re.match(r"(?:\d+:)?([1-9][0-9]{2})\.", package.version)
            if found:
                return found[1]
    return ""


def _number(version: str) -> int:
    """The first number of a version: the branch of a driver's."""
    found = re.match(r"\d+", version)
    return int(found[0]) if found else 0


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def _suffix(flavour: Flavour) -> str:
    return "-open" if flavour == "open" else ""


def _generation(gpu: Gpu, drivers: Drivers) -> Generation:
    """A GPU that the catalogue does not know is newer than it: taken as the newest there."""
    return drivers.generation(gpu.device) or list(drivers.generations.values())[-1]


class _Chooser:
    """One decision: what it starts from, and what was found on the way."""

    def __init__(
        self,
        driver: Driver,
        kernels: KernelPicture,
        gpus: GpuPicture,
        drivers: Drivers,
        cuda: str | None,
    ) -> None:
        self.driver, self.kernels, self.gpus, self.drivers = driver, kernels, gpus, drivers
        self.cuda = cuda
        self.floor = drivers.cuda.floors.get(cuda.partition(".")[0], "") if cuda else ""
        self.here = installed_branch(kernels, gpus)
        self.kept = False
        self.findings: list[str] = []
        self.reasons: list[str] = []

    def choose(self) -> Choice | Refusal:
        for gpu in self.gpus.gpus:
            if self.drivers.generation(gpu.device) is None:
                self.reasons.append(
                    f"{gpu.address} (10de:{gpu.device}) is not in catalog/drivers.yaml: taken as "
                    f"{_generation(gpu, self.drivers).title}, the newest there"
                )
        if self.cuda and not self.floor:
            majors = ", ".join(self.drivers.cuda.floors)
            self.findings.append(
                f"CUDA {self.cuda} is not in catalog/drivers.yaml: set driver.cuda to one of "
                f"{majors}, such as {self.drivers.environments.cuda}"
            )
        branch = self._branch()
        flavour = self._flavour(branch)
        if branch is None or flavour is None:
            return Refusal(tuple(dict.fromkeys(self.findings)))
        self._weigh(branch)
        prebuilt = self._prebuilt(branch, flavour)
        self._secure_boot(prebuilt)
        packages = self._packages(branch, flavour, prebuilt)
        if self.findings:
            return Refusal(tuple(dict.fromkeys(self.findings)))
        return Choice(
            self.driver.source,
            branch,
            flavour,
            prebuilt,
            packages,
            self.gpus.nvswitch,
            tuple(dict.fromkeys(self.reasons)),
        )

    # The branch.

    def _branch(self) -> str | None:
        source, wanted = self.driver.source, self.driver.branch
        if source == "present":
            return self._present(wanted)
        if source == "runfile":
            return self._runfile(wanted)
        had = self._had()
        if not had:
            self.findings.append(
                f"{self._system} has no driver packages that are known here: set driver.source to "
                "runfile, or to present with a driver of your own"
            )
            return None
        if wanted is not None:
            return self._asked(wanted, had)
        if self.here and not self._against(self.here):
            self.reasons.append(f"branch {self.here}: it is installed and fits")
            self._keep(had)
            return self.here
        fitting = [branch for branch in had if not self._against(branch)]
        if not fitting:
            self.findings += self._none_fits(had)
            return None
        best = fitting[0]
        support = self.drivers.branches[best].support if best in self.drivers.branches else "listed"
        why = f"the best that {self._origin} has" if len(had) > 1 else f"what {self._origin} has"
        self.reasons.append(f"branch {best} ({support}): {why}")
        if self.here:
            self.reasons.append(
                f"branch {self.here} is installed: {self._against(self.here)[0][0]}"
            )
        return best

    def _keep(self, had: list[str]) -> None:
        """Where the installed branch is had no more, asking for its packages would move it on."""
        if self.here not in had:
            self.kept = True
            self.reasons.append(
                f"{self._origin} has {self.here} no more: it stays as it is; to move on, set "
                f"driver.branch to {had[0]}"
            )

    @property
    def _system(self) -> str:
        return f"{self.kernels.os} {self.kernels.os_version}"

    @property
    def _origin(self) -> str:
        if self.driver.source in ("nvidia", "nvidia-cn"):
            return "NVIDIA's repository"
        return f"{self._system}'s archive"

    @property
    def _names(self) -> DriverPackages | None:
        """The catalogue's package names for source and system."""
        packages = self.drivers.packages
        if self.driver.source == "runfile":
            return packages.runfile
        if self.driver.source in ("nvidia", "nvidia-cn"):
            if self.kernels.family == "rhel":
                return packages.nvidia_rhel
            return packages.nvidia if self.kernels.os in ("debian", "ubuntu") else None
        if self.driver.source == "distribution":
            return {"debian": packages.debian, "ubuntu": packages.ubuntu}.get(self.kernels.os)
        return None

    def _had(self) -> list[str]:
        """Branches that the source has, best first: what the host's apt says, else the catalogue.

        Packages of a branch that stand for another one today are not had.
        """
        names = self._names
        if names is None:
            return []
        if self.driver.source != "distribution":
            pattern = r"(?:nvidia-open|cuda-drivers)-([1-9][0-9]{2})"
            known = list(self.drivers.branches)
        elif self.kernels.os == "debian":
            pattern = "nvidia-(?:open-)?kernel-dkms"
            known = list(names.branches.get(self.kernels.os_version, ()))
        else:
            pattern = r"nvidia-headless-no-dkms-([1-9][0-9]{2})-server(?:-open)?"
            known = list(names.branches.get(self.kernels.os_version, ()))
        offered = [
            found[1] if found.re.groups else str(_number(_upstream(offer.version)))
            for offer in self.gpus.offers
            if (found := re.fullmatch(pattern, offer.package)) and not offer.moved_to
        ]
        return sorted(dict.fromkeys(offered or known), key=self._worth)

    def _worth(self, branch: str) -> tuple[int, int]:
        known = self.drivers.branches.get(branch)
        order = ("lts", "production", "new-feature", "ended")
        support = known.support if known else "new-feature"
        return order.index(support), -int(branch)

    def _asked(self, wanted: str, had: list[str]) -> str | None:
        moved = {o.moved_to for o in self.gpus.offers if o.moved_to and f"-{wanted}" in o.package}
        if against := self._against(wanted):
            self.findings += [
                f"driver.branch {wanted}: {what}: set it to {need}" for what, need in against
            ]
        elif wanted in had:
            self.reasons.append(f"branch {wanted}: driver.branch says so")
            return wanted
        elif wanted == self.here:
            self.reasons.append(f"branch {wanted}: driver.branch says so, and it is installed")
            self._keep(had)
            return wanted
        elif moved:
            to = ", ".join(sorted(moved))
            self.findings.append(
                f"driver.branch {wanted}: {self._origin} gives {to} to who asks for it: set "
                f"driver.branch to {to}, or driver.source to nvidia"
            )
        else:
            self.findings.append(
                f"driver.branch {wanted}: {self._origin} has {', '.join(had)}: set driver.branch "
                "to one of these, or driver.source to nvidia"
            )
        return None

    def _present(self, wanted: str | None) -> str | None:
        if not self.here:
            self.findings.append(
                "driver.source is present and there is no driver: install one, or set driver.source"
            )
            return None
        if wanted not in (None, self.here):
            self.findings.append(
                f"driver.branch {wanted}: driver {self.here} is present: leave driver.branch out, "
                "or set driver.source"
            )
        self.findings += [
            f"the driver that is present: {what}: install {need}, or set driver.source"
            for what, need in self._against(self.here)
        ]
        self.reasons.append(f"branch {self.here}: it is present")
        return self.here

    def _runfile(self, wanted: str | None) -> str | None:
        if self.driver.runfile is None:
            self.findings.append(
                "driver.source is runfile and driver.runfile is not set: set it to the .run file "
                "on this machine"
            )
            return None
        name = self.driver.runfile.rpartition("/")[2]
        found = re.fullmatch(r"NVIDIA-Linux-x86_64-([1-9][0-9]{2})(\.[0-9]+)+(-[a-z]+)?\.run", name)
        if found is None:
            self.findings.append(
                f"driver.runfile {name}: its version is not in its name: keep NVIDIA's name, "
                "NVIDIA-Linux-x86_64-VERSION.run"
            )
            return None
        if wanted not in (None, found[1]):
            self.findings.append(
                f"driver.branch {wanted}: driver.runfile is of branch {found[1]}: leave "
                "driver.branch out, or give another file"
            )
        self.findings += [
            f"driver.runfile {name}: {what}: give a file of {need}"
            for what, need in self._against(found[1])
        ]
        self.reasons.append(f"branch {found[1]}: driver.runfile is {name}")
        return found[1]

    def _against(self, branch: str) -> list[tuple[str, str]]:
        """What speaks against a branch, CUDA and every generation, and which branch it takes."""
        found: list[tuple[str, str]] = []
        if self.floor and int(branch) < int(self.floor):
            need = f"{self.floor} or later"
            found.append(
                (f"CUDA {self.cuda} of the environment needs driver {need}, not {branch}", need)
            )
        for cards, generation in self._generations():
            if int(branch) < int(generation.first):
                need = f"{generation.first} or later"
                found.append((f"{cards} needs driver {need}, not {branch}", need))
            elif generation.last and int(branch) > int(generation.last):
                need = f"{generation.last} or earlier"
                found.append((f"{cards} is driven up to {generation.last}, not by {branch}", need))
            elif not self._of_branch(branch) & frozenset(generation.modules):
                lacks = f"{cards} takes {generation.modules[0]} modules, which {branch} has not"
                found.append((lacks, "another branch"))
        return found

    def _of_branch(self, branch: str | None) -> frozenset[Flavour]:
        """The module flavours that a branch has."""
        known = self.drivers.branches.get(branch or "")
        return frozenset(known.modules) if known else _BOTH

    def _generations(self) -> list[tuple[str, Generation]]:
        """Every generation of the host, with the words that name its GPUs."""
        cards: dict[str, list[Gpu]] = {}
        for gpu in self.gpus.gpus:
            cards.setdefault(_generation(gpu, self.drivers).title, []).append(gpu)
        return [
            (
                f"{title} GPU {gpus[0].address}" + (f" and {len(gpus) - 1} more" * (len(gpus) > 1)),
                _generation(gpus[0], self.drivers),
            )
            for title, gpus in cards.items()
        ]

    def _none_fits(self, had: list[str]) -> list[str]:
        """Why no branch of the source fits: first what no source could help with."""
        lines = []
        for cards, generation in self._generations():
            if generation.last and self.floor and int(generation.last) < int(self.floor):
                lines.append(
                    f"{cards} is driven up to {generation.last} and CUDA {self.cuda} of the "
                    f"environment needs {self.floor} or later: use another GPU, or set accelerator "
                    "to cpu"
                )
        first = max(self._generations(), key=lambda pair: int(pair[1].first))
        lasting = [pair for pair in self._generations() if pair[1].last]
        last = min(lasting, key=lambda pair: int(pair[1].last or 0), default=None)
        if last and int(last[1].last or 0) < int(first[1].first):
            lines.append(
                f"{last[0]} is driven up to {last[1].last} and {first[0]} from {first[1].first} "
                "on: no driver takes both, put them into different hosts"
            )
        if lines:
            return lines
        elsewhere = [
            branch
            for branch in sorted(self.drivers.branches, key=self._worth)
            if not self._against(branch)
        ]
        for branch in had[:1]:  # the best of them says it for all
            for what, _ in self._against(branch):
                lines.append(
                    f"{self._origin} has driver {', '.join(had)}: {what}: "
                    + (
                        f"set driver.source to nvidia, which has {elsewhere[0]}"
                        if elsewhere and self.driver.source == "distribution"
                        else "set driver.source to runfile with a driver that fits"
                    )
                )
        return lines

    def _weigh(self, branch: str) -> None:
        """What a person should know of a branch that fits."""
        known = self.drivers.branches.get(branch)
        if known is not None and known.support == "ended":
            until = f" since {known.until}" if known.until else ""
            self.reasons.append(f"branch {branch} gets no fixes{until}: plan to move on")
        pair = self.drivers.cuda.pairs.get(self.cuda or "")
        if not pair:
            return
        version = self._version(branch)
        if (_numbers(version) if "." in version else (int(branch), 10**6)) < _numbers(pair):
            self.reasons.append(
                f"driver {version} is older than {pair}, which CUDA {self.cuda} came with: it runs "
                "what is built for this GPU, and may fail at what is compiled as it runs (PTX)"
            )

    def _version(self, branch: str) -> str:
        """The version that the host would have, or the branch alone where nothing tells."""
        if _number(self.gpus.userland) == int(branch):
            return self.gpus.userland
        for offer in self.gpus.offers:
            version = _upstream(offer.version)
            if _number(version) == int(branch) and not offer.package.startswith("linux-"):
                return version
        return branch

    # The flavour.

    def _flavour(self, branch: str | None) -> Flavour | None:
        taken = allowed(self.gpus, self.drivers)
        if not taken:
            self.findings.append(
                "no module flavour drives all GPUs: "
                + ", ".join(
                    f"{cards} takes {generation.modules[0]} modules"
                    for cards, generation in self._generations()
                )
                + ": put them into different hosts"
            )
            return None
        modules, there = self.driver.modules, self._flavour_here()
        if self.driver.source == "present" and there and modules in ("auto", there):
            if there not in taken:
                self.findings += self._not_taken(there)
            return there
        if modules != "auto":
            if modules not in taken:
                self.findings += self._not_taken(modules)
            if modules not in self._of_branch(branch):
                self.findings.append(
                    f"driver.modules {modules}: branch {branch} has none: set driver.modules to "
                    "auto, or another driver.branch"
                )
            self.reasons.append(f"{modules} modules: driver.modules says so")
            return modules
        if len(taken) == 1:
            (only,) = taken
            self.reasons.append(f"{only} modules: the only ones that all GPUs take")
            return only
        if len(self._of_branch(branch)) == 1:
            (only,) = self._of_branch(branch)
            self.reasons.append(f"{only} modules: the only ones that branch {branch} has")
            return only
        if there and branch == self.here:
            self.reasons.append(f"{there} modules: they are installed and fit")
            return there
        advised: Flavour = "open" if branch and int(branch) >= _OPEN_ADVISED else "proprietary"
        self.reasons.append(f"{advised} modules: what NVIDIA advises for branch {branch}")
        return advised

    def _not_taken(self, flavour: Flavour) -> list[str]:
        return [
            f"{cards} does not take {flavour} modules: set driver.modules to auto"
            for cards, generation in self._generations()
            if flavour not in generation.modules
        ]

    def _flavour_here(self) -> Flavour | None:
        """The flavour that is installed: the running kernel's, else any kernel's."""
        first = self.kernels.kernel(self.kernels.running)
        for kernel in (first, *self.kernels.kernels):
            if kernel is not None and kernel.module and kernel.module.license in FLAVOURS:
                return FLAVOURS[kernel.module.license]
        return None

    # Packages.

    def _prebuilt(self, branch: str, flavour: Flavour) -> bool:
        """Whether the archive has ready-made modules for every kernel that runs or boots next."""
        names = self._names
        if names is None or not names.prebuilt:
            return False
        installed = {package.name for package in self.kernels.packages if package.installed}
        dkms = {f"nvidia-dkms-{branch}-server", f"nvidia-dkms-{branch}-server-open"} & installed
        if dkms and not self.kernels.secure_boot:
            self.reasons.append(f"DKMS: {', '.join(sorted(dkms))} is installed and goes first")
            return False
        releases = dict.fromkeys(
            (self.kernels.running, self.kernels.next_boot.release or self.kernels.running)
        )
        offers = {offer.package for offer in self.gpus.offers if not offer.moved_to}
        for release in releases:
            package = prebuilt_package(branch, flavour, release)
            if package in installed | offers:
                continue
            kind = re.sub(r"^[0-9.]+-[0-9]+-", "", release)
            if offers or kind not in names.prebuilt:
                self.reasons.append(f"DKMS: no ready-made module for kernel {release}")
                return False
        self.reasons.append("ready-made modules, signed by the distribution")
        return True

    def _secure_boot(self, prebuilt: bool) -> None:
        if not self.kernels.secure_boot or prebuilt:
            return
        running = self.kernels.kernel(self.kernels.running)
        signer = running.module.signer if running and running.module else ""
        trusted = self.kernels.trusted_signers
        if (signer and signer in trusted) or any(map(_OWN_KEY.search, trusted)):
            return
        ubuntu = self.kernels.os == "ubuntu" and self.driver.source != "distribution"
        self.findings.append(
            "Secure Boot is on and no key that DKMS could sign with is enrolled: "
            + ("set driver.source to distribution, whose modules are signed, or " * ubuntu)
            + "enrol one at the host's console (mokutil --import), or turn Secure Boot off"
        )

    def _packages(self, branch: str, flavour: Flavour, prebuilt: bool) -> tuple[str, ...]:
        names = self._names
        wanted: list[str] = []
        if names is not None:
            wanted += names.userland
            if not prebuilt:
                wanted += names.open if flavour == "open" else names.proprietary
        if self.gpus.nvswitch:
            wanted += self._fabric(names, branch)
        fill = {"branch": branch, "open": _suffix(flavour)}
        filled = dict.fromkeys(name.format(**fill) for name in wanted)
        here = {package.name for package in self.kernels.packages if package.installed}
        return tuple(name for name in filled if name in here or not self.kept)

    def _fabric(self, names: DriverPackages | None, branch: str) -> tuple[str, ...]:
        """What manages the NVSwitches, in exactly the driver's version."""
        if names is None or not names.fabric_manager:
            if self.gpus.fabricmanager == "absent":
                whose = {
                    "present": "and is not there: install nvidia-fabricmanager in the driver's "
                    "version",
                    "runfile": "which a .run file does not bring: set driver.source to nvidia",
                }.get(
                    self.driver.source,
                    f"which {self._origin} does not have: set driver.source to nvidia",
                )
                self.findings.append(
                    f"the NVSwitches of this host need the fabric manager, {whose}"
                )
            return ()
        self.reasons.append("fabric manager: the GPUs are joined by NVSwitches")
        if not any(generation.subnet_manager for _, generation in self._generations()):
            return names.fabric_manager
        if not names.subnet_manager:
            self.findings.append(
                f"the NVLink switches of this host need NVIDIA's subnet manager (nvlsm), which "
                f"{self._origin} does not have: set driver.source to nvidia"
            )
        return names.fabric_manager + names.subnet_manager


def _upstream(version: str) -> str:
    """The driver's version in a package's: 535.261.03 of 535.261.03-1~deb12u1."""
    found = re.match(r"(?:\d+:)?([0-9]+(?:\.[0-9]+)*)", version)
    return found[1] if found else ""


def runfile_version(filename: str) -> str:
    """The driver version in a .run file's name, empty if it has none."""
    found = re.fullmatch(r"NVIDIA-Linux-[a-z0-9_]+-(\d+(?:\.\d+)+)(?:-.*)?\.run", filename)
    return found[1] if found else ""
