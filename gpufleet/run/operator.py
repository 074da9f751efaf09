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

from gpufleet import catalog, settings
from gpufleet.errors import FleetError, UsageError
from gpufleet.mirrors.choice import decide


def read(path: Path, limit: Sequence[str] = ()) -> tuple[settings.Mirrors, settings.Weights]:
    """The mirror and weight settings of an inventory's hosts, as far as they concern this machine.

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
    if len({_key(one) for one in every}) > 1:
        raise UsageError(
            f"{path}: its hosts differ in Hugging Face's mirror, weights.hub or weights.source: "
            "name those that count with --limit"
        )
    one = every[0]
    said = {"mirrors": one.mirrors.model_dump(mode="json", exclude_defaults=True)}
    print(json.dumps({**said, "weights": one.weights.model_dump(mode="json")}))


def _key(one: settings.Settings) -> str:
    """What must be the same for all hosts: bandwidth, cloud and the like are the hosts' own."""
    mirrors, weights = one.mirrors, one.weights
    hub = "auto"
    if mirrors.pinned.get("hf", mirrors.site) != "auto":
        hub = decide(mirrors, catalog.mirrors()).picks["hf"].name
    known = mirrors.model_dump_json(include={"sites", "exclude"})
    return json.dumps([hub, known, weights.hub, weights.source])


if __name__ == "__main__":
    try:
        _print(Path(sys.argv[1]), sys.argv[2:])
    except FleetError as error:
        print(json.dumps({"error": str(error)}))
