"""Pins the kernel together with the driver's module that matches it, once the two work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, overload

from pyinfra import host, state
from pyinfra.api import DeployError, deploy

from gpufleet import catalog
from gpufleet.catalog import Drivers
from gpufleet.driver.facts import GpuFacts
from gpufleet.driver.plan import allowed
from gpufleet.driver.verdict import problems
from gpufleet.errors import FleetError
from gpufleet.kernel import operations
from gpufleet.kernel.facts import KernelFacts
from gpufleet.kernel.plan import FILES, Drift, missing, target, unwritten
from gpufleet.managed import operations as managed
from gpufleet.managed.plan import ManagedFile
from gpufleet.seen import changed, fresh
from tasks import current

T = TypeVar("T")


class _AsOf(Sequence[T]):
    """What an operation is given, made when it looks: the tasks before it may change the host.

    Made once for preparing and once for executing, as the operation looks then.
    """

    def __init__(self, make: Callable[[], Sequence[T]]) -> None:
        self._make = make
        self._made: dict[bool, Sequence[T]] = {}

    def _now(self) -> Sequence[T]:
        executing = bool(state.is_executing)
        if executing not in self._made:
            self._made[executing] = self._make()
        return self._made[executing]

    def __len__(self) -> int:
        return len(self._now())

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        return self._now()[index]


@deploy("kernel")
def kernel() -> None:
    """Leave a CPU host alone; elsewhere pin the kernel that runs, or lift the pin.

    Each operation decides when it runs, from facts that are asked anew after a change.
    """
    settings, _ = current()
    if settings.accelerator == "cpu":
        return
    if not settings.kernel.pin:
        _lift()
        return
    try:
        drivers = catalog.drivers()
    except FleetError as error:
        raise DeployError(f"{host.name}: {error}") from None
    drift = settings.kernel.drift
    # Before anything is held: a kernel without a working module would stay without one.
    operations.working(
        name="See that the GPU works on the kernel to pin",
        problems=_AsOf(lambda: _problems(drivers, drift)),
    )
    operations.held(name="Hold the packages of kernel and driver", drift=drift)
    managed.files(
        name="Write the files of the pin",
        wanted=_AsOf(lambda: _unwritten(drift)),
        _if=lambda: bool(_picked(drift)),
    )
    operations.booting(name="Let GRUB boot the pinned kernel", drift=drift)
    operations.pinned(name="See that the pin holds", drift=drift)


def _lift() -> None:
    operations.unheld(name="Lift the holds of kernel and driver")
    managed.restored(name="Remove the files of the pin", paths=FILES, _if=_written)
    operations.booting(name="Let GRUB choose the kernel again", drift=None)


def _problems(drivers: Drivers, drift: Drift) -> list[str]:
    """Why the kernel to pin must not be pinned."""
    kernels = fresh(KernelFacts)
    if gone := missing(kernels, drift):
        return [gone]
    gpus = fresh(GpuFacts)
    release = target(kernels, drift)
    found = problems(kernels, gpus, release, allowed(gpus, drivers))
    return [problem.text for problem in found]


def _picked(drift: Drift) -> list[ManagedFile]:
    kernels = fresh(KernelFacts)
    return unwritten(kernels, target(kernels, drift))


def _unwritten(drift: Drift) -> list[ManagedFile]:
    """The files to write. They will be: what was seen of the host is forgotten."""
    found = _picked(drift)
    changed()
    return found


def _written() -> bool:
    """Whether there are files to remove. They will be: what was seen is forgotten."""
    found = bool(fresh(KernelFacts).managed.records)
    if found:
        changed()
    return found
