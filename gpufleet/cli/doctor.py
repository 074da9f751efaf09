"""fleet doctor: say everything that is wrong with every host, and what mends it.

The document of `fleet doctor --json` (`version` 1):

    {"version": 1, "command": "doctor", "exit_code": 0|1,
     "hosts": [{"name": HOST, "error": LINE|null, "healthy": BOOL,
                "findings": [{"code": CODE, "severity": "error"|"warning"|"note", "cause": TEXT,
                              "evidence": TEXT, "mend": TEXT}, …]}, …]}

A host with an `error` could not be asked. `note` findings are nothing wrong.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import typer

from gpufleet.cli import options

VERSION = 1


def doctor(
    inventory: options.Inventory,
    limit: options.Limit = None,
    as_json: options.Json = False,
) -> None:
    """Say what is wrong with kernel, driver and demo: cause, evidence, and what mends it.

    Changes nothing. Exit code 1 if anything is wrong or a host could not be asked.
    """
    from gpufleet.cli import waiting
    from gpufleet.driver.doctor import wrong
    from gpufleet.run import outlook

    with waiting.hosts(as_json) as told:
        hosts = outlook.examine(inventory, limit or (), told)
    ill = [host for host in hosts if host.error or wrong(host.answer or ())]
    exit_code = 1 if ill else 0
    if as_json:
        document = {
            "version": VERSION,
            "command": "doctor",
            "exit_code": exit_code,
            "hosts": [
                {
                    "name": host.name,
                    "error": host.error,
                    "healthy": host not in ill,
                    "findings": [asdict(finding) for finding in host.answer or ()],
                }
                for host in hosts
            ],
        }
        print(json.dumps(document, ensure_ascii=False))
        raise typer.Exit(exit_code)
    for host in hosts:
        for each in host.answer or ():
            print(f"{host.name}: {each.severity}: {each.cause} ({each.evidence}); {each.mend}")
        if host.error:
            print(host.error, file=sys.stderr)
    well = len(hosts) - len(ill)
    print(f"{well} of {len(hosts)} hosts well")
    raise typer.Exit(exit_code)
