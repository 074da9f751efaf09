"""fleet forecast: say what becomes of every host's GPUs at the next reboot and the next upgrade.

The document of `fleet forecast --json` (`version` 1); what is unknown is null:

    {"version": 1, "command": "forecast", "exit_code": 0|1|4,
     "hosts": [{"name": HOST, "error": LINE, "safe": BOOL, "gpu": BOOL,
                "kernels": [{"release": RELEASE, "running": BOOL, "next": BOOL, "ok": BOOL,
                             "problems": [TEXT, …]}, …],
                "reboot": {"verdict": "safe"|"unsafe", "kernel": RELEASE, "why": TEXT,
                           "reasons": [REASON, …]},
                "upgrade": {"verdict": "safe"|"unsafe"|"nothing"|"unknown", "kernel": RELEASE,
                            "kernels": [RELEASE, …], "libraries": VERSION,
                            "reasons": [REASON, …]},
                "unattended": the same, with "off" where it does not happen by itself,
                "notes": [TEXT, …]}, …]}

REASON is {"code": CODE, "text": TEXT, "mend": TEXT}. `gpu` is whether there is a GPU to lose;
`kernels` of an upgrade are those that come, `kernel` the one that boots after it, `libraries` the
version of the driver's libraries after it. Of a host with an `error` only the name is known.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from gpufleet.cli import options

if TYPE_CHECKING:
    from gpufleet.driver.forecast import Forecast
    from gpufleet.run.asking import Asked

VERSION = 1


def forecast(
    inventory: options.Inventory,
    limit: options.Limit = None,
    as_json: options.Json = False,
) -> None:
    """Say what becomes of the GPUs at the next reboot and the next package upgrade.

    Changes nothing. Which kernel starts next, whether the GPU works on it, what apt would bring
    and what would boot then, with every reason. Exit code 4 if a host is unsafe, 1 if one could
    not be asked.
    """
    from gpufleet.cli import output, waiting
    from gpufleet.run import outlook

    with waiting.hosts(as_json) as told:
        hosts = outlook.foretell(inventory, limit or (), told)
    exit_code = 1 if any(h.error for h in hosts) else 0
    if not exit_code and not all(h.answer.safe for h in hosts if h.answer):
        exit_code = 4
    if as_json:
        document = {
            "version": VERSION,
            "command": "forecast",
            "exit_code": exit_code,
            "hosts": [_document(host) for host in hosts],
        }
        print(json.dumps(document, ensure_ascii=False))
        raise typer.Exit(exit_code)
    headings = ["HOST", "NEXT BOOT", "REBOOT", "UPGRADE", "WHY"]
    output.print_rows(headings, [_row(host) for host in hosts])
    notes: dict[str, list[str]] = {}
    for host in hosts:
        for line in _lines(host):
            print(line)
        for note in host.answer.notes if host.answer and host.answer.gpu else ():
            notes.setdefault(note, []).append(host.name)
    for note, names in notes.items():
        print(f"{waiting.several(names)}: note: {note}")
    for host in hosts:
        if host.error:
            print(host.error, file=sys.stderr)
    raise typer.Exit(exit_code)


def _row(host: Asked[Forecast]) -> list[str]:
    said = host.answer
    if said is None:
        return [host.name, "-", "-", "-", "could not be asked"]
    reasons = [reason.text for reason in said.reasons]
    if reasons:
        why = reasons[0] + (f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else "")
    else:
        why = said.reboot.why if said.gpu else "no GPU to lose"
    kernel = said.reboot.kernel or "-"
    return [host.name, kernel, said.reboot.verdict, said.upgrade.verdict, why]


def _lines(host: Asked[Forecast]) -> list[str]:
    """Every reason of an unsafe host, one line each, with what to do."""
    said = host.answer
    if said is None:
        return []
    itself = {reason.text for reason in said.unattended.reasons}
    lines = [f"{host.name}: reboot: {r.text}; {r.mend}" for r in said.reboot.reasons]
    for reason in said.upgrade.reasons:
        who = "unattended-upgrades" if reason.text in itself else "upgrade"
        lines.append(f"{host.name}: {who}: {reason.text}; {reason.mend}")
    return lines


def _document(host: Asked[Forecast]) -> dict[str, Any]:
    said = host.answer
    if said is None:
        return {"name": host.name, "error": host.error}
    flat = asdict(said)
    kernels = [{**asdict(one), "ok": one.ok} for one in said.kernels]
    return {"name": host.name, "error": None, "safe": said.safe, **flat, "kernels": kernels}
