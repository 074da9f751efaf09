"""The deploy's concerns, one @deploy a module; each can run alone with pyinfra."""

from __future__ import annotations

from pyinfra import host, logger
from pyinfra.api import DeployError

from gpufleet import catalog
from gpufleet.catalog import Model
from gpufleet.errors import FleetError
from gpufleet.run.events import emit
from gpufleet.settings import Settings, parse


def current() -> tuple[Settings, Model]:
    """The settings of the host at hand and the catalogue entry of its model.

    Raises DeployError, one line that names the host, if either is invalid.
    """
    try:
        settings = parse(host.data.dict(), host.name)
        return settings, catalog.model(settings.model)
    except FleetError as error:
        raise DeployError(str(error)) from None


def warn(concern: str, message: str) -> None:
    """Tell the person something about the host at hand that stops nothing: one line."""
    logger.warning(f"{host.print_prefix}{message}")
    emit("warning", host=host.name, concern=concern, message=message)
