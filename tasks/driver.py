"""Installs the accelerator's driver."""

from __future__ import annotations

from pyinfra import host
from pyinfra.api import DeployError, deploy

from tasks import current


@deploy("driver")
def driver() -> None:
    """Install nothing on a CPU host."""
    settings, _ = current()
    if settings.accelerator != "cpu":
        raise DeployError(f"{host.name}: this version installs no driver: set accelerator to cpu")
