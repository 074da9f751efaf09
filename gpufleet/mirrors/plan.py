"""Decides what a choice of mirror sites writes on a host: whole files, from one choice."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from gpufleet import render
from gpufleet.apt_sources import Entry, archive, is_distribution, parse, split_security
from gpufleet.catalog import Apt, Conda, Site
from gpufleet.errors import FleetError
from gpufleet.managed.plan import ManagedFile
from gpufleet.mirrors.choice import Choice

PIP_CONF = "/etc/pip.conf"
UV_TOML = "/etc/uv/uv.toml"
CONDARC = "/etc/conda/.condarc"
#: What update-ca-certificates(8) makes of all that a Debian host trusts.
AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"

#: What a choice by measurement remembers on the host.
RECORD = "/var/lib/gpufleet/mirrors-choice.json"

#: Where a host keeps what its probes found.
CACHE = "/var/lib/gpufleet/mirrors-probed.json"
#: Sites that passed a probe and then failed a client: time, service, host and reason, tabs between.
REFUSED = "/var/lib/gpufleet/mirrors-refused"


@dataclass(frozen=True)
class AptSources:
    """A host's distribution, its apt source files as they were before gpufleet wrote any, and what
    gpufleet remembers there about mirrors."""

    os: str
    codename: str
    files: Mapping[str, str]
    """Path → original text."""
    written: tuple[str, ...]
    """Paths of mirror configuration that gpufleet has written on this host."""
    record: str = ""
    """The text of `RECORD`, empty if there is none."""
    cache: str = ""
    """The text of `CACHE`, empty if there is none."""
    now: float = 0
    """The host's clock, in seconds since 1970."""
    version: str = ""
    """The distribution's version, such as 12 or 24.04."""
    others: tuple[str, ...] = ()
    """Lines of configuration that may win over those files, for `overrides.read`."""
    refused: str = ""
    """The text of `REFUSED`, empty if there is none."""


def parse_sources(lines: Iterable[str]) -> AptSources:
    """Read the MirrorFiles fact's lines: keys `os`, `host`, `written`, `file`; `+`text lines."""
    os = codename = version = ""
    now = 0.0
    files: dict[str, list[str]] = {}
    written: list[str] = []
    others: list[str] = []
    path = ""
    for line in lines:
        if line.startswith("+"):
            files[path].append(line[1:])
            continue
        key, _, value = line.partition("\t")
        if key == "os":
            os, codename = value.split("\t")
        elif key == "host":
            version, clock = value.split("\t")
            now = float(clock)
        elif key == "written":
            written.append(value)
        elif key == "file":
            path = value
            files[path] = []
        elif line:
            others.append(line)
    texts = {path: "\n".join([*text, ""]) for path, text in files.items()}
    record, cache = texts.pop(RECORD, ""), texts.pop(CACHE, "")
    refused = texts.pop(REFUSED, "")
    return AptSources(
        os,
        codename,
        texts,
        tuple(written),
        record,
        cache=cache,
        refused=refused,
        now=now,
        version=version,
        others=tuple(others),
    )


def wanted(choice: Choice, apt_security: bool, sources: AptSources) -> list[ManagedFile]:
    """Every file that this choice writes on this host."""
    files: list[ManagedFile] = []
    pypi, conda, apt = choice.site("pypi"), choice.site("conda"), choice.site("apt")
    if pypi is not None and pypi.services.pypi is not None:
        index = pypi.url(pypi.services.pypi.index)
        ours = _authorities(pypi, sources)
        text = render.text("pip.conf.j2", site=pypi, index=index, authorities=ours)
        files.append(ManagedFile(PIP_CONF, text))
        files.append(ManagedFile(UV_TOML, render.text("uv.toml.j2", site=pypi, index=index)))
    if conda is not None and conda.services.conda is not None:
        files.append(ManagedFile(CONDARC, _condarc(conda, conda.services.conda, sources)))
    if apt is not None and apt.services.apt is not None:
        files += _apt(apt, apt.services.apt, apt_security, sources)
    if choice.automatic:
        files.append(ManagedFile(RECORD, record(choice)))
    return files


def record(choice: Choice) -> str:
    """What a later run must know of this choice: the sites that it puts in force, by service."""
    held = {
        name: pick.site.model_dump(mode="json", exclude_defaults=True)
        for name, pick in choice.picks.items()
        if pick.site is not None
    }
    return json.dumps({"version": 1, "sites": held}, ensure_ascii=False, indent=1) + "\n"


def held(text: str) -> dict[str, Site]:
    """The sites of a record, by service; none if it is of another version or no record at all."""
    try:
        document = json.loads(text)
        if document["version"] != 1:
            return {}
        return {name: Site.model_validate(site) for name, site in document["sites"].items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}


def _authorities(site: Site, sources: AptSources) -> str:
    """The file of certificates that pip and conda, which have their own, go by for a site that is
    not the catalogue's; empty where theirs will do."""
    own = site.evidence is None and site.scheme == "https"
    return AUTHORITIES if own and sources.os in ("debian", "ubuntu") else ""


def _condarc(site: Site, conda: Conda, sources: AptSources) -> str:
    defaults = [site.url(f"{conda.base}/pkgs/{sub}") for sub in conda.subchannels]
    custom = {channel: site.url(folder) for channel, folder in conda.cloud.items()}
    text, back = render.checked_yaml(
        "condarc.j2",
        site=site,
        default_channels=defaults,
        custom_channels=custom,
        authorities=_authorities(site, sources),
    )
    if (back["default_channels"], back["custom_channels"]) != (defaults, custom):
        raise FleetError("templates/condarc.j2: the channels did not survive rendering")
    return text


def _apt(site: Site, apt: Apt, security: bool, sources: AptSources) -> Iterator[ManagedFile]:
    addresses: dict[str, str] = {name: site.url(folder) for name, folder in apt.archives.items()}
    for path, text in sources.files.items():
        entries = parse(path, text)
        mirrored = [
            part
            for entry in entries
            for part in _mirrored(entry, addresses, security, sources.os, sources.codename)
        ]
        if mirrored != entries:
            template = "apt.sources.j2" if path.endswith(".sources") else "apt.list.j2"
            yield ManagedFile(path, render.text(template, site=site, entries=mirrored))


def stale(files: Iterable[ManagedFile], sources: AptSources) -> list[str]:
    """Paths that an earlier choice wrote and this one does not."""
    keep = {file.path for file in files}
    return [path for path in sources.written if path not in keep]


def _mirrored(
    entry: Entry, addresses: Mapping[str, str], apt_security: bool, os: str, codename: str
) -> Iterable[Entry]:
    """The entry with the site's address where the site carries the archive and may serve it."""
    archives = [archive(uri) for uri in entry.uris]
    if not is_distribution(entry, os, codename) or not all(a in addresses for a in archives):
        yield entry
        return
    uris = tuple(dict.fromkeys(addresses[name] for name in archives))
    plain, security = split_security(entry)
    for part, allowed in ((plain, True), (security, apt_security)):
        if part is not None:
            yield replace(part, uris=uris) if allowed else part
