"""fleet tunnel: bring a host's demo to a port of this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def tunnel(
    host: Annotated[str, typer.Argument(metavar="HOST", help="A host of the inventory.")],
    local: Annotated[
        int, typer.Option(min=1, max=65535, help="Port of this machine to open.")
    ] = 6006,
    inventory: Annotated[
        Path | None,
        typer.Option("-i", "--inventory", metavar="FILE", help="Default: the running lab's."),
    ] = None,
) -> None:
    """Open a host's demo on this machine, through SSH.

    It is at http://127.0.0.1:LOCAL until Ctrl-C.
    """
    from gpufleet.errors import FleetError
    from gpufleet.run import forward
    from gpufleet.run.inventory import find

    goal = find(inventory, host)
    forward.require_free(local)
    command = forward.command(goal, local, "-N")
    print(
        f"http://127.0.0.1:{local} is the demo on {goal.name}; Ctrl-C ends the tunnel", flush=True
    )
    try:
        os.execvp(command[0], command)
    except FileNotFoundError:
        raise FleetError("no ssh on this machine; install OpenSSH's client") from None
