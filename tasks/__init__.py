"""The deploy's concerns, one @deploy a module; each can run alone with pyinfra."""

from __future__ import annotations

from pathlib import Path

from pyinfra import host, logger, state
from pyinfra.api import DeployError

from gpufleet import catalog
from gpufleet.catalog import Model, WeightFile
from gpufleet.driver.facts import GpuFacts
from gpufleet.errors import FleetError
from gpufleet.mirrors import probe
from gpufleet.mirrors.choice import Choice
from gpufleet.mirrors.facts import MirrorFiles, MirrorProbe
from gpufleet.mirrors.plan import AptSources
from gpufleet.run.events import emit
from gpufleet.run.override import settled
from gpufleet.seen import fresh
from gpufleet.settings import Settings, parse
from gpufleet.weights import local


def current() -> tuple[Settings, Model]:
    """The settings of the host at hand and the catalogue entry of its model.

    Raises DeployError, one line that names the host, if either is invalid.
    """
    try:
        settings = settled(parse(host.data.dict(), host.name))
        return settings, catalog.model(settings.model)
    except FleetError as error:
        raise DeployError(str(error)) from None


def weight_files(settings: Settings, model: Model) -> tuple[tuple[WeightFile, ...], Path]:
    """Every file that the host at hand needs for its model, and the folder here that has them.

    Raises DeployError, one line that names the host, where that is not known.
    """
    try:
        return local.files(settings, model), local.source(settings, model)
    except FleetError as error:
        raise DeployError(f"{host.name}: {error}") from None


def gpus(settings: Settings) -> int:
    """How many NVIDIA GPUs the host at hand has for the demo, which may be none."""
    return len(fresh(GpuFacts).gpus) if settings.accelerator == "cuda" else 0


def warn(concern: str, message: str) -> None:
    """Tell the person something about the host at hand that stops nothing: one line."""
    logger.warning(f"{host.print_prefix}{message}")
    emit("warning", host=host.name, concern=concern, message=message)


def mirror_files() -> AptSources:
    """The mirror configuration of the host at hand, asked once."""
    settings, _ = current()
    return fresh(MirrorFiles, root=str(settings.root), user=settings.user)


def mirror_choice() -> Choice:
    """Where the host at hand gets each kind of package from.

    One command, whichever concern asks first, and another where sites must be probed. Raises
    DeployError for a setting that names a site that is not there.
    """
    settings, _ = current()
    try:
        return probe.choose(
            settings.mirrors,
            catalog.mirrors(),
            probe.about(settings, catalog.drivers(), mirror_files()),
            lambda plan: fresh(MirrorProbe, plan=plan),
            name=host.name,
            hosts=len([one for one in state.inventory if state.is_host_in_limit(one)]),
        )
    except FleetError as error:
        raise DeployError(f"{host.name}: {error}") from None
