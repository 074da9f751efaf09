"""Pins the kernel, so that the driver's module keeps matching it."""

from __future__ import annotations

from pyinfra import host
from pyinfra.api import DeployError, deploy

from tasks import current


@deploy("kernel")
def kernel() -> None:
    """Leave the kernel of a CPU host alone."""
    settings, _ = current()
    if settings.accelerator != "cpu":
        raise DeployError(f"{host.name}: this version pins no kernel: set accelerator to cpu")
