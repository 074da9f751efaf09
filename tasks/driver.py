"""Installs the NVIDIA driver, for every kernel that runs or boots next, and keeps it working."""

from __future__ import annotations

from pyinfra import host
from pyinfra.api import DeployError, deploy

from gpufleet import catalog
from gpufleet.driver import files, operations
from gpufleet.driver.facts import GpuFacts
from gpufleet.errors import FleetError
from gpufleet.managed import operations as managed
from gpufleet.seen import fresh
from tasks import current


@deploy("driver")
def driver() -> None:
    """Leave a CPU host alone; elsewhere do what is not done yet.

    Each operation decides when it runs, from two facts that are asked anew after a change.
    """
    settings, _ = current()
    if settings.accelerator == "cpu":
        return
    try:
        drivers = catalog.drivers()
        nouveau, guard = files.nouveau(), files.guard()
    except FleetError as error:
        raise DeployError(f"{host.name}: {error}") from None
    operations.permitted(name="See that a driver fits", settings=settings, drivers=drivers)
    operations.components(
        name="Enable the package sources of the driver", settings=settings, drivers=drivers
    )
    # Before the driver, whose packages would bring the latest headers instead of these.
    operations.headers(
        name="Install the headers of the kernels in use", settings=settings, drivers=drivers
    )
    operations.packages(name="Install the driver's packages", settings=settings, drivers=drivers)
    operations.runfile(name="Install the driver's .run file", settings=settings, drivers=drivers)
    written = managed.files(
        name="Keep nouveau out",
        wanted=nouveau,
        _if=lambda: files.differ(nouveau, fresh(GpuFacts)),
    )
    operations.nouveau(
        name="Take that into every initrd",
        everywhere=True,
        _if=written.did_change,
        settings=settings,
        drivers=drivers,
    )
    operations.nouveau(name="Drop nouveau from the initrds", settings=settings, drivers=drivers)
    operations.modules(
        name="Give the kernels in use their module", settings=settings, drivers=drivers
    )
    operations.loaded(name="Load the module", settings=settings, drivers=drivers)
    operations.services(name="Run the driver's services", settings=settings, drivers=drivers)
    if settings.driver.boot_guard:
        managed.files(
            name="Write the boot guard",
            wanted=guard,
            _if=lambda: files.differ(guard, fresh(GpuFacts)),
        )
        operations.boot_guard(name="Enable the boot guard", enabled=True)
    else:
        operations.boot_guard(name="Disable the boot guard", enabled=False)
        managed.restored(
            name="Remove the boot guard",
            paths=[file.path for file in guard],
            _if=lambda: files.lie(guard, fresh(GpuFacts)),
        )
    operations.rebooted(name="Boot the kernel that shall run", settings=settings, drivers=drivers)
