"""Renders the two YAML files that the model is configured by."""

from __future__ import annotations

from pyinfra import host
from pyinfra.api import DeployError, deploy

from gpufleet.config.plan import files
from gpufleet.errors import FleetError
from gpufleet.managed import operations as managed
from gpufleet.weights.plan import folder, version
from tasks import current, weight_files


@deploy("config")
def config() -> None:
    """Write minigpt4.yaml and minigpt4_eval.yaml."""
    settings, model = current()
    weights = folder(settings.root, version(settings.model_id, weight_files(settings, model)[0]))
    try:
        wanted = files(settings, model, weights)
    except FleetError as error:
        raise DeployError(f"{host.name}: {error}") from None
    managed.files(name="Write minigpt4.yaml and minigpt4_eval.yaml", wanted=wanted)
