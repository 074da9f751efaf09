"""Renders the two YAML files that the model is configured by."""

from __future__ import annotations

from pyinfra import host
from pyinfra.api import DeployError, deploy

from gpufleet.config.plan import files
from gpufleet.errors import FleetError
from gpufleet.managed import operations as managed
from tasks import current


@deploy("config")
def config() -> None:
    """Write minigpt4.yaml and minigpt4_eval.yaml."""
    settings, model = current()
    try:
        wanted = files(settings, model)
    except FleetError as error:
        raise DeployError(f"{host.name}: {error}") from None
    managed.files(name="Write minigpt4.yaml and minigpt4_eval.yaml", wanted=wanted)
