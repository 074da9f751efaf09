"""Brings the model's files to the host; nothing starts on a file that was not verified there."""

from __future__ import annotations

import json
from dataclasses import asdict

from pyinfra import host
from pyinfra.api import deploy

from gpufleet.run import override
from gpufleet.run.events import emit
from gpufleet.run.targets import target
from gpufleet.weights import operations
from gpufleet.weights.plan import Progress
from gpufleet.weights.transfer import Way
from tasks import current, weight_files

#: A connection that is dead is noticed within a minute, and no question waits for an answer.
SSH = "-T -oBatchMode=yes -oConnectTimeout=15 -oServerAliveInterval=15 -oServerAliveCountMax=3"


@deploy("weights")
def weights() -> None:
    """Send what the host lacks, and have it verified and named there."""
    settings, model = current()
    files, source = weight_files(settings, model)
    goal, name = target(host), host.name

    def report(progress: Progress) -> None:
        emit("progress", name, concern="weights", message=json.dumps(asdict(progress)))

    operations.landed(
        name=f"Bring the files of {settings.model}",
        root=str(settings.root),
        model=settings.model,
        files=files,
        source=source,
        way=Way(tuple(goal.ssh(*SSH.split())), goal.sudo) if goal.connector == "ssh" else Way(),
        bandwidth_kib=settings.weights.bandwidth_kib,
        at_once=settings.weights.at_once,
        deep=override.read().deep,
        report=report,
    )
