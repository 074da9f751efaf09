"""Asks every host which mirror sites work for it, and which it uses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpufleet.errors import FleetError, UsageError
from gpufleet.run.asking import Asked, Asker, ask

if TYPE_CHECKING:
    from gpufleet.catalog import Service, Site
    from gpufleet.mirrors.choice import Choice, Found
    from gpufleet.mirrors.plan import AptSources


@dataclass(frozen=True)
class Probed:
    """What a host found of the sites it was asked about, and how much that took."""

    found: tuple[Found, ...]
    bytes: int
    seconds: float
    note: str


def probe(
    path: Path,
    limit: Sequence[str] = (),
    told: Callable[[int, int], None] = lambda done, of: None,
    *,
    services: Sequence[Service] = (),
    sites: Sequence[str] = (),
) -> list[Asked[Probed]]:
    """Have every host probe the mirror sites that `auto` may choose, and remember what it found.

    Nothing else is changed. `services` and `sites` limit it. Raises UsageError for an invalid
    inventory or limit; a host whose settings do not know a site says so.
    """
    from gpufleet import catalog
    from gpufleet.mirrors import choice
    from gpufleet.mirrors import probe as probing
    from gpufleet.mirrors.facts import MirrorProbe

    wanted = list(services) or list(catalog.SERVICES)

    def one(host: Asker) -> Probed:
        settings, catalogue = host.settings, catalog.mirrors()
        choice.check(settings.mirrors, catalogue)
        known = choice.sites(settings.mirrors, catalogue)
        for name in sites:
            if name not in known:
                line = f"--site {name}: no such site; use one of {', '.join(sorted(known))}"
                raise UsageError(f"{host.name}: {line}")
        about = probing.about(settings, catalog.drivers(), mirror_files(host))
        plan = probing.plan(
            choice.candidates(settings.mirrors, catalogue),
            about,
            services=wanted,
            only=sites,
            name=host.name,
            hosts=host.fleet,
        )
        asked = {
            (s["site"], s["via"], of) for s in json.loads(plan)["sites"] for of in s["services"]
        }
        if not asked:
            which = "the named sites are" if sites else "every site is"
            line = f"nothing to probe: {which} excluded or without these services for this host"
            raise FleetError(f"{host.name}: {line}")
        kept = host.fact(MirrorProbe, plan=plan)
        found = tuple(row for row in kept.found if (row.site, row.via, row.service) in asked)
        if not found:
            raise FleetError(f"{host.name}: the probe gave no answer; does the host have python3?")
        return Probed(found, kept.bytes, kept.seconds, kept.note)

    return ask(path, one, limit, told)


@dataclass(frozen=True)
class Chosen:
    """The sites that a host's settings and memory choose, and those that are in force there."""

    choice: Choice
    found: tuple[Found, ...]
    """What the host remembers of its probes."""
    due: tuple[Service, ...]
    """Services that the next apply probes first."""
    written: tuple[str, ...]
    """Files of mirror configuration that gpufleet has written there."""
    in_force: Mapping[str, Site]
    """Of a choice by measurement: the sites that the last apply put in force, by service."""


def show(
    path: Path,
    limit: Sequence[str] = (),
    told: Callable[[int, int], None] = lambda done, of: None,
) -> list[Asked[Chosen]]:
    """Which site every host gets each kind of package from, and why; nothing is probed.

    Raises UsageError for an invalid inventory or limit.
    """
    from gpufleet import catalog
    from gpufleet.mirrors import probe as probing
    from gpufleet.mirrors.plan import held

    def one(host: Asker) -> Chosen:
        sources = mirror_files(host)
        about = probing.about(host.settings, catalog.drivers(), sources)
        settings, catalogue = host.settings.mirrors, catalog.mirrors()
        return Chosen(
            probing.choose(settings, catalogue, about),
            probing.read(sources.cache).found,
            probing.missing(settings, catalogue, about),
            sources.written,
            held(sources.record),
        )

    return ask(path, one, limit, told)


def mirror_files(host: Asker) -> AptSources:
    """The host's package sources and mirror configuration: one command."""
    from gpufleet.mirrors.facts import MirrorFiles

    return host.fact(MirrorFiles, root=str(host.settings.root), user=host.settings.user)
