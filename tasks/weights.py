"""Brings the model's files to the host; nothing starts on a file that was not verified there."""

from __future__ import annotations

import json
from dataclasses import asdict

from pyinfra import host, state
from pyinfra.api import deploy

from gpufleet.run import override
from gpufleet.run.events import emit
from gpufleet.run.override import settled
from gpufleet.run.targets import target
from gpufleet.settings import Settings, parse
from gpufleet.weights import operations
from gpufleet.weights.plan import Progress
from gpufleet.weights.transfer import Way
from tasks import current, weight_files

#: A connection that is dead is noticed within a minute, and no question waits for an answer.
SSH = "-T -oBatchMode=yes -oConnectTimeout=15 -oServerAliveInterval=15 -oServerAliveCountMax=3"


def _alike(mine: Settings) -> int:
    """How many hosts of this run get the same model."""
    others = (one for one in state.inventory if state.is_host_in_limit(one))
    models = [settled(parse(one.data.dict(), one.name)).model for one in others]
    return models.count(mine.model)


@deploy("weights")
def weights() -> None:
    """Send what the host lacks, and have it verified and named there."""
    settings, model = current()
    files, source = weight_files(settings, model)
    goal, name = target(host), host.name

    def report(progress: Progress) -> None:
        emit("progress", name, concern="weights", message=json.dumps(asdict(progress)))

    operations.landed(
        name=f"Bring the files of {settings.model_id}",
        root=str(settings.root),
        model=settings.model_id,
        files=files,
        source=source,
        via=settings.weights.via,
        hosts=_alike(settings),
        way=Way(tuple(goal.ssh(*SSH.split())), goal.sudo) if goal.connector == "ssh" else Way(),
        bandwidth_kib=settings.weights.bandwidth_kib,
        encrypt=settings.weights.encrypt,
        at_once=settings.weights.at_once,
        deep=override.read().deep,
        report=report,
    )
