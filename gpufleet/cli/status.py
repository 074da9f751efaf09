"""fleet status: say whether every host's demo is well.

The document of `fleet status --json` (`version` 1); what is unknown is null:

    {"version": 1, "command": "status", "exit_code": 0|1,
     "hosts": [{"name": HOST, "healthy": BOOL, "error": LINE, "health": "ok"|…, "model": ID,
                "active": STATE, "enabled": BOOL, "revision_running": DIGEST,
                "revision_on_disk": DIGEST, "since": TIME, "memory_bytes": N,
                "processes": [{"name": UNIT, "active": STATE, "revision_running": DIGEST,
                               "since": TIME, "memory_bytes": N, "health": "ok"|…,
                               "error": LINE or null}, …] where there are several}, …]}
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import typer

from gpufleet.cli import options

if TYPE_CHECKING:
    from gpufleet.run.status import HostStatus


def status(
    inventory: options.Inventory,
    limit: options.Limit = None,
    as_json: options.Json = False,
) -> None:
    """Say whether every host's demo is well.

    Well is: it runs, starts at boot, is the revision on disk, and answers that it is well. Exit
    code 1 if any host's is not.
    """
    from gpufleet.cli import output
    from gpufleet.run import status as run

    hosts = run.ask(inventory, limit or ())
    exit_code = 0 if all(host.healthy for host in hosts) else 1
    if as_json:
        document: dict[str, Any] = {
            "version": output.VERSION,
            "command": "status",
            "exit_code": exit_code,
            "hosts": [host.as_dict() for host in hosts],
        }
        print(json.dumps(document, ensure_ascii=False))
        raise typer.Exit(exit_code)
    output.print_rows(
        ["HOST", "HEALTH", "UNIT", "AT BOOT", "MODEL", "REVISION", "MEMORY", "SINCE"],
        [row for host in hosts for row in (_row(host), *_processes(host))],
    )
    for host in hosts:
        if host.error:
            print(host.error, file=sys.stderr)
    raise typer.Exit(exit_code)


def _row(host: HostStatus) -> list[str]:
    service = host.service
    if service is None:
        return [host.name, "unreachable", *["-"] * 6]
    revision = service.revision_running or "-"
    if service.revision_on_disk and service.revision_on_disk != service.revision_running:
        revision += f" (on disk: {service.revision_on_disk})"
    return [
        host.name,
        host.problem or "ok",
        service.active,
        "yes" if service.enabled else "no",
        host.model or "-",
        revision,
        _memory(service.memory_bytes),
        service.since or "-",
    ]


def _processes(host: HostStatus) -> list[list[str]]:
    """A row for each of several processes, under the host's own."""
    return [
        [
            f"  {one['name'].partition('@')[2].removesuffix('.service')}",
            one["error"] or one["health"],
            one["active"],
            "",
            "",
            one["revision_running"] or "-",
            _memory(one["memory_bytes"]),
            one["since"] or "-",
        ]
        for one in host.processes
    ]


def _memory(size: int | None) -> str:
    return f"{size / 2**20:.0f} MiB" if size else "-"
