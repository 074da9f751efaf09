"""Where the packages of a distribution come from, read from the machine's own apt sources."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gpufleet.apt_sources import Entry, is_distribution, parse
from gpufleet.errors import FleetError, UsageError


@dataclass(frozen=True)
class Release:
    """A distribution release that lab hosts can run."""

    distribution: str
    version: str
    codename: str

    @property
    def name(self) -> str:
        """As people write it: ``debian:12``."""
        return f"{self.distribution}:{self.version}"

    @property
    def keyring(self) -> str:
        """The archive keyring's path, the same on an operator's machine and in a host."""
        return f"/usr/share/keyrings/{self.distribution}-archive-keyring.gpg"


RELEASES = {
    release.name: release
    for release in (
        Release("debian", "12", "bookworm"),
        Release("debian", "13", "trixie"),
        Release("ubuntu", "22.04", "jammy"),
        Release("ubuntu", "24.04", "noble"),
    )
}

_POCKETS = ("", "-updates", "-security")
_ALIASES: dict[str, tuple[str, ...]] = {"debian": ("stable", "oldstable"), "ubuntu": ()}


def release(image: str) -> Release:
    """The release called `image`, as in ``debian:12``; UsageError lists the known ones."""
    try:
        return RELEASES[image]
    except KeyError:
        known = ", ".join(RELEASES)
        raise UsageError(f"unknown image {image!r}: choose one of {known}") from None


def read(etc_apt: Path) -> list[Entry]:
    """What apt installs from under `etc_apt`, with mirror lists in files followed.

    Sources that a host could not reach from its own root (cdrom:, file:, copy:) are left out.
    """
    entries: list[Entry] = []
    for path in [etc_apt / "sources.list", *sorted((etc_apt / "sources.list.d").glob("*"))]:
        if path.suffix in (".list", ".sources") and path.is_file():
            entries += parse(path.name, path.read_text(errors="replace"))
    binary = [replace(entry, types=("deb",)) for entry in entries if "deb" in entry.types]
    followed = [replace(entry, uris=tuple(_follow(entry.uris))) for entry in binary]
    return [entry for entry in followed if entry.uris]


def _follow(uris: Iterable[str]) -> Iterator[str]:
    for uri in uris:
        scheme, _, rest = uri.partition(":")
        if scheme == "mirror+file":
            # Debian's cloud images name a file that holds the mirrors' addresses.
            listed = Path("/" + rest.lstrip("/"))
            lines = listed.read_text().splitlines() if listed.is_file() else []
            yield from (line.split()[0] for line in lines if line.strip() and line[0] != "#")
        elif scheme not in ("cdrom", "file", "copy"):
            yield uri


def for_release(
    entries: Sequence[Entry], wanted: Release, os_release: Mapping[str, str]
) -> list[Entry]:
    """What `wanted` is installed from, out of a machine's `entries`.

    Only the distribution's own archive counts. Where the machine runs another release of the
    same distribution, its sources with that release's name put in. Empty where the machine runs
    another distribution: then mmdebstrap's own default holds.
    """
    if distribution(os_release) != wanted.distribution:
        return []
    derived_from = os_release.get("UBUNTU_CODENAME") or os_release.get("DEBIAN_CODENAME")
    own = derived_from or os_release.get("VERSION_CODENAME", "")
    names = [wanted.codename, own, *_ALIASES[wanted.distribution]]
    # A company's mirror may have a path and keys of its own: taken where nothing else serves.
    for belongs in (is_distribution, _may_be_distribution):
        chosen = []
        for entry in entries:
            name = next((n for n in names if belongs(entry, wanted.distribution, n)), None)
            suites = [
                wanted.codename + pocket for pocket in _POCKETS if f"{name}{pocket}" in entry.suites
            ]
            if suites:
                chosen.append(replace(entry, suites=tuple(suites)))
        if any(wanted.codename in entry.suites for entry in chosen):
            return list(dict.fromkeys(chosen))
    return []


def _may_be_distribution(entry: Entry, _distribution: str, codename: str) -> bool:
    return codename in {suite.partition("-")[0] for suite in entry.suites} and (
        "main" in entry.components
    )


def render(entries: Iterable[Entry]) -> str:
    """The .sources file that says `entries`."""
    stanzas = []
    for entry in entries:
        fields = [("Types", "deb"), ("URIs", " ".join(entry.uris))]
        fields.append(("Suites", " ".join(entry.suites)))
        fields.append(("Components", " ".join(entry.components)))
        fields += entry.options
        stanzas.append("".join(f"{key}: {value}\n" for key, value in fields))
    return "\n".join(stanzas)


def render_one_line(entries: Iterable[Entry]) -> str:
    """The sources.list that says `entries`."""
    return "".join(
        f"deb {entry.bracket}{uri} {suite} {' '.join(entry.components)}\n"
        for entry in entries
        for uri in entry.uris
        for suite in entry.suites
    )


def distribution(os_release: Mapping[str, str]) -> str:
    """``debian`` or ``ubuntu``, derivatives counted as what they derive from; else ''."""
    like = [os_release.get("ID", ""), *os_release.get("ID_LIKE", "").split()]
    return next((name for name in like if name in _ALIASES), "")


def read_os_release(path: Path = Path("/etc/os-release")) -> dict[str, str]:
    """The key-value pairs of an os-release file; FleetError where there is none (macOS)."""
    try:
        text = path.read_text()
    except OSError:
        raise FleetError(
            f"{path}: not there, so this is no Linux distribution; "
            "the lab needs Debian or Ubuntu with root"
        ) from None
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {key: value.strip().strip("\"'") for key, value in pairs}
