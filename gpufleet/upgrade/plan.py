"""Reads what apt would do at the next upgrade, by hand and through unattended-upgrades."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

#: Lists that are older do not know what the archive offers today; apt-daily.timer renews them
#: once a day.
LISTS_OLD_S = 3 * 86_400


@dataclass(frozen=True)
class Change:
    """One package of the transaction."""

    name: str
    old: str | None
    """Version that is installed, None for a package that comes new."""
    new: str | None
    """Version that comes, None for a package that is removed."""
    origins: tuple[str, ...] = ()
    """Where the version comes from, as apt prints it: LABEL:VERSION/ARCHIVE."""

    @property
    def is_new(self) -> bool:
        return self.old is None

    @property
    def is_removed(self) -> bool:
        return self.new is None


@dataclass(frozen=True)
class Origin:
    """One package source, as its Release file names it."""

    origin: str
    label: str
    archive: str
    codename: str
    component: str
    site: str
    version: str

    @property
    def short(self) -> str:
        """As the simulation's lines name it (apt-pkg's VerIterator::RelStr)."""
        place = f"{self.version}/{self.archive}" if self.version else self.archive
        return f"{self.label}:{place}"


@dataclass(frozen=True)
class Unattended:
    """How unattended-upgrades is set up; it upgrades by itself where `active`."""

    active: bool
    patterns: tuple[str, ...]
    """Allowed origins as key=value,… ; variables of the distribution are filled in."""
    blacklist: tuple[str, ...]
    """Regular expressions that a package's name must not begin with."""
    reboots: bool
    """Automatic-Reboot."""

    def allows(self, origin: Origin) -> bool:
        """Whether upgrades from there happen by themselves."""
        return any(_matches(pattern, origin) for pattern in self.patterns)

    def spares(self, name: str) -> bool:
        """Whether the blacklist keeps this package as it is."""
        return any(begins(pattern, name) for pattern in self.blacklist)


@dataclass(frozen=True)
class Upgrade:
    """What the next upgrade does to a host."""

    available: bool
    """False where the host has no apt-get, so that nothing can be said."""
    changes: tuple[Change, ...] = ()
    kept_back: tuple[str, ...] = ()
    """Packages that stay though newer ones exist: held, or their dependencies are."""
    error: str = ""
    """Why apt refuses, empty if it does not."""
    lists_age_s: int | None = None
    """Seconds since the package lists were renewed, None if there are none."""
    unattended: Unattended | None = None
    """None where unattended-upgrades is not installed."""
    origins: tuple[Origin, ...] = ()
    came_from: tuple[tuple[str, str], ...] = ()
    """(driver package, `Origin` it was installed from or nothing if no source has its version)."""

    @property
    def stale(self) -> bool:
        """Whether the lists are too old to tell what the archive offers."""
        return self.lists_age_s is None or self.lists_age_s > LISTS_OLD_S


@dataclass(frozen=True)
class State:
    """The packages of a host and how apt is set up there."""

    digest: str
    """The same on hosts whose next upgrade is the same; empty without apt."""
    lists_age_s: int | None
    """As of `Upgrade`, but of this very host."""


#: What is known of a host without apt.
NONE = Upgrade(available=False)


def parse(lines: Iterable[str]) -> Upgrade:
    """Read the NextUpgrade fact's lines: apt's own, below headings that begin with `== `."""
    sections: dict[str, list[str]] = {}
    current: list[str] = []
    for line in lines:
        if line.startswith("== "):
            current = sections.setdefault(line[3:], [])
        else:
            current.append(line)
    if "simulation" not in sections:
        return NONE
    simulation = sections["simulation"]
    system = {
        key: value.strip('"')
        for key, _, value in (line.partition("=") for line in sections.get("system", ()))
    }
    # apt's first complaint says what is wrong, the last one what to try.
    errors = [line[3:] for line in simulation if line.startswith("E: ")]
    unmet = [line.strip() for line in simulation if re.match(r"\s+\S+ : \w", line)]
    origins, places = _origins(sections.get("origins", ()))
    unattended = sections.get("unattended")
    return Upgrade(
        available=True,
        changes=changes(simulation),
        kept_back=_listed(simulation, "kept back"),
        error=" ".join((unmet[:1] or errors[:1])[0].split()) if errors else "",
        lists_age_s=int(sections["lists"][0]) if sections.get("lists") else None,
        unattended=None if unattended is None else _unattended(unattended, system),
        origins=origins,
        came_from=_came_from(sections.get("installed", ()), places),
    )


_INSTALL = re.compile(
    r"Inst (?P<name>\S+) (?:\[(?P<old>[^]]+)\] )?"
    r"\((?P<new>\S+) ?(?P<origins>[^[]*?) ?\[[^]]*\]\)"
)
_REMOVE = re.compile(r"(?:Remv|Purg) (?P<name>\S+) \[(?P<old>[^]]+)\]")


def changes(simulation: Iterable[str]) -> tuple[Change, ...]:
    """The Inst and Remv lines of `apt-get -s`, in apt's order; names without architecture."""
    found: list[Change] = []
    for line in simulation:
        if line.startswith("Inst ") and (match := _INSTALL.match(line)):
            origins = tuple(each.strip() for each in match["origins"].split(",") if each.strip())
            name = match["name"].partition(":")[0]
            found.append(Change(name, match["old"], match["new"], origins))
        elif line.startswith(("Remv ", "Purg ")) and (match := _REMOVE.match(line)):
            found.append(Change(match["name"].partition(":")[0], match["old"], None))
    return tuple(found)


def _listed(simulation: Sequence[str], heading: str) -> tuple[str, ...]:
    """The names in the indented lines below a heading that ends with these words."""
    names: list[str] = []
    below = False
    for line in simulation:
        if not line.startswith("  "):
            below = line.rstrip().endswith(f"{heading}:")
        elif below:
            names += line.split()
    return tuple(names)


_RELEASE = re.compile(r"(?:^|,)([volancb])=([^,]*)")
# A flat repository, such as NVIDIA's, has neither suite nor architecture there.
_PLACE = re.compile(r" *-?\d+ (?P<place>\S.*?) +(?:\S+ )?Packages$")


def _origins(policy: Iterable[str]) -> tuple[tuple[Origin, ...], dict[str, Origin]]:
    """`apt-cache policy`: every source, and the same by `URI SUITE/COMPONENT`."""
    places: dict[str, Origin] = {}
    place = ""
    release: dict[str, str] = {}
    for line in policy:
        text = line.strip()
        if match := _PLACE.match(line):
            place, release = match["place"], {}
        elif text.startswith("release ") and place:
            release = dict(_RELEASE.findall(text.removeprefix("release ")))
            places[place] = _origin(release, "")
        elif text.startswith("origin ") and place:
            places[place] = _origin(release, text.removeprefix("origin "))
    return tuple(dict.fromkeys(places.values())), places


def _origin(release: dict[str, str], site: str) -> Origin:
    return Origin(
        origin=release.get("o", ""),
        label=release.get("l", ""),
        archive=release.get("a", ""),
        codename=release.get("n", ""),
        component=release.get("c", ""),
        site=site,
        version=release.get("v", ""),
    )


def _came_from(policy: Iterable[str], places: dict[str, Origin]) -> tuple[tuple[str, str], ...]:
    """`apt-cache policy NAME…`: where the installed version of each package is to be had."""
    found: dict[str, str] = {}
    name, here = "", False
    for line in policy:
        if line and not line.startswith(" "):
            name, here = line.rstrip(":").partition(":")[0], False
            found[name] = ""
        elif line.startswith(" *** "):
            here = True
        elif re.match(r"     \S", line):  # another version
            here = False
        elif here and name and not found[name] and (match := _PLACE.match(line)):
            origin = places.get(match["place"])
            found[name] = origin.origin or origin.label if origin else match["place"].split()[0]
    return tuple(found.items())


_OPTION = re.compile(r'(?P<key>[\w:-]+?)(?:::)? "(?P<value>.*)";')


def _unattended(dump: Iterable[str], system: dict[str, str]) -> Unattended:
    """`apt-config dump` of unattended-upgrades and the periodic jobs."""
    options: dict[str, list[str]] = {}
    timer = ""
    for line in dump:
        if match := _OPTION.match(line):
            options.setdefault(match["key"], []).append(match["value"])
        elif line.startswith("timer="):
            timer = line.removeprefix("timer=")

    def last(key: str) -> str:
        return options.get(key, [""])[-1]

    # distro_id is lsb_release's, which is os-release's ID with a capital.
    variables = {"distro_id": system.get("ID", "").capitalize()}
    variables["distro_codename"] = system.get("VERSION_CODENAME", "")
    plain = [
        f"origin={origin},archive={archive}"
        for value in options.get("Unattended-Upgrade::Allowed-Origins", ())
        if value
        for origin, _, archive in [value.partition(":")]
    ]
    patterns = [*plain, *options.get("Unattended-Upgrade::Origins-Pattern", ())]
    filled = [
        re.sub(r"\$\{(\w+)\}", lambda match: variables.get(match[1], match[0]), pattern)
        for pattern in patterns
        if pattern
    ]
    every = last("APT::Periodic::Unattended-Upgrade")
    return Unattended(
        active=every not in ("", "0") and timer not in ("disabled", "masked"),
        patterns=tuple(filled),
        blacklist=tuple(v for v in options.get("Unattended-Upgrade::Package-Blacklist", ()) if v),
        reboots=last("Unattended-Upgrade::Automatic-Reboot").lower() in ("true", "1", "yes"),
    )


#: Keys of an origin pattern, long and short (unattended-upgrades, match_whitelist_string).
_KEYS = {
    **dict.fromkeys(("o", "origin"), "origin"),
    **dict.fromkeys(("l", "label"), "label"),
    **dict.fromkeys(("a", "suite", "archive"), "archive"),
    **dict.fromkeys(("c", "component"), "component"),
    **dict.fromkeys(("n", "codename"), "codename"),
    "site": "site",
}


def _matches(pattern: str, origin: Origin) -> bool:
    """Every key=value of the pattern must hold; values may have wildcards."""
    for token in pattern.split(","):
        key, _, value = (part.strip() for part in token.partition("="))
        if key not in _KEYS or not fnmatchcase(getattr(origin, _KEYS[key]), value):
            return False
    return True


def begins(pattern: str, name: str) -> bool:
    """Whether a pattern of unattended-upgrades' blacklist means the package of this name."""
    try:
        return re.match(pattern, name) is not None
    except re.error:
        return False  # unattended-upgrades itself stops at it


def of_this_host(upgrade: Upgrade, state: State) -> Upgrade:
    """What a host in the same state said, with the age that the lists have on this one."""
    return (
        upgrade if upgrade.lists_age_s is None else replace(upgrade, lists_age_s=state.lists_age_s)
    )


def by_itself(upgrade: Upgrade) -> Upgrade:
    """The part of the upgrade that unattended-upgrades makes: from its origins, nothing that its
    blacklist names, no removals. It may be less: a package that needs one of these stays too."""
    unattended = upgrade.unattended
    if unattended is None or not unattended.active:
        return replace(upgrade, changes=())
    allowed = {origin.short for origin in upgrade.origins if unattended.allows(origin)}
    changes = tuple(
        change
        for change in upgrade.changes
        if not change.is_removed
        and allowed.intersection(change.origins)
        and not unattended.spares(change.name)
    )
    return replace(upgrade, changes=changes)
