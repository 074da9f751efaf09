"""fleet mirrors: which mirror sites work from every host, which are used, and the way back.

The document of `fleet mirrors probe --json` (`version` 1); what is unknown is null:

    {"version": 1, "command": "mirrors probe", "exit_code": 0|1,
     "hosts": [{"name": HOST, "error": LINE, "note": LINE, "bytes": N, "seconds": S,
                "found": [{"service": SERVICE, "site": SITE,
                           "via": "public"|"internal"|"internal-http",
                           "state": "ok"|"unreachable"|"certificate"|"refused"|"missing"|
                                    "elsewhere"|"portal"|"garbage"|"stale"|"cut"|"slow",
                           "why": TEXT, "bytes_per_second": N, "parts": [NAME, …],
                           "at": SECONDS}, …]}, …]}

`parts` are what passed of a service: archives of apt, `pkgs/NAME` and channels of conda. `at` is
in seconds since 1970. `note` says why a host could not keep what it found.

The document of `fleet mirrors show --json` (`version` 1):

    {"version": 1, "command": "mirrors show", "exit_code": 0|1,
     "hosts": [{"name": HOST, "error": LINE, "written": [PATH, …],
                "services": [{"service": SERVICE, "site": SITE|"official", "url": URL,
                              "policy": "pinned"|"internal"|"measured"|"official"|"kept",
                              "why": TEXT, "fallbacks": [SITE, …], "probe_due": BOOL,
                              "in_force": SITE|"official", "found": as above}, …]}, …]}

`url` is the site's own address, null for official. `probe_due` says that the next apply probes
the service's sites first. `in_force` is what the last apply chose by measurement, null where
nothing was. `written` are the files of mirror configuration on the host.

The document of `fleet mirrors restore --json` is that of `fleet apply --json` with "command":
"mirrors restore".
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpufleet.cli import options
from gpufleet.errors import UsageError

if TYPE_CHECKING:
    from gpufleet.catalog import Service
    from gpufleet.mirrors.choice import Found, Pick
    from gpufleet.run.asking import Asked
    from gpufleet.run.mirrors import Chosen, Probed

VERSION = 1

app = typer.Typer(
    help="Which mirror sites work from the hosts, which they use, and the way back.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Services = Annotated[
    list[str] | None,
    typer.Option("--service", metavar="SERVICE", help="Only these; commas, or repeat it."),
]
Sites = Annotated[
    list[str] | None,
    typer.Option("--site", metavar="SITE", help="Only these sites; commas, or repeat it."),
]


@app.command("probe")
def probe(
    inventory: options.Inventory,
    service: Services = None,
    site: Sites = None,
    limit: options.Limit = None,
    as_json: options.Json = False,
) -> None:
    """Have every host see which mirror sites work for it and how fast they are.

    Each host asks as pip, apt, conda and others would: 20 seconds and 40 MiB at most. It remembers
    what it found, for mirrors.site auto; nothing else is changed. Exit code 1 if a host could not
    be asked, or found no site that works for a service.
    """
    from gpufleet.cli import output, waiting
    from gpufleet.run import mirrors

    services, sites = _services(_split(service)), _split(site)
    with waiting.hosts(as_json) as told:
        hosts = mirrors.probe(inventory, limit or (), told, services=services, sites=sites)
    exit_code = 0 if all(host.answer and _served(host.answer.found) for host in hosts) else 1
    if as_json:
        _print("mirrors probe", exit_code, [_probed(host) for host in hosts])
        raise typer.Exit(exit_code)
    headings = ["HOST", "SERVICE", "SITE", "STATE", "MB/S", "WHY"]
    rows = [
        _row(host.name, row)
        for host in hosts
        if host.answer
        for row in sorted(host.answer.found, key=_rank)
    ]
    output.print_rows(headings, rows)
    for host in hosts:
        if host.answer:
            took = f"{host.answer.seconds:.1f} s, {host.answer.bytes / 2**20:.1f} MiB"
            print(f"{host.name}: {took}")
            if host.answer.note:
                print(f"{host.name}: the results could not be kept: {host.answer.note}")
    _errors(hosts)
    raise typer.Exit(exit_code)


@app.command("show")
def show(
    inventory: options.Inventory,
    limit: options.Limit = None,
    as_json: options.Json = False,
) -> None:
    """Say which site every host gets each kind of package from, and why.

    Changes nothing and probes nothing: it goes by the settings and by what the host remembers.
    """
    from gpufleet.cli import output, waiting
    from gpufleet.run import mirrors

    with waiting.hosts(as_json) as told:
        hosts = mirrors.show(inventory, limit or (), told)
    exit_code = 1 if any(host.error for host in hosts) else 0
    if as_json:
        _print("mirrors show", exit_code, [_chosen(host) for host in hosts])
        raise typer.Exit(exit_code)
    rows = []
    for host in hosts:
        if host.answer is None:
            continue
        for pick in host.answer.choice.picks.values():
            why = "; ".join([pick.why, *_pending(pick, host.answer)])
            after = ", ".join(pick.fallbacks) or "-"
            rows.append([host.name, pick.service, pick.name, pick.policy, after, why])
    output.print_rows(["HOST", "SERVICE", "SITE", "POLICY", "THEN", "WHY"], rows)
    _errors(hosts)
    raise typer.Exit(exit_code)


@app.command("restore")
def restore(
    inventory: options.Inventory,
    limit: options.Limit = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Put back, byte for byte, the package sources that mirrors replaced.

    Files that were not there before are removed. A host where somebody edited one since is left
    alone, and the file is named.
    """
    from gpufleet.cli import output
    from gpufleet.run import pyinfra

    with output.watching(as_json, verbose) as watch:
        result = pyinfra.restore_mirrors(
            inventory,
            limit=limit or (),
            watch=watch,
            output=sys.stderr if verbose else None,
        )
    raise typer.Exit(output.finish(result, as_json))


def _pending(pick: Pick, said: Chosen) -> list[str]:
    """What the next apply does about a service first."""
    lines = []
    now = _in_force(pick, said)
    if now is not None and now != pick.name:
        lines.append(f"{now} is in force until the next apply")
    if pick.service in said.due:
        lines.append("apply probes first")
    return lines


def _in_force(pick: Pick, said: Chosen) -> str | None:
    """What the last choice by measurement put in force for a service."""
    if not said.in_force:
        return None
    site = said.in_force.get(pick.service)
    return site.name if site else "official"


def _split(given: list[str] | None) -> list[str]:
    return [part for value in given or () for part in value.split(",") if part]


def _services(names: list[str]) -> list[Service]:
    from gpufleet.catalog import SERVICES

    for name in names:
        if name not in SERVICES:
            raise UsageError(f"--service {name}: no such service; use one of {', '.join(SERVICES)}")
    return [service for service in SERVICES if service in names]


def _served(found: tuple[Found, ...]) -> bool:
    """Whether some site works for every service that was probed."""
    return {row.service for row in found} == {row.service for row in found if row.passed}


def _rank(row: Found) -> tuple[int, bool, float]:
    """By service, those that work first, the fastest before the others."""
    from gpufleet.catalog import SERVICES

    return SERVICES.index(row.service), not row.passed, -(row.speed or 0)


def _row(host: str, row: Found) -> list[str]:
    speed = "-" if row.speed is None else f"{row.speed / 1e6:.1f}"
    site = row.site if row.via == "public" else f"{row.site} ({row.via})"
    return [host, row.service, site, row.state, speed, row.why]


def _errors(hosts: list[Asked[Probed]] | list[Asked[Chosen]]) -> None:
    for host in hosts:
        if host.error:
            print(host.error, file=sys.stderr)


def _print(command: str, exit_code: int, hosts: list[dict[str, Any]]) -> None:
    document = {"version": VERSION, "command": command, "exit_code": exit_code, "hosts": hosts}
    print(json.dumps(document, ensure_ascii=False))


def _found(row: Found) -> dict[str, Any]:
    return {
        "service": row.service,
        "site": row.site,
        "via": row.via,
        "state": row.state,
        "why": row.why,
        "bytes_per_second": row.speed,
        "parts": list(row.parts),
        "at": row.at,
    }


def _probed(host: Asked[Probed]) -> dict[str, Any]:
    said = host.answer
    if said is None:
        empty: dict[str, Any] = {"note": None, "bytes": None, "seconds": None, "found": []}
        return {"name": host.name, "error": host.error, **empty}
    return {
        "name": host.name,
        "error": None,
        "note": said.note or None,
        "bytes": said.bytes,
        "seconds": said.seconds,
        "found": [_found(row) for row in said.found],
    }


def _chosen(host: Asked[Chosen]) -> dict[str, Any]:
    said = host.answer
    if said is None:
        return {"name": host.name, "error": host.error, "written": [], "services": []}
    return {
        "name": host.name,
        "error": None,
        "written": list(said.written),
        "services": [_service(pick, said) for pick in said.choice.picks.values()],
    }


def _service(pick: Pick, said: Chosen) -> dict[str, Any]:
    return {
        "service": pick.service,
        "site": pick.name,
        "url": pick.site.url("") if pick.site else None,
        "policy": pick.policy,
        "why": pick.why,
        "fallbacks": list(pick.fallbacks),
        "probe_due": pick.service in said.due,
        "in_force": _in_force(pick, said),
        "found": [_found(row) for row in said.found if row.service == pick.service],
    }
