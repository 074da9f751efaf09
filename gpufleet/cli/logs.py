"""fleet logs: what a host's demo has logged."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer


def logs(
    host: Annotated[str, typer.Argument(metavar="HOST", help="A host of the inventory.")],
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as lines come.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=1, help="How many lines.")] = 100,
    inventory: Annotated[
        Path | None,
        typer.Option("-i", "--inventory", metavar="FILE", help="Default: the running lab's."),
    ] = None,
) -> None:
    """Show what a host's demo has logged, newest last."""
    from gpufleet.demo.plan import FRONT, TEMPLATE, UNIT
    from gpufleet.errors import FleetError
    from gpufleet.run.inventory import find

    goal = find(inventory, host)
    # Of several processes, each; and nginx before them, which says whom it does not ask.
    units = (UNIT, TEMPLATE.replace("@", "@*"), f"{FRONT}.service", f"{FRONT}-watch.service")
    named = [word for unit in units for word in ("-u", unit)]
    journal = ["journalctl", "--no-pager", *named, "-n", str(lines), *["-f"] * follow]
    if goal.sudo:
        journal = ["sudo", *journal]
    command = [*goal.ssh(), shlex.join(journal)]
    try:
        os.execvp(command[0], command)
    except FileNotFoundError:
        raise FleetError("no ssh on this machine; install OpenSSH's client") from None
