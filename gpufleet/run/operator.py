"""Prints the settings of an inventory that concern this machine and not the hosts, as JSON.

It is a process of its own: reading an inventory imports pyinfra's command line, which replaces
the threads and sockets of its process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gpufleet import settings
from gpufleet.errors import FleetError, UsageError


def read(path: Path, limit: Sequence[str] = ()) -> tuple[settings.Mirrors, settings.Weights]:
    """The mirror and weight settings that all hosts of an inventory have, or those of `limit`.

    Raises UsageError for an inventory or limit that is invalid, or whose hosts differ in them.
    """
    command = [sys.executable, "-m", "gpufleet.run.operator", str(path), *limit]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        said = json.loads(done.stdout)
    except ValueError:
        why = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise FleetError(f"{path}: cannot read it: {why}") from None
    if "error" in said:
        raise UsageError(said["error"])
    weights = settings.Weights.model_validate(said["weights"])
    return settings.Mirrors.model_validate(said["mirrors"]), weights


def _print(path: Path, limit: Sequence[str]) -> None:
    from gpufleet.run import inventory

    every = [
        settings.parse(host.data.dict(), host.name)
        for host in inventory.hosts(inventory.load(path, inventory.split(limit)))
    ]
    if len({(one.mirrors.model_dump_json(), one.weights.model_dump_json()) for one in every}) > 1:
        raise UsageError(
            f"{path}: its hosts differ in mirrors or weights: name those that count with --limit"
        )
    one = every[0]
    said = {"mirrors": one.mirrors.model_dump(mode="json", exclude_defaults=True)}
    print(json.dumps({**said, "weights": one.weights.model_dump(mode="json")}))


if __name__ == "__main__":
    try:
        _print(Path(sys.argv[1]), sys.argv[2:])
    except FleetError as error:
        print(json.dumps({"error": str(error)}))
