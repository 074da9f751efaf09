"""Reads apt's source files, both formats, as sources.list(5) of apt 2.6 describes them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from urllib.parse import urlsplit

#: Components that only the distributions' own archives have.
_COMPONENTS = {
    "debian": {"main", "contrib", "non-free", "non-free-firmware"},
    "ubuntu": {"main", "restricted", "universe", "multiverse"},
}

#: The one-line format's option names that differ from deb822's by more than case: `arch=` is
#: `Architectures:` and so on (sources.list(5)).
_OPTION_NAMES = {"arch": "Architectures", "lang": "Languages", "target": "Targets"}


@dataclass(frozen=True)
class Entry:
    """One source: what apt combines into types × uris × suites, with components and options."""

    types: tuple[str, ...]
    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    """Further fields in deb822's spelling, such as ("Signed-By", "/usr/share/keyrings/x.gpg")."""

    @property
    def bracket(self) -> str:
        """The options as the one-line format writes them, with a blank behind, or nothing."""
        if not self.options:
            return ""
        short = {long: name for name, long in _OPTION_NAMES.items()}
        options = [f"{short.get(k, k.lower())}={','.join(v.split())}" for k, v in self.options]
        return f"[{' '.join(options)}] "

    @property
    def signed_by(self) -> str:
        """The keyring that the source must be signed with, empty if it is left to apt."""
        return next((value for key, value in self.options if key.lower() == "signed-by"), "")


def parse(path: str, text: str) -> list[Entry]:
    """The enabled entries of a source file, by the name's ending: .sources is deb822."""
    return list(_deb822(text) if path.endswith(".sources") else _one_line(text))


def _deb822(text: str) -> Iterator[Entry]:
    for stanza in re.split(r"\n(?:[ \t]*\n)+", text):
        fields: dict[str, str] = {}
        last = ""
        for line in stanza.splitlines():
            if line.startswith("#") or not line.strip():
                continue
            if line[0] in " \t" and last:  # a folded value, such as an embedded key
                fields[last] += "\n" + line
            else:
                last, _, value = line.partition(":")
                fields[last] = value.strip()
        lower = {key.lower(): value for key, value in fields.items()}
        if not lower.get("types") or lower.get("enabled", "yes").lower() in {"no", "false", "0"}:
            continue
        own = {"types", "uris", "suites", "components", "enabled"}
        yield Entry(
            types=tuple(lower["types"].split()),
            uris=tuple(lower.get("uris", "").split()),
            suites=tuple(lower.get("suites", "").split()),
            components=tuple(lower.get("components", "").split()),
            options=tuple((k, v) for k, v in fields.items() if k.lower() not in own),
        )


def _one_line(text: str) -> Iterator[Entry]:
    for line in text.splitlines():
        match = re.match(r"\s*(deb|deb-src)\s+(?:\[([^\]]*)\]\s*)?(\S+)\s+(\S+)\s*([^#]*)", line)
        if match is None:
            continue
        kind, bracket, uri, suite, components = match.groups()
        options = []
        for option in (bracket or "").split():
            key, _, value = option.partition("=")
            options.append((_OPTION_NAMES.get(key, key.title()), value.replace(",", " ")))
        yield Entry((kind,), (uri,), (suite,), tuple(components.split()), tuple(options))


def archive(uri: str) -> str:
    """The archive at an address, such as debian-security; empty for anybody else's.

    The path decides: a package archive or a list of its mirrors, as Debian's cloud images have it
    (mirror+file:///etc/apt/mirrors/debian.list). A longer path is somebody else's, such as a PPA's.
    """
    path = PurePosixPath(urlsplit(uri).path)
    if uri.startswith("mirror+file:") and path.parent == PurePosixPath("/etc/apt/mirrors"):
        return path.stem
    return path.name if path.parent == PurePosixPath("/") else ""


def is_distribution(entry: Entry, os: str, codename: str) -> bool:
    """Whether an entry is the distribution's own archive rather than somebody else's."""
    bases = {re.sub(r"-(updates|security|backports|proposed)$", "", s) for s in entry.suites}
    archives = {"debian": {"debian", "debian-security"}, "ubuntu": {"ubuntu", "ubuntu-ports"}}
    found = {archive(uri) for uri in entry.uris}
    keyring = PurePosixPath(entry.signed_by).name
    return (
        bases == {codename}
        and bool(entry.uris)
        and found <= archives.get(os, set())
        and bool(entry.components)
        and set(entry.components) <= _COMPONENTS.get(os, set())
        and (not keyring or keyring.startswith(f"{os}-archive-"))
    )


def rivals(entry: Entry, os: str, codename: str) -> bool:
    """Whether an entry brings the distribution's own packages from somewhere else than its archive
    or a whole copy of it: apt takes whichever version is higher."""
    bases = {re.sub(r"-(updates|backports|proposed)$", "", s) for s in entry.suites}
    return (
        "deb" in entry.types
        and codename in bases
        and bool(entry.uris)
        and bool(entry.components)
        and set(entry.components) <= _COMPONENTS.get(os, set())
        and not is_distribution(entry, os, codename)
    )


def split_security(entry: Entry) -> tuple[Entry | None, Entry | None]:
    """The entry's parts without and with security suites; None where there is none."""
    plain = tuple(s for s in entry.suites if not s.endswith("-security"))
    security = tuple(s for s in entry.suites if s.endswith("-security"))
    return (
        replace(entry, suites=plain) if plain else None,
        replace(entry, suites=security) if security else None,
    )
