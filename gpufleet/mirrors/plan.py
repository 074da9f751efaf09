"""Decides what a chosen mirror site writes on a host: whole files, from one choice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from gpufleet import render
from gpufleet.apt_sources import Entry, archive, is_distribution, parse, split_security
from gpufleet.catalog import Site
from gpufleet.errors import FleetError
from gpufleet.managed.plan import ManagedFile

PIP_CONF = "/etc/pip.conf"
UV_TOML = "/etc/uv/uv.toml"
CONDARC = "/etc/conda/.condarc"


@dataclass(frozen=True)
class AptSources:
    """A host's distribution and its apt source files as they were before gpufleet wrote any."""

    os: str
    codename: str
    files: Mapping[str, str]
    """Path → original text."""
    written: tuple[str, ...]
    """Paths of mirror configuration that gpufleet has written on this host."""


def parse_sources(lines: Iterable[str]) -> AptSources:
    """Read the MirrorFiles fact's lines: `os`, `written` and `file` keys, then `+`text lines."""
    os = codename = ""
    files: dict[str, list[str]] = {}
    written: list[str] = []
    path = ""
    for line in lines:
        if line.startswith("+"):
            files[path].append(line[1:])
            continue
        key, _, value = line.partition("\t")
        if key == "os":
            os, codename = value.split("\t")
        elif key == "written":
            written.append(value)
        elif key == "file":
            path = value
            files[path] = []
    texts = {path: "\n".join([*text, ""]) for path, text in files.items()}
    return AptSources(os, codename, texts, tuple(written))


def wanted(site: Site, apt_security: bool, sources: AptSources) -> list[ManagedFile]:
    """Every file that this site writes on this host."""
    files: list[ManagedFile] = []
    if site.pypi is not None:
        files.append(ManagedFile(PIP_CONF, render.text("pip.conf.j2", site=site)))
        files.append(ManagedFile(UV_TOML, render.text("uv.toml.j2", site=site)))
    if site.conda is not None:
        defaults = [site.url(f"{site.conda.base}/pkgs/{sub}") for sub in site.conda.subchannels]
        text, back = render.checked_yaml("condarc.j2", site=site, default_channels=defaults)
        if back["default_channels"] != defaults:
            raise FleetError("templates/condarc.j2: default_channels did not survive rendering")
        files.append(ManagedFile(CONDARC, text))
    for path, text in sources.files.items():
        entries = parse(path, text)
        mirrored = [
            part
            for entry in entries
            for part in _mirrored(entry, site, apt_security, sources.os, sources.codename)
        ]
        if mirrored != entries:
            template = "apt.sources.j2" if path.endswith(".sources") else "apt.list.j2"
            files.append(ManagedFile(path, render.text(template, site=site, entries=mirrored)))
    return files


def stale(files: Iterable[ManagedFile], sources: AptSources) -> list[str]:
    """Paths that an earlier choice wrote and this one does not."""
    keep = {file.path for file in files}
    return [path for path in sources.written if path not in keep]


def _mirrored(
    entry: Entry, site: Site, apt_security: bool, os: str, codename: str
) -> Iterable[Entry]:
    """The entry with the site's address where the site carries the archive and may serve it."""
    archives = [archive(uri) for uri in entry.uris]
    if not is_distribution(entry, os, codename) or not all(a in site.apt for a in archives):
        yield entry
        return
    uris = tuple(dict.fromkeys(site.url(f"/{name}") for name in archives))
    plain, security = split_security(entry)
    for part, allowed in ((plain, True), (security, apt_security)):
        if part is not None:
            yield replace(part, uris=uris) if allowed else part
