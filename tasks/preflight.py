"""Stops before anything changes if any host of the fleet cannot take the deploy."""

from __future__ import annotations

import weakref

import gevent
from gevent.event import AsyncResult
from pyinfra import host, state
from pyinfra.api import DeployError, deploy
from pyinfra.api.host import Host
from pyinfra.context import ctx_host

from gpufleet import catalog
from gpufleet.catalog import Drivers, WeightFile
from gpufleet.driver.facts import GpuFacts
from gpufleet.errors import FleetError
from gpufleet.kernel.facts import KernelFacts
from gpufleet.mirrors.choice import check as check_mirrors
from gpufleet.preflight.facts import Preflight
from gpufleet.preflight.local import missing_programs
from gpufleet.preflight.plan import (
    driver_findings,
    findings,
    idle_gpus,
    part_findings,
    torch_findings,
)
from gpufleet.python_env.conda import check_installer, pair_findings, recipes
from gpufleet.python_env.plan import PYTHON, lock_for
from gpufleet.run.events import emit
from gpufleet.run.only import alone, selected
from gpufleet.run.override import settled
from gpufleet.seen import fresh
from gpufleet.settings import Settings, parse
from gpufleet.upstream import plan as upstream
from gpufleet.weights.local import check_source
from gpufleet.weights.local import files as weight_files
from tasks import warn
from tasks.upstream import head

# One report a run: pyinfra loads the deploy once a host, and the first host that comes here asks
# all of them, so that the report is whole before the first host may go on.
_reports: weakref.WeakKeyDictionary[object, AsyncResult[list[str]]] = weakref.WeakKeyDictionary()


def _check(one: Host) -> list[str]:
    """Everything that speaks against this host; what this machine lacks comes first."""
    found = missing_programs()

    def noted(error: FleetError) -> None:
        found.append(str(error).removeprefix(f"{one.name}: "))

    try:
        settings = settled(parse(one.data.dict(), one.name))
        model = catalog.model(settings.model)
        drivers = catalog.drivers()
        pushing, environment = alone("weights"), selected("python_env")
        python = lock_for(settings.accelerator).python if environment else PYTHON
        made = recipes(settings) if environment else ()
        if settings.python_env.manager != "uv" and environment:
            check_installer(settings.python_env, catalog.mirrors())
    except FleetError as error:
        noted(error)
        return found
    try:
        check_mirrors(settings.mirrors, catalog.mirrors())
    except FleetError as error:
        noted(error)
    found += upstream.findings(settings, model)
    found += torch_findings(settings.accelerator, made)
    if settings.runtime == "upstream" and selected("upstream"):
        try:
            head(settings)
        except FleetError as error:
            noted(error)
    files: tuple[WeightFile, ...] = ()
    try:
        wrong = check_source(settings, model)
        found += wrong
        if not wrong and selected("weights"):
            files = weight_files(settings, model)
            found += part_findings(settings.model_id, model, files)
    except FleetError as error:
        noted(error)
    if not one.connected:  # its settings are checked all the same; the connection is reported
        return found
    try:
        with ctx_host.use(one):
            picture = one.get_fact(
                Preflight,
                root=str(settings.root),
                port=settings.demo.port,
                python=python,
            )
            cuda = settings.accelerator == "cuda" and picture is not None and picture.gpus
            verdict = _driver(settings, drivers) if cuda else None
            if picture is not None and (idle := idle_gpus(settings, picture)) is not None:
                warn("preflight", idle)
    except EOFError:  # pyinfra asks for sudo's password, and nobody is there to give it
        message = "sudo asks for a password: connect as root or allow sudo without a password"
        return [*found, message]
    if picture is None:
        message = "the preflight script did not run: log in as root, or use sudo without a password"
        return [*found, message]
    return (
        found
        + findings(
            settings,
            settings.model_id,
            model,
            picture,
            python,
            environment=environment,
            driver=verdict,
            files=files,
            serving=not pushing,
        )
        + pair_findings(
            made,
            picture.driver,
            picture.gpus,
            drivers,
            to_come=(settings.driver.cuda or drivers.environments.cuda)
            if verdict is not None
            else None,
        )
    )


def _driver(settings: Settings, drivers: Drivers) -> list[str] | None:
    """What speaks against the driver that this run would bring; None where it brings none."""
    if settings.driver.source == "present" or not selected("driver"):
        return None
    return driver_findings(settings, fresh(KernelFacts), fresh(GpuFacts), drivers)


def _report() -> list[str]:
    hosts = [one for one in state.inventory if state.is_host_in_limit(one)]
    jobs = [gevent.spawn(_check, one) for one in hosts]
    gevent.joinall(jobs)
    lines = []
    for one, job in zip(hosts, jobs, strict=True):
        for message in job.get():
            emit("finding", host=one.name, concern="preflight", message=message)
            lines.append(f"{one.name}: {message}")
    return lines


@deploy("preflight")
def preflight() -> None:
    """Report all findings of all hosts, then stop if there are any."""
    key = state.inventory
    if key not in _reports:
        _reports[key] = AsyncResult()
        try:
            _reports[key].set(_report())
        except Exception as error:
            _reports[key].set_exception(error)
            raise
    lines = _reports[key].get()
    if lines:
        raise DeployError("preflight, nothing was changed:\n  " + "\n  ".join(lines))
    host.noop("this host can take the deploy")
