"""Renders the YAML files that the model is configured by."""

from __future__ import annotations

from pathlib import PurePosixPath

from pyinfra import host
from pyinfra.api import DeployError, deploy

from gpufleet.config.plan import files
from gpufleet.errors import FleetError
from gpufleet.managed import operations as managed
from gpufleet.weights.plan import folder, version
from tasks import current, weight_files


@deploy("config")
def config() -> None:
    """Write minigpt4.yaml and minigpt4_eval.yaml, or what else the model's system reads."""
    settings, model = current()
    weights = folder(settings.root, version(settings.model_id, weight_files(settings, model)[0]))
    try:
        wanted = files(settings, model, weights)
    except FleetError as error:
        raise DeployError(f"{host.name}: {error}") from None
    names = " and ".join(PurePosixPath(file.path).name for file in wanted)
    managed.files(name=f"Write {names}", wanted=wanted)
