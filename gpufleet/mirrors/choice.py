"""Chooses a site for every service of a host: pinned, inside the cloud, measured, or official."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from gpufleet import settings
from gpufleet.catalog import SERVICES, Apt, Conda, Mirrors, Service, Services, Site
from gpufleet.errors import UsageError

PolicyName = Literal["pinned", "internal", "measured", "official", "kept"]

#: How a site is reached: by its public name, or by its name inside a cloud with either scheme.
Via = Literal["public", "internal", "internal-http"]

#: What became of a probe: `ok`, or why a site cannot be used.
State = Literal[
    "ok",
    "unreachable",
    "certificate",
    "refused",
    "missing",
    "elsewhere",
    "portal",
    "garbage",
    "stale",
    "cut",
    "slow",
]

GITHUB = "https://github.com/"


@dataclass(frozen=True)
class Found:
    """What a probe on a host found of one site's service."""

    service: Service
    site: str
    state: State
    why: str
    """One line: what was seen, or why the site cannot be used."""
    speed: float | None = None
    """Bytes a second of a real file; None if it was not measured."""
    via: Via = "public"
    parts: tuple[str, ...] = ()
    """What passed of it: archives of apt, `pkgs/NAME` and channels of conda."""
    dates: Mapping[str, float] = field(default_factory=dict)
    """Of apt: archive/suite → the date of its index, in seconds since 1970."""
    at: float = 0
    """When, in seconds since 1970 by the host's clock."""

    @property
    def passed(self) -> bool:
        """Whether the site can be used for the service."""
        return self.state == "ok"


@dataclass(frozen=True)
class Pick:
    """The site of one service, with the reason. No site: the tool's own default."""

    service: Service
    site: Site | None
    policy: PolicyName
    why: str
    fallbacks: tuple[str, ...] = ()
    """What comes next if it fails: sites of other failure domains, then official."""

    @property
    def name(self) -> str:
        """The site's name, or official."""
        return self.site.name if self.site else "official"


@dataclass(frozen=True)
class Choice:
    """Where every service of one host comes from."""

    picks: Mapping[str, Pick]
    git_proxy: str | None = None

    def site(self, service: Service) -> Site | None:
        """The service's site, None for the tool's own default."""
        pick = self.picks.get(service)
        return pick.site if pick else None

    @property
    def automatic(self) -> bool:
        """Whether anything was chosen by what the host was found to reach."""
        return any(pick.policy in ("internal", "measured", "kept") for pick in self.picks.values())

    def hf_environment(self) -> dict[str, str]:
        """Environment variables of everything that asks Hugging Face for files."""
        site = self.site("hf")
        if site is None or site.services.hf is None:
            return {}
        endpoint = site.url(site.services.hf.endpoint).rstrip("/")
        # Xet's files come from addresses that the endpoint does not cover.
        return {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}

    def torch(self, cuda: str) -> tuple[str, ...]:
        """Options of pip and uv for torch's builds with a tag such as cu121 or cpu."""
        site = self.site("torch")
        if site is None or site.services.torch is None:
            return ()
        option = {"simple": "--index-url", "find-links": "--find-links"}
        torch = site.services.torch
        return (option[torch.style], site.url(torch.url.replace("{cuda}", cuda)))

    def git_options(self, url: str) -> tuple[str, ...]:
        """Options of git, before its command, that fetch a GitHub address through the proxy.

        Only plain addresses are rewritten, and no stored password is offered to the proxy.
        """
        plain = urlsplit(url)._replace(query="", fragment="").geturl() == url
        if self.git_proxy is None or not url.startswith(GITHUB) or not plain:
            return ()
        return ("-c", f"url.{self.git_proxy}.insteadOf={GITHUB}", "-c", "credential.helper=")


@dataclass(frozen=True)
class Candidate:
    """A site that may be chosen without being named."""

    site: Site
    via: Via = "public"


def sites(wanted: settings.Mirrors, catalogue: Mirrors) -> dict[str, Site]:
    """All sites by name, the inventory's own first.

    Raises UsageError for an own site that has a name of the catalogue.
    """
    for name in wanted.sites:
        if name in catalogue.sites:
            raise UsageError(
                f"setting mirrors.sites.{name}: the catalogue has a site of that name; take another"
            )
    return {**wanted.sites, **catalogue.sites}


def check(wanted: settings.Mirrors, catalogue: Mirrors) -> None:
    """Raise UsageError, one line, for a setting that names what is not there."""
    known = sites(wanted, catalogue)
    named = {"site": wanted.site} if wanted.site not in ("official", "auto") else {}
    named |= {f"pinned.{s}": name for s, name in wanted.pinned.items() if name != "official"}
    named |= {f"exclude.{i}": name for i, name in enumerate(wanted.exclude)}
    for where, name in named.items():
        if name not in known:
            words = "official, auto or one of" if where == "site" else "one of"
            raise UsageError(
                f"setting mirrors.{where}: no site {name!r}; choose {words}: "
                f"{', '.join(sorted(known))}"
            )
    for service, name in wanted.pinned.items():
        if name != "official" and not known[name].carries(service):
            having = [other for other, site in known.items() if site.carries(service)]
            raise UsageError(
                f"setting mirrors.pinned.{service}: {name} does not carry {service}; "
                f"choose official or one of: {', '.join(sorted(having))}"
            )


def candidates(wanted: settings.Mirrors, catalogue: Mirrors) -> list[Candidate]:
    """Every site that `auto` may take, with its internal ways, without those that are excluded."""
    out = catalogue.policy.excluded(wanted.provider) | set(wanted.exclude)
    found: list[Candidate] = []
    for name, site in sites(wanted, catalogue).items():
        if name in out:
            continue
        for inner in site.inside(wanted.provider):
            found.append(
                Candidate(inner, "internal" if inner.scheme == "https" else "internal-http")
            )
        found.append(Candidate(site))
    return found


def decide(
    wanted: settings.Mirrors,
    catalogue: Mirrors,
    found: Iterable[Found] = (),
    current: Mapping[str, Site] | None = None,
) -> Choice:
    """The site of every service.

    `found` is what probes found that still holds; `current` are the sites that an earlier choice
    put in force, by service. Raises UsageError as `check` does.
    """
    check(wanted, catalogue)
    results = list(found)
    held = current or {}
    picks: dict[str, Pick] = {}
    for service in SERVICES:
        of_service = [one for one in results if one.service == service]
        picks[service] = _pick(service, wanted, catalogue, of_service, held.get(service))
    return Choice(picks, wanted.git_proxy)


def _pick(
    service: Service,
    wanted: settings.Mirrors,
    catalogue: Mirrors,
    found: list[Found],
    held: Site | None,
) -> Pick:
    name = wanted.pinned.get(service, wanted.site)
    passed = list(_passed(service, wanted, catalogue, found))
    for step in catalogue.policy.order:
        pick: Pick | None = None
        if step == "pinned" and name != "auto":
            pick = _pinned(service, name, wanted, catalogue)
        elif step == "internal":
            inner = [one for one in passed if one.found.via != "public"]
            pick = _of(inner[0], passed, "internal") if inner else None
        elif step == "measured":
            pick = _measured(passed, held, wanted.hysteresis)
        elif step == "official":
            break
        if pick is not None:
            return pick
    out = catalogue.policy.excluded(wanted.provider) | set(wanted.exclude)
    failed = _all_failed(found, held.name if held else "")
    if held is not None and held.name not in out and catalogue.policy.on_all_fail == "keep_current":
        return Pick(service, held, "kept", failed)
    return Pick(service, None, "official", failed)


def _pinned(service: Service, name: str, wanted: settings.Mirrors, catalogue: Mirrors) -> Pick:
    by = f"mirrors.pinned.{service}" if service in wanted.pinned else "mirrors.site"
    if name == "official":
        return Pick(service, None, "official", f"{by} says so")
    site = sites(wanted, catalogue)[name]
    if service in wanted.pinned or site.listed(service):
        return Pick(service, site, "pinned", f"{by} says so")
    lacks = "is not known to carry" if site.carries(service) else "does not carry"
    return Pick(service, None, "official", f"{name} {lacks} {service}")


@dataclass(frozen=True)
class _Passed:
    """A site that works, as narrow as it was found to work."""

    found: Found
    site: Site


def _passed(
    service: Service, wanted: settings.Mirrors, catalogue: Mirrors, found: list[Found]
) -> Iterator[_Passed]:
    """The sites that passed, in the order of the candidates."""
    by = {(one.site, one.via): one for one in found if one.passed}
    for candidate in candidates(wanted, catalogue):
        one = by.get((candidate.site.name, candidate.via))
        if one is not None and candidate.site.carries(service):
            yield _Passed(one, narrowed(candidate.site, service, one.parts))


def narrowed(site: Site, service: Service, parts: Iterable[str]) -> Site:
    """The site with this one service, and of that only the parts that passed."""
    kept = set(parts)
    entry = getattr(site.services, service)
    if isinstance(entry, Apt):
        archives = {name: path for name, path in entry.archives.items() if name in kept}
        entry = entry.model_copy(update={"archives": archives})
    elif isinstance(entry, Conda):
        known = (*entry.subchannels, *entry.unverified)
        subchannels = tuple(sub for sub in known if f"pkgs/{sub}" in kept)
        cloud = {channel: path for channel, path in entry.cloud.items() if channel in kept}
        only = {"subchannels": subchannels, "unverified": (), "cloud": cloud}
        entry = entry.model_copy(update=only)
    services = Services(**{service: entry})
    return site.model_copy(update={"services": services, "internal": None, "gone": (), "notes": ()})


def _measured(passed: list[_Passed], held: Site | None, hysteresis: float) -> Pick | None:
    """The fastest, unless the one in force is nearly as fast."""
    if not passed:
        return None
    best = max(passed, key=_speed)
    if held is not None:
        same = [
            one for one in passed if (one.site.host, one.site.scheme) == (held.host, held.scheme)
        ]
        if same and same[0] is not best and _speed(best) < hysteresis * _speed(same[0]):
            why = f"stays: {best.site.name} ({rate(best.found.speed)}) is not {hysteresis:g} times"
            return _of(same[0], passed, "measured", f"{why} as fast")
    return _of(best, passed, "measured")


def _speed(one: _Passed) -> float:
    return one.found.speed or 0


def _of(one: _Passed, passed: list[_Passed], policy: PolicyName, more: str = "") -> Pick:
    service = one.found.service
    why = "; ".join(filter(None, [rate(one.found.speed), one.found.why, more]))
    return Pick(service, one.site, policy, why, _fallbacks(one, passed))


def _fallbacks(chosen: _Passed, passed: list[_Passed]) -> tuple[str, ...]:
    """The fastest of each other failure domain, then official."""
    domains = {chosen.site.domain}
    names: list[str] = []
    for one in sorted(passed, key=_speed, reverse=True):
        if one.site.domain not in domains and one.found.via == "public":
            domains.add(one.site.domain)
            names.append(one.site.name)
    return (*names, "official")


def unmet(choice: Choice) -> list[str]:
    """A line for the services of which no probed site works: what they use instead, and why."""
    said: dict[str, list[Pick]] = {}
    for pick in choice.picks.values():
        if pick.policy == "kept" or pick.why.startswith(_NONE_PASSED):
            said.setdefault(f"{pick.policy} {pick.name}", []).append(pick)
    lines = []
    for picks in said.values():
        first, services = picks[0], ", ".join(pick.service for pick in picks)
        use = f"kept at {first.name}" if first.policy == "kept" else "left to the official site"
        lines.append(f"{services}: {use}: {first.why}; look with fleet mirrors show")
    return lines


_NONE_PASSED = "no site passed"


def _all_failed(found: list[Found], held: str) -> str:
    """Why no site can be used, those that fail alike together; the site in force first."""
    if not found:
        return "no site was probed"
    reasons: dict[str, list[str]] = {}
    for one in sorted(found, key=lambda one: one.site != held):
        reasons.setdefault(one.why, []).append(one.site)
    lines = [
        f"{sites[0] if len(sites) == 1 else f'{len(sites)} sites'}: {why}"
        for why, sites in reasons.items()
    ]
    more = f"; and {len(lines) - 3} more reasons" if len(lines) > 4 else ""
    return f"{_NONE_PASSED}: " + "; ".join(lines[: 3 if more else 4]) + more


def rate(speed: float | None) -> str:
    """A speed as a person reads it, in MB/s."""
    return "not measured" if speed is None else f"{speed / 1e6:.1f} MB/s"
