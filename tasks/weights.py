"""Brings the model's files to the host; nothing starts on a file that was not verified there."""

from __future__ import annotations

from pyinfra import host
from pyinfra.api import DeployError, deploy

from gpufleet.errors import FleetError
from gpufleet.weights import operations
from gpufleet.weights.local import files, source
from tasks import current


@deploy("weights")
def weights() -> None:
    """Send what is missing or differs, and verify it on the host."""
    settings, model = current()
    try:
        folder, wanted = source(settings, model), files(settings, model)
    except FleetError as error:
        raise DeployError(f"{host.name}: {error}") from None
    operations.synced(
        name=f"Bring the files of {settings.model}",
        folder=f"{settings.root}/weights/{settings.model}",
        incoming=f"{settings.root}/incoming/weights-{settings.model}",
        files=wanted,
        source=folder,
        bandwidth_kib=settings.weights.bandwidth_kib,
    )
