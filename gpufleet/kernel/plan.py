"""Decides what pins a kernel, with the driver's module that matches it, and what leaks."""

from __future__ import annotations

import fnmatch
import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cmp_to_key
from itertools import pairwise
from typing import Literal

from gpufleet.kernel.picture import (
    Family,
    Grub,
    Kernel,
    KernelPicture,
    Module,
    NextBoot,
    Package,
)
from gpufleet.managed.plan import ManagedFile, differing
from gpufleet.managed.plan import parse as parse_files
from gpufleet.render import text

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

#: What makes apt forget the pin for one command: a kernel that came past it, and that shall be
#: healed, needs headers that the pin forbids. Only for commands that name all they install.
PAST_THE_PIN = "-o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null"

#: What dnf versionlock holds; with kernel-devel a module can still be built, as it stays here.
RHEL_KERNEL = (
    "kernel",
    "kernel-core",
    "kernel-modules",
    "kernel-modules-core",
    "kernel-modules-extra",
    "kernel-devel",
    "kernel-devel-matched",
)

Drift = Literal["adopt", "revert"]

_NOT_THE_DRIVER = re.compile(r"(lib)?nvidia-(container|docker|cuda-|cudnn|cg-|visual|nsight)")
_DRIVER = re.compile(r"(lib)?nvidia-|cuda-drivers")
_DRIVER_SOURCE = re.compile(r"nvidia-(graphics-drivers|open-gpu|persistenced|modprobe)|fabric-")
_MODULES_META = re.compile(r"linux-(modules|objects)-nvidia-")
_DEBIAN_META = re.compile(r"linux-(image|headers)-(?![0-9])")
_RELEASE = re.compile(r"[0-9]+\.[0-9]+(\.[0-9]+)?[^ ]*-[a-z]")


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
    grub = _grub(found, one("grub_default"))
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


# --- GRUB -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """An entry of GRUB's menu; a submenu has entries of its own and no release."""

    title: str
    id: str
    release: str
    entries: tuple[Entry, ...] = ()


@dataclass
class _Open:
    """A brace of grub.cfg that is not closed yet; no title: it is no entry's."""

    title: str | None
    id: str = ""
    release: str = ""
    entries: tuple[Entry, ...] = ()


def menu(lines: Iterable[str]) -> tuple[str, tuple[Entry, ...]]:
    """The default that grub.cfg has, and its entries, as grub-mkconfig writes them.

    `${saved_entry}` is the default where GRUB_DEFAULT is `saved`.
    """
    default = ""
    stack = [_Open(None)]
    for line in lines:
        words = line.split(None, 1)
        if not words:
            continue
        if words[0] in {"menuentry", "submenu"}:
            stack.append(_opened(line))
        elif words[0] == "}":
            if len(stack) > 1:
                done = stack.pop()
                if done.title is not None:
                    entry = Entry(done.title, done.id, done.release, done.entries)
                    stack[-1].entries += (entry,)
        elif line.rstrip().endswith("{"):
            stack.append(_Open(None))
        elif words[0] in {"linux", "linux16", "linuxefi"}:
            image = words[1].split()[0].rpartition("/")[2] if len(words) > 1 else ""
            kernel = re.fullmatch(r"(?:vmlinuz|vmlinux|kernel)-(.+)", image)
            stack[-1].release = stack[-1].release or (kernel[1] if kernel else "")
        elif line.strip().startswith("set default="):
            value = line.strip().removeprefix("set default=").strip('"')
            if "next_entry" not in value and len(stack) == 1:
                default = value
    return default, stack[0].entries


def _opened(line: str) -> _Open:
    try:
        words = shlex.split(line)
    except ValueError:  # a title over several lines; its entry counts, its name does not
        words = line.split()
    title = words[1] if len(words) > 1 else ""
    for option, value in pairwise(words):
        if option in {"$menuentry_id_option", "--id"}:
            return _Open(title, value)
    return _Open(title)


def resolve(entries: Sequence[Entry], wanted: str) -> tuple[str, bool]:
    """The release that GRUB boots for a default, and whether the default names an entry.

    GRUB takes a number, a title or an id, and `>` between a submenu and what is in it; what it
    does not find is entry 0, without a word (normal/menu.c, get_entry_number and run_menu).
    """
    head, _, rest = wanted.replace(">>", "\0").partition(">")
    head = head.replace("\0", ">").strip()
    rest = rest.replace("\0", ">>")
    if not entries:
        return "", False
    number = int(head) if head.isdecimal() else None
    chosen = next(
        (
            entry
            for place, entry in enumerate(entries)
            if (place == number if number is not None else head and head in {entry.title, entry.id})
        ),
        None,
    )
    entry, whole = (entries[0], not head) if chosen is None else (chosen, True)
    if not entry.entries:
        return entry.release, whole and not rest
    release, found = resolve(entry.entries, rest if chosen is not None else "")
    return release, whole and found


def _entries(entries: Iterable[Entry], above: str = "") -> Iterable[tuple[str, str]]:
    for entry in entries:
        path = f"{above}{entry.id or entry.title.replace('>', '>>')}"
        if entry.entries:
            yield from _entries(entry.entries, f"{path}>")
        elif entry.release and "recovery" not in f"{entry.id} {entry.title}":
            yield path, entry.release


def _grub(found: dict[str, list[list[str]]], default: str) -> Grub:
    if not found["grub"]:
        return Grub(present=False)
    written, entries = menu("\t".join(values) for values in found["grub_cfg"])
    environment = {v[0]: v[1] for v in (_fields(v, 2) for v in found["grub_env"])}
    saved = environment.get("saved_entry", "")
    made = written or default
    chosen = saved if made in {"saved", "${saved_entry}"} else made
    release, resolved = resolve(entries, chosen)
    if made != chosen:
        reason = f"saved_entry {chosen}" if chosen else "no saved_entry: first entry of grub.cfg"
    elif made in {"", "0"}:
        reason = "first entry of grub.cfg"
    else:
        reason = f"GRUB_DEFAULT {made}"
    if chosen and not resolved:
        reason += " names no entry of grub.cfg: GRUB boots the first one without a word"
    return Grub(
        present=True,
        default=default,
        dropins=tuple(values[0] for values in found["grub_dropin"]),
        entries=tuple(_entries(entries)),
        saved_entry=saved,
        next_entry=environment.get("next_entry", ""),
        env_writable=bool(found["grub_writable"]),
        written=made,
        boots=release,
        boots_reason=reason,
        next_boots=resolve(entries, environment.get("next_entry", "")),
    )


def next_boot(kernels: Sequence[Kernel], grub: Grub, grubby: str = "") -> NextBoot:
    """The kernel that the next reboot starts: what grubby says, else GRUB's next_entry, its
    default, or, without GRUB, the newest kernel. `grubby` is a path such as /boot/vmlinuz-…"""
    if grubby:
        return NextBoot(grubby.rpartition("/")[2].partition("-")[2], "grubby --default-kernel")
    if grub.present and grub.next_entry:
        release, resolved = grub.next_boots
        reason = f"grubenv next_entry {grub.next_entry}"
        if not resolved:
            reason += " names no entry of grub.cfg: GRUB boots the first one without a word"
        return NextBoot(release or None, reason)
    if grub.present:
        return NextBoot(grub.boots or None, grub.boots_reason)
    if kernels:
        newest = max(kernels, key=lambda kernel: age(kernel.release))
        return NextBoot(newest.release, "no GRUB: the newest kernel that is installed")
    return NextBoot(None, "no GRUB and no kernel in /boot")


def grub_entry(picture: KernelPicture, release: str) -> str | None:
    """The id path of grub.cfg that boots exactly this kernel, whatever else is installed; None if
    there is none: the first entry of the menu is of the newest kernel, whichever that is."""
    for path, booted in picture.grub.entries:
        if booted == release and release in path.rpartition(">")[2]:
            return path
    return None


def _version_order(one: str, other: str) -> int:
    """dpkg's order of versions (deb-version(7)): <0, 0 or >0."""
    split = re.compile(r"([0-9]+)")
    ours, theirs = split.split(one), split.split(other)
    for place in range(max(len(ours), len(theirs))):
        a = ours[place] if place < len(ours) else ""
        b = theirs[place] if place < len(theirs) else ""
        if place % 2:
            order = int(a or 0) - int(b or 0)
        else:
            order = 0
            for index in range(max(len(a), len(b))):
                order = order or _weight(a[index : index + 1]) - _weight(b[index : index + 1])
        if order:
            return order
    return 0


def _weight(character: str) -> int:
    if character == "~":
        return -1
    if not character:
        return 0
    return ord(character) + (0 if character.isalpha() else 256)


#: Sorts kernel releases from old to new, as dpkg sorts versions.
age = cmp_to_key(_version_order)


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


def abi(release: str) -> str:
    """What flavours of one kernel share: 6.8.0-40 of 6.8.0-40-generic, 6.1.0-56 of
    6.1.0-56-cloud-amd64, 6.12.38+deb13 of 6.12.38+deb13-amd64."""
    parts = release.split("-")
    count = next((n for n, part in enumerate(parts) if not part[:1].isdigit()), len(parts))
    return "-".join(parts[: max(count, 1)])


def is_meta(package: Package) -> bool:
    """Whether a package brings whatever kernel is newest: the leaks of a pin."""
    name = package.name.partition(":")[0]
    if _RELEASE.search(name):
        return False
    return bool(
        package.source.startswith("linux-meta")
        or _DEBIAN_META.match(name)
        or _MODULES_META.match(name)
    )


def is_driver(package: Package) -> bool:
    """Whether a package is part of the driver: what runs beside a container is not."""
    if _NOT_THE_DRIVER.match(package.name):
        return False
    return bool(_DRIVER.match(package.name) or _DRIVER_SOURCE.match(package.source))


def _belongs(package: Package, release: str) -> bool:
    """Whether a package is of exactly this kernel, or headers that its flavours share."""
    name = package.name.partition(":")[0]
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
        and (is_meta(package) or is_driver(package) or _belongs(package, release))
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
    entry = grub_entry(picture, release)
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
        return tuple(_rhel_leaks(picture, release))
    if picture.family != "debian":
        return (f"{picture.os or 'this system'}: no pin is known for it: set kernel.pin to False",)
    return (
        *_hold_leaks(picture, release),
        *_preference_leaks(picture, release),
        *_unattended_leaks(picture, release),
        *_grub_leaks(picture, release),
    )


def audit(picture: KernelPicture, release: str) -> tuple[str, ...]:
    """The leaks of the pin, and holds that look like one and protect nothing."""
    return (*leaks(picture, release), *idle_holds(picture))


def idle_holds(picture: KernelPicture) -> tuple[str, ...]:
    """Holds on kernel or driver packages that are not installed: apt-mark lists them all the
    same."""
    if picture.family != "debian":
        return ()
    installed = {package.name for package in picture.packages if package.installed}
    return tuple(
        f"the hold on {name} protects nothing, it is not installed: apt-mark unhold {name}"
        for name in sorted(picture.holds - installed)
        if name.startswith("linux-") or _DRIVER.match(name)
    )


def _hold_leaks(picture: KernelPicture, release: str) -> Iterable[str]:
    intended = set(hold_set(picture, release))
    for package in picture.packages:
        name = package.name
        if name in intended and not package.held:
            why = ""
            if _MODULES_META.match(name) and is_meta(package):
                why = " and brings the next kernel in, without headers"
            elif is_meta(package):
                why = " and brings the next kernel in"
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
        if not any(_anchored(pattern, name) for pattern in patterns):
            yield f"unattended-upgrades may upgrade {name}: apply again to write {UNATTENDED}"
            break
    for option in ("Remove-Unused-Kernel-Packages", "Automatic-Reboot"):
        value = (values[option] or ["unset"])[-1]
        if value.lower() not in {"false", "0", "no", "off"}:
            yield (
                f"Unattended-Upgrade::{option} is {value}: apply again, and remove files of "
                f"/etc/apt/apt.conf.d that set it after {UNATTENDED.rpartition('/')[2]}"
            )


def _anchored(pattern: str, name: str) -> bool:
    try:
        return re.match(pattern, name) is not None
    except re.error:
        return False


def _grub_leaks(picture: KernelPicture, release: str) -> Iterable[str]:
    grub = picture.grub
    if not grub.present:
        return
    entry = grub_entry(picture, release)
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


# --- the RHEL family --------------------------------------------------------------------------


def rhel_locks(picture: KernelPicture) -> tuple[str, ...]:
    """Packages to lock at the version they have: the kernel's and the driver's, if installed."""
    return tuple(
        dict.fromkeys(
            package.name
            for package in picture.packages
            if package.installed
            and (
                package.name in RHEL_KERNEL
                or re.match(r"(k?mod-)?nvidia-|libnvidia-|cuda-drivers", package.name)
            )
            and not _NOT_THE_DRIVER.match(package.name)
        )
    )


def rhel_pin(picture: KernelPicture, release: str) -> tuple[str, ...]:
    """Commands that lock this kernel and the driver, and boot it by default.

    A kernel package is installed in several versions side by side, so its lock names the one.
    """
    commands = []
    specs = [
        f"{name}-{_nevra(release)}" if name in RHEL_KERNEL else name
        for name in rhel_locks(picture)
        if not _locked(picture, name)
    ]
    if specs:
        commands.append(shlex.join(["dnf", "-q", "versionlock", "add", *specs]))
    if picture.next_boot.release != release:
        commands.append(shlex.join(["grubby", "--set-default", f"/boot/vmlinuz-{release}"]))
    return tuple(commands)


def rhel_unpin(picture: KernelPicture) -> tuple[str, ...]:
    """Commands that lift gpufleet's own locks; other people's stay."""
    if not picture.own_holds:
        return ()
    return (shlex.join(["dnf", "-q", "versionlock", "delete", *picture.own_holds]),)


def _nevra(release: str) -> str:
    """5.14.0-427.el9.x86_64 -> 5.14.0-427.el9: a lock names version and release, any arch."""
    return re.sub(r"\.(x86_64|aarch64|ppc64le|s390x)$", "", release)


def _locked(picture: KernelPicture, name: str) -> bool:
    """Whether versionlock has a line for the package: NAME-EPOCH:VERSION-RELEASE.*, or in the
    TOML of dnf 5 its bare name. A line that begins with ! excludes one version: no lock."""
    shape = re.compile(rf"{re.escape(name)}(-(\d+:)?\d[^ -]*-[^ -]+)?")
    return any(shape.fullmatch(hold) for hold in picture.holds)


def _rhel_leaks(picture: KernelPicture, release: str) -> Iterable[str]:
    for name in rhel_locks(picture):
        if not _locked(picture, name):
            yield f"{name} is not locked: apply again, or dnf versionlock add {name}"
    if picture.next_boot.release != release:
        yield (
            f"{picture.next_boot.release} boots by default, not {release}: "
            f"grubby --set-default /boot/vmlinuz-{release}"
        )
    yield from rhel_warnings(picture)


def rhel_warnings(picture: KernelPicture) -> tuple[str, ...]:
    """What in dnf.conf breaks healing or the pin."""
    found = []
    for option, value in picture.dnf:
        if option.startswith("exclude") and any(
            fnmatch.fnmatchcase("kernel-devel", word) for word in re.split(r"[ ,]+", value)
        ):
            found.append(
                f"dnf.conf has {option}={value}, which keeps kernel-devel out too, so that no "
                "module can be built: remove it, the version lock pins the kernel"
            )
        elif option == "installonly_limit" and value.strip().isdecimal():
            limit = int(value)
            if 0 < limit <= len(picture.kernels):
                found.append(
                    f"dnf.conf has installonly_limit={limit} and {len(picture.kernels)} kernels "
                    "are installed: the next one evicts the oldest, be it pinned: set it to 0"
                )
    return tuple(found)
