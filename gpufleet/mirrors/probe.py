"""Decides what a host asks of mirror sites to find those that work, and reads what it found.

`on_host.py` asks; the sites' answers become `Found` values with their evidence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from gpufleet.apt_sources import archive, is_distribution, parse, split_security
from gpufleet.catalog import SERVICES, Drivers, Service, Site
from gpufleet.catalog import Mirrors as Catalogue
from gpufleet.mirrors.choice import Candidate, Choice, Found, State, Via, candidates, check, decide
from gpufleet.mirrors.plan import CACHE, AptSources, held
from gpufleet.settings import Mirrors, Settings

#: Seconds and bytes that a probe of all sites may take on one host.
SECONDS, BYTES = 18, 36 * 2**20

#: Seconds for which it holds that no site passed: the next apply soon afterwards looks again.
FAILED_TTL = 3600

#: Seconds by which one site's suite may be older than another's.
LAG = 3 * 24 * 3600

#: A small page of the index whose files are about 2 MB.
PROJECT = "pip"

#: A model whose page is small and that has a file of 1 MB beside its weights.
MODEL = "openai-community/gpt2"

#: The channel without which a site's conda is of no use.
NEEDED_CHANNEL = "conda-forge"


@dataclass(frozen=True)
class Kept:
    """What a host remembers of its probes."""

    found: tuple[Found, ...] = ()
    probed: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    """Service → when all its sites were probed, and the digest of what was asked."""
    bytes: int = 0
    seconds: float = 0
    note: str = ""
    """Why the host could not keep the results, if it could not."""


@dataclass(frozen=True)
class Host:
    """What the requests depend on besides the sites."""

    sources: AptSources
    apt_security: bool = False
    cuda: str = "cpu"
    """Tag of torch's builds."""

    @property
    def release(self) -> str:
        """The distribution's folder in NVIDIA's archive, such as debian12."""
        return self.sources.os + self.sources.version.replace(".", "")


def requests(site: Site, host: Host) -> dict[str, dict[str, Any]]:
    """What makes a site correct for each service that it carries, as `on_host.py` reads it."""
    services = site.services
    asked: dict[str, dict[str, Any]] = {}
    if services.pypi is not None:
        asked["pypi"] = {"page": f"{services.pypi.index.rstrip('/')}/{PROJECT}/"}
    if services.apt is not None:
        suites = suites_of(host.sources, host.apt_security)
        archives = {
            name: {"path": path, "suites": list(suites[name])}
            for name, path in services.apt.archives.items()
            if name in suites
        }
        # A site without one of the archives that the host's packages come from is of no use there.
        if archives and all(name in archives for name in suites if not name.endswith("-security")):
            asked["apt"] = {"archives": archives, "deb": "{deb}"}
    if services.conda is not None and NEEDED_CHANNEL in services.conda.cloud:
        conda = services.conda
        channels = {name: f"{path.rstrip('/')}/{name}" for name, path in conda.cloud.items()}
        for sub in (*conda.subchannels, *conda.unverified):
            channels[f"pkgs/{sub}"] = f"{conda.base.rstrip('/')}/pkgs/{sub}"
        asked["conda"] = {"channels": channels, "needs": NEEDED_CHANNEL, "subdir": "{subdir}"}
    for name, installers in (("miniconda", services.miniconda), ("miniforge", services.miniforge)):
        if installers is not None:
            asked[name] = {"dir": installers.dir, "file": INSTALLERS[name]}
    if services.torch is not None:
        page = services.torch.url.replace("{cuda}", host.cuda)
        if services.torch.style == "simple":
            page = f"{page.rstrip('/')}/torch/"
        asked["torch"] = {"page": page, "tag": host.cuda, "machine": "{machine}"}
    if services.cuda_apt is not None:
        path = f"{services.cuda_apt.url.rstrip('/')}/{host.release}/{{machine}}"
        asked["cuda_apt"] = {"path": path}
    if services.hf is not None:
        base = services.hf.endpoint.rstrip("/")
        asked["hf"] = {
            "api": f"{base}/api/models/{MODEL}",
            "id": MODEL,
            "file": f"{base}/{MODEL}/resolve/main/vocab.json",
        }
    return asked


#: The newest installer for Linux; `{machine}` is the host's.
INSTALLERS = {
    "miniconda": "Miniconda3-latest-Linux-{machine}.sh",
    "miniforge": "Miniforge3-Linux-{machine}.sh",
}


def suites_of(sources: AptSources, security: bool) -> dict[str, tuple[str, ...]]:
    """The suites that the host uses of each of its distribution's archives."""
    suites: dict[str, list[str]] = {}
    for path, text in sources.files.items():
        for entry in parse(path, text):
            if not is_distribution(entry, sources.os, sources.codename):
                continue
            plain, secure = split_security(entry)
            for part in (plain, secure if security else None):
                for name in {archive(uri) for uri in entry.uris} if part else ():
                    suites.setdefault(name, []).extend(part.suites if part else ())
    unique = {name: dict.fromkeys(of) for name, of in suites.items()}
    # The shortest name first: it is the suite itself, which has all packages.
    return {name: tuple(sorted(of, key=len)) for name, of in unique.items()}


def digests(candidates: Iterable[Candidate], host: Host) -> dict[Service, str]:
    """What identifies the questions about each service: other questions, other answers."""
    every = [(c.site.name, c.via, c.site.url(""), requests(c.site, host)) for c in candidates]
    found: dict[Service, str] = {}
    for service in SERVICES:
        asked = [(*about, of[service]) for *about, of in every if service in of]
        if asked:
            text = json.dumps(asked, sort_keys=True)
            found[service] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def plan(
    candidates: Iterable[Candidate],
    host: Host,
    *,
    services: Iterable[Service] = SERVICES,
    only: Iterable[str] = (),
    name: str = "",
    hosts: int = 1,
) -> str:
    """The JSON document that `on_host.py` reads.

    `only` limits it to some sites by name. `name` and `hosts` spread a fleet's probes over time,
    and let hosts begin with different sites.
    """
    wanted, named, every = list(services), set(only), list(candidates)
    asked = []
    for candidate in every:
        site = candidate.site
        of = {s: spec for s, spec in requests(site, host).items() if s in wanted}
        if of and (not named or site.name in named):
            about = {"site": site.name, "via": candidate.via, "base": site.url("")}
            asked.append({**about, "hosts": list(site.hosts), "services": of})
    turn = _number(name) % len(asked) if asked else 0
    whole = {} if named else digests(every, host)
    document = {
        "wait": stagger(name, hosts),
        "seconds": SECONDS,
        "bytes": BYTES,
        "cache": CACHE,
        "digests": {s: digest for s, digest in whole.items() if s in wanted},
        "services": [s for s in _ORDER if s in wanted],
        "sites": asked[turn:] + asked[:turn],
    }
    return json.dumps(document, sort_keys=True)


#: The longest questions first, the services that every host needs before the others.
_ORDER: tuple[Service, ...] = (
    "conda",
    "pypi",
    "apt",
    "torch",
    "miniconda",
    "miniforge",
    "hf",
    "cuda_apt",
)


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def stagger(name: str, hosts: int) -> float:
    """Seconds that a host of a fleet waits before it probes: half a second a host, one minute at
    most, spread by the hosts' names."""
    window = min(0.5 * (hosts - 1), 60)
    return round(window * _number(name) / 2**32, 2)


def read(text: str) -> Kept:
    """What a host says of its probes: the kept file or `on_host.py`'s answer.

    Nothing is known from a text that is neither; a row that makes no sense is passed over.
    """
    try:
        document = json.loads(text)
        if document["version"] != 1:
            return Kept()
        probed = {s: (float(o["at"]), str(o["digest"])) for s, o in document["services"].items()}
        rows = [_row(row) for row in document["found"]]
    except (ValueError, LookupError, TypeError, AttributeError):
        return Kept()
    return Kept(
        tuple(without_stale([row for row in rows if row is not None])),
        probed,
        int(document.get("bytes", 0)),
        float(document.get("seconds", 0)),
        str(document.get("unkept", "")),
    )


def _row(row: Any) -> Found | None:
    known = row["service"] in SERVICES and row["via"] in get_args(Via)
    if not known or row["state"] not in get_args(State):
        return None
    return Found(
        service=row["service"],
        site=str(row["site"]),
        state=row["state"],
        why=" ".join(str(row["why"]).split()),
        speed=None if row["speed"] is None else float(row["speed"]),
        via=row["via"],
        parts=tuple(map(str, row.get("parts", ()))),
        dates={str(suite): float(date) for suite, date in row.get("dates", {}).items()},
        at=float(row["at"]),
    )


def without_stale(found: Iterable[Found]) -> list[Found]:
    """The results, where a site fails whose suite is days older than another site's."""
    rows = list(found)
    newest: dict[str, float] = {}
    for row in rows:
        for suite, date in row.dates.items():
            newest[suite] = max(newest.get(suite, 0), date)
    judged = []
    for row in rows:
        late = {s: newest[s] - date for s, date in row.dates.items() if newest[s] - date > LAG}
        if row.passed and late:
            suite, seconds = max(late.items(), key=lambda item: item[1])
            why = f"{suite} is {seconds / 86400:.0f} days older than another site's"
            row = replace(row, state="stale", why=why, speed=None)
        judged.append(row)
    return judged


def without_refused(
    found: Iterable[Found], refused: str, known: Iterable[Candidate]
) -> list[Found]:
    """The results, where a site fails that failed a client since it was probed.

    `refused` is what the check of a switch noted.
    """
    hosts = {(one.site.name, one.via): one.site.host for one in known}
    since: dict[tuple[str, str], tuple[float, str]] = {}
    for line in refused.splitlines():
        noted, service, host, why = [*line.split("\t", 3), "", "", ""][:4]
        if noted.isdigit():
            since[service, host] = (float(noted), why)
    judged = []
    for row in found:
        at, why = since.get((row.service, hosts.get((row.site, row.via), "")), (0.0, ""))
        if row.passed and at >= row.at:
            row = replace(row, state="refused", why=f"passed the probe and then failed: {why}")
        judged.append(row)
    return judged


def due(
    kept: Kept, wanted: Mapping[Service, str], now: float, ttl_hours: float
) -> tuple[Service, ...]:
    """The services that must be probed: never asked, asked otherwise, too long ago, or in vain.

    `wanted` are the digests of what would be asked.
    """

    def holds(service: Service, digest: str) -> bool:
        at, asked = kept.probed.get(service, (0, ""))
        passed = any(row.passed for row in kept.found if row.service == service)
        ttl = ttl_hours * 3600 if passed else FAILED_TTL
        # A clock that was put back leaves results from the future.
        return asked == digest and 0 <= now - at < ttl

    return tuple(service for service, digest in wanted.items() if not holds(service, digest))


def about(settings: Settings, drivers: Drivers, sources: AptSources) -> Host:
    """What the requests of a host with these settings depend on."""
    cuda = settings.driver.cuda or drivers.environments.cuda
    tag = "cpu" if settings.accelerator == "cpu" else f"cu{cuda.replace('.', '')}"
    return Host(sources, settings.mirrors.apt_security, tag)


def choose(
    settings: Mirrors,
    catalogue: Catalogue,
    host: Host,
    ask: Callable[[str], Kept] | None = None,
    *,
    name: str = "",
    hosts: int = 1,
) -> Choice:
    """The host's choice: from what it remembers while that holds, else from a new probe.

    `ask` lets the host carry out a plan; without it nothing is asked, and what the host remembers
    counts however old it is. Raises UsageError for settings that name what is not there.
    """
    check(settings, catalogue)
    kept = read(host.sources.cache)
    again = missing(settings, catalogue, host) if ask else ()
    if ask and again:
        sites = candidates(settings, catalogue)
        kept = ask(plan(sites, host, services=again, name=name, hosts=hosts))
    found = without_refused(kept.found, host.sources.refused, candidates(settings, catalogue))
    return decide(settings, catalogue, found, held(host.sources.record))


def missing(settings: Mirrors, catalogue: Catalogue, host: Host) -> tuple[Service, ...]:
    """The services that the host must probe before it can choose their sites."""
    services = [s for s in SERVICES if settings.pinned.get(s, settings.site) == "auto"]
    asked = digests(candidates(settings, catalogue), host) if services else {}
    wanted = {s: digest for s, digest in asked.items() if s in services}
    return due(read(host.sources.cache), wanted, host.sources.now, settings.ttl_hours)
