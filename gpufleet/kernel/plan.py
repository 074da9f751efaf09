"""Decides what pins a kernel, with the driver's module that matches it, and what leaks."""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from gpufleet.kernel import rhel
from gpufleet.kernel.grub import entry_of, next_boot, read
from gpufleet.kernel.packages import bare, concerns_gpu, is_driver, is_meta, is_modules
from gpufleet.kernel.picture import (
    Family,
    Grub,
    Kernel,
    KernelPicture,
    Module,
    Package,
)
from gpufleet.kernel.release import abi, age
from gpufleet.managed.plan import ManagedFile, differing
from gpufleet.managed.plan import parse as parse_files
from gpufleet.render import text
from gpufleet.upgrade.plan import begins

#: What gpufleet notes on a host: the release that it pinned, and the packages that it held.
PIN = "/var/lib/gpufleet/kernel-pin"
HOLDS = "/var/lib/gpufleet/kernel-holds"

#: apt reads /etc/apt/preferences first, then this folder in the order of names, and takes the
#: first stanza that names a package (apt_preferences(5)): this one is to come first.
PREFERENCES = "/etc/apt/preferences.d/00-gpufleet-kernel.pref"
#: Of apt.conf.d the last value counts, of grub.d the last assignment.
UNATTENDED = "/etc/apt/apt.conf.d/zz-gpufleet-kernel"
GRUB = "/etc/default/grub.d/zz-gpufleet.cfg"
FILES = (PREFERENCES, UNATTENDED, GRUB)

#: Start-anchored patterns of unattended-upgrades (re.match in unattended-upgrade).
BLACKLIST = (
    "linux-(?!base$|firmware|libc-dev)",
    "nvidia-(?!container|docker)",
    "libnvidia-(?!container)",
    "libcuda1",
    "libnv(cuvid|optix)",
    "cuda-drivers",
    "firmware-nvidia",
    "xserver-xorg-video-nvidia",
)

Drift = Literal["adopt", "revert"]


# --- the host's picture -----------------------------------------------------------------------


def parse(lines: Iterable[str]) -> KernelPicture:
    """Read the lines of KernelFacts: a key and its values, split by tabs.

    Raises ValueError for output that is not the script's.
    """
    found: defaultdict[str, list[list[str]]] = defaultdict(list)
    files: list[str] = []
    for line in lines:
        key, *values = line.split("\t")
        if key in {"file", "record"}:
            files.append(line)
        else:
            found[key].append(values)

    def one(key: str, place: int = 0) -> str:
        values = found[key][0] if found[key] else []
        return values[place] if place < len(values) else ""

    family = _family(one("os"), one("os", 1))
    kernels = tuple(
        sorted((_kernel(values, found) for values in found["kernel"]), key=lambda k: age(k.release))
    )
    grub = Grub(present=False)
    if found["grub"]:
        grub = read(
            ("\t".join(values) for values in found["grub_cfg"]),
            dict(_fields(values, 2) for values in found["grub_env"]),
            one("grub_default"),
            [values[0] for values in found["grub_dropin"]],
            writable=bool(found["grub_writable"]),
        )
    return KernelPicture(
        family=family,
        os=one("os"),
        os_version=one("os", 2),
        running=one("running"),
        boot_id=one("boot_id"),
        kernels=kernels,
        next_boot=next_boot(kernels, grub, one("grubby")),
        grub=grub,
        boot_free_kib=int(one("boot_free_kib") or 0),
        secure_boot=bool(found["secure_boot"]),
        packages=tuple(Package(*_fields(values, 5)) for values in found["package"]),
        holds=frozenset(values[0] for values in found["hold"]),
        preferences=_texts(found["preference"]),
        unattended=tuple(
            (option.removesuffix("::"), value)
            for option, value in (_fields(values, 2) for values in found["unattended"])
        ),
        audit=tuple(values[0] for values in found["audit"]),
        broken=one("broken").strip(),
        runfile=bool(found["runfile"]),
        apt_lock=one("apt_lock"),
        pinned=one("pinned"),
        own_holds=tuple(values[0] for values in found["own_hold"] if values and values[0]),
        managed=parse_files(files),
        nouveau_blacklisted=bool(found["nouveau_blacklisted"]),
        trusted_signers=tuple(dict.fromkeys(values[0] for values in found["trusted"])),
        dnf=tuple((option, value) for option, value in (_fields(v, 2) for v in found["dnf"])),
    )


def _fields(values: Sequence[str], count: int) -> list[str]:
    return [*values, *[""] * count][:count]


def _family(os: str, like: str) -> Family:
    names = {os, *like.split()}
    if names & {"debian", "ubuntu"}:
        return "debian"
    # TencentOS 2 and 3 call themselves tencentos and are like rhel, fedora or centos.
    return "rhel" if names & {"rhel", "centos", "fedora", "tencentos"} else "other"


def _kernel(values: Sequence[str], found: dict[str, list[list[str]]]) -> Kernel:
    release, headers, size, nouveau = _fields(values, 4)
    modules = [_fields(each, 6) for each in found["module"] if each[0] == release]
    errors = [_fields(each, 2)[1] for each in found["dkms_error"] if each[0] == release]
    return Kernel(
        release=release,
        headers=headers == "yes",
        initrd_bytes=None if size in {"", "-"} else int(size),
        nouveau_in_initrd=nouveau == "yes",
        module=Module(*modules[0][1:]) if modules else None,
        dkms=tuple((each[1], each[2]) for each in found["dkms"] if each[0] == release),
        # Where DKMS builds and the compiler's option are long and say nothing: the rest counts.
        dkms_error=re.sub(r"/var/lib/dkms/\S+/build/| \[-W\S+\]$", "", " ".join(errors[0].split()))
        if errors
        else "",
    )


def _texts(lines: Iterable[Sequence[str]]) -> tuple[tuple[str, str], ...]:
    """(file, text) of lines that each name their file."""
    texts: dict[str, list[str]] = {}
    for path, *rest in lines:
        texts.setdefault(path, []).append("\t".join(rest))
    return tuple((path, "\n".join(lines) + "\n") for path, lines in texts.items())


# --- what is pinned ---------------------------------------------------------------------------


def target(picture: KernelPicture, drift: Drift) -> str:
    """The release to pin: the one that runs, or with `revert` the one that was pinned."""
    return picture.pinned if drift == "revert" and picture.pinned else picture.running


def missing(picture: KernelPicture, drift: Drift) -> str:
    """One line if the kernel to pin is not installed, empty if it is."""
    release = target(picture, drift)
    if picture.kernel(release) is not None:
        return ""
    if release != picture.running:
        return (
            f"kernel {release}, which was pinned, is not installed any more: install it again, or "
            "set kernel.drift to adopt"
        )
    return f"kernel {release} runs and is not in /boot: boot an installed kernel, then apply"


def _belongs(package: Package, release: str) -> bool:
    """Whether a package is of exactly this kernel, or headers that its flavours share."""
    name = bare(package.name)
    shared = re.escape(abi(release))
    return name.startswith("linux-") and bool(
        name.endswith((f"-{release}", f"-{release}-unsigned"))
        # linux-headers-6.8.0-40, linux-hwe-6.8-headers-6.8.0-40, linux-headers-6.1.0-56-common
        or re.fullmatch(rf"linux-(.+-)?headers-{shared}(-common(-.+)?)?", name)
    )


def hold_set(picture: KernelPicture, release: str) -> tuple[str, ...]:
    """The packages that a pin of this kernel holds: of those that are installed, and no others,
    because a hold on anything else protects nothing."""
    return tuple(
        package.name
        for package in picture.packages
        if package.installed
        and (
            is_meta(package.name, package.source)
            or is_driver(package.name, package.source)
            or _belongs(package, release)
        )
    )


def _kept(picture: KernelPicture, release: str) -> list[str]:
    """Names that the preferences allow: the pinned kernel's, and headers of all that are here."""
    names = [
        f"linux-{kind}-{release}"
        for kind in ("image", "image-unsigned", "modules", "modules-extra")
    ]
    if picture.os != "ubuntu":
        names[1:] = [f"linux-image-{release}-unsigned"]
    others = [kernel.release for kernel in picture.kernels if kernel.release != release]
    for each in (release, *others):
        shared = abi(each)
        common = [f"linux-headers-{shared}"]
        if picture.os != "ubuntu":
            common = [f"linux-headers-{shared}-common"]
            if each.removeprefix(shared).startswith("-rt-"):
                common.append(f"linux-headers-{shared}-common-rt")
        names += [f"linux-headers-{each}", *common]
    return list(dict.fromkeys(names))


def pin_files(picture: KernelPicture, release: str) -> list[ManagedFile]:
    """The files of the pin: what apt may install, what unattended-upgrades must leave alone, and
    what GRUB boots, where there is GRUB and grub.cfg has an entry for this kernel."""
    if picture.family != "debian":
        return []
    preferences = text("kernel-preferences.j2", release=release, kept=_kept(picture, release))
    unattended = text("kernel-unattended-upgrades.j2", release=release, blacklist=BLACKLIST)
    files = [
        ManagedFile(PREFERENCES, preferences),
        # Names a file of apt's syntax; apt-config fails on one that it cannot read.
        ManagedFile(UNATTENDED, unattended, validate="apt-config shell _ _ -c {}"),
    ]
    entry = entry_of(picture.grub, release)
    if picture.grub.present and entry is not None:
        grub = text("grub-default.j2", release=release, entry=entry)
        files.append(ManagedFile(GRUB, grub, validate="sh -n {}"))
    return files


def unwritten(picture: KernelPicture, release: str) -> list[ManagedFile]:
    """The files of the pin that are not on the host as they should be."""
    return differing(pin_files(picture, release), picture.managed)


@dataclass(frozen=True)
class Holds:
    """What to change about holds, and what gpufleet then calls its own."""

    add: tuple[str, ...]
    remove: tuple[str, ...]
    own: tuple[str, ...]

    known: tuple[str, ...]
    """What it called its own so far."""

    @property
    def nothing(self) -> bool:
        return not (self.add or self.remove) and set(self.own) == set(self.known)


def holds(picture: KernelPicture, release: str) -> Holds:
    """From the holds in force to those intended. A hold that is not gpufleet's stays, and stays
    somebody else's, also where the pin wants it too."""
    wanted = hold_set(picture, release)
    held = {package.name for package in picture.packages if package.held}
    add = tuple(name for name in wanted if name not in held)
    # A package that went may be unknown to apt-mark by now, and its hold went with it.
    stale = tuple(n for n in picture.own_holds if n not in wanted and n in picture.holds)
    own = tuple(name for name in wanted if name in add or name in picture.own_holds)
    return Holds(add, stale, own, picture.own_holds)


# --- what leaks -------------------------------------------------------------------------------


def leaks(picture: KernelPicture, release: str) -> tuple[str, ...]:
    """Every way in which the pin of this kernel is not in force; each says what to do."""
    if picture.family == "rhel":
        return tuple(rhel.leaks(picture, release))
    if picture.family != "debian":
        return (f"{picture.os or 'this system'}: no pin is known for it: set kernel.pin to False",)
    return (
        *_hold_leaks(picture, release),
        *_preference_leaks(picture, release),
        *_unattended_leaks(picture, release),
        *_grub_leaks(picture, release),
    )


def idle_holds(picture: KernelPicture) -> tuple[str, ...]:
    """Packages of kernel and driver that are held and not installed: apt-mark lists them all the
    same, and the hold protects nothing."""
    if picture.family != "debian":
        return ()
    installed = {package.name for package in picture.packages if package.installed}
    return tuple(name for name in sorted(picture.holds - installed) if concerns_gpu(name))


def _hold_leaks(picture: KernelPicture, release: str) -> Iterable[str]:
    intended = set(hold_set(picture, release))
    for package in picture.packages:
        name = package.name
        if name in intended and not package.held:
            why = ""
            if is_meta(name, package.source):
                why = " and brings the next kernel in"
                why += ", without headers" * is_modules(name)
            yield f"{name} is not held{why}: apply again, or apt-mark hold {name}"
    if not any(
        package.installed
        and re.fullmatch(rf"linux-image-(unsigned-)?{re.escape(release)}(-unsigned)?", package.name)
        for package in picture.packages
    ):
        yield f"no package of kernel {release} is installed: nothing holds it; install its image"


def _preference_leaks(picture: KernelPicture, release: str) -> Iterable[str]:
    ours = next(file for file in pin_files(picture, release) if file.path == PREFERENCES)
    texts = dict(picture.preferences)
    if texts.get(PREFERENCES, "").strip() != ours.content.strip():
        what = "does not pin this kernel" if PREFERENCES in texts else "is missing"
        yield f"{PREFERENCES} {what}: apply again"
    names = [
        f"linux-image-{release}",
        "linux-image-999.0.0-1-amd64",
        "linux-image-999.0.0-1-generic",
    ]
    for path, content in picture.preferences:
        if path == PREFERENCES or not _read_first(path, PREFERENCES):
            continue
        for patterns, priority in stanzas(content):
            for name in names:
                if any(_matches(pattern, name) for pattern in patterns) and (
                    (name != names[0]) == (priority >= 0)
                ):
                    yield (
                        f"{path} gives {' '.join(patterns)} priority {priority}, and apt reads it "
                        f"before {PREFERENCES}: remove that stanza"
                    )
                    break


def _read_first(path: str, other: str) -> bool:
    return path == "/etc/apt/preferences" or path < other


def stanzas(content: str) -> Iterable[tuple[list[str], int]]:
    """(patterns of Package, priority) of each stanza of an apt preferences file that names
    packages; `Package: *` alone is the general form, which never outranks a name."""
    lines = [line for line in content.splitlines() if not line.startswith("#")]
    for block in re.split(r"\n[ \t]*\n", "\n".join(lines)):
        fields = dict(re.findall(r"(?mi)^([a-z-]+):[ \t]*(.*(?:\n[ \t].*)*)$", block))
        values = {key.lower(): value for key, value in fields.items()}
        patterns = values.get("package", "").split()
        priority = values.get("pin-priority", "").strip()
        if patterns and patterns != ["*"] and re.fullmatch(r"[+-]?[0-9]+", priority):
            yield patterns, int(priority)


def _matches(pattern: str, name: str) -> bool:
    if len(pattern) > 2 and pattern[0] == pattern[-1] == "/":
        try:
            return re.search(pattern[1:-1], name) is not None
        except re.error:
            return False
    return fnmatch.fnmatchcase(name, pattern)


def _unattended_leaks(picture: KernelPicture, release: str) -> Iterable[str]:
    values: defaultdict[str, list[str]] = defaultdict(list)
    for option, value in picture.unattended:
        values[option.removeprefix("Unattended-Upgrade::")].append(value)
    patterns = [value for value in values["Package-Blacklist"] if value]
    names = [f"linux-image-{release}", *hold_set(picture, release)]
    for name in names:
        if not any(begins(pattern, name) for pattern in patterns):
            yield f"unattended-upgrades may upgrade {name}: apply again to write {UNATTENDED}"
            break
    for option in ("Remove-Unused-Kernel-Packages", "Automatic-Reboot"):
        value = (values[option] or ["unset"])[-1]
        if value.lower() not in {"false", "0", "no", "off"}:
            yield (
                f"Unattended-Upgrade::{option} is {value}: apply again, and remove files of "
                f"/etc/apt/apt.conf.d that set it after {UNATTENDED.rpartition('/')[2]}"
            )


def _grub_leaks(picture: KernelPicture, release: str) -> Iterable[str]:
    grub = picture.grub
    if not grub.present:
        return
    entry = entry_of(picture.grub, release)
    if entry is None:
        yield f"grub.cfg has no entry of its own for kernel {release}: install it, run update-grub"
        return
    later = [path for path in grub.dropins if path > GRUB]
    for path in later:
        yield f"{path} sets GRUB_DEFAULT after {GRUB}: remove it there, then apply"
    if not later and GRUB not in grub.dropins:
        yield f"{GRUB} is missing: apply again"
    elif not later and grub.default != entry:
        yield f"GRUB_DEFAULT is {grub.default or 'unset'}, not {entry}: apply again"
    if grub.boots != release:
        boots = grub.boots or "nothing that is known"
        yield f"GRUB boots {boots} by default, not {release} ({grub.boots_reason}): run update-grub"
