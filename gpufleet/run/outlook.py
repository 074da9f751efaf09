"""Asks every host what becomes of its GPU, and what is wrong with it: forecast and doctor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpufleet.errors import FleetError
from gpufleet.run.alike import Alike
from gpufleet.run.asking import Asked, Asker, ask
from gpufleet.run.mirrors import mirror_files

if TYPE_CHECKING:
    from gpufleet.driver.doctor import Finding
    from gpufleet.driver.forecast import Forecast
    from gpufleet.driver.picture import GpuPicture
    from gpufleet.driver.verdict import Flavour
    from gpufleet.kernel.picture import KernelPicture
    from gpufleet.upgrade.plan import Upgrade


@dataclass(frozen=True)
class Pictures:
    """What forecast and doctor judge a host by."""

    kernels: KernelPicture
    gpus: GpuPicture
    upgrade: Upgrade
    allowed: frozenset[Flavour]


def pictures(host: Asker, upgrades: Alike[Upgrade]) -> Pictures:
    """Look at a host's kernels, GPUs and next upgrade: three commands, and one more for the first
    of the hosts whose packages are in the same state. apt weighs every package that there is,
    which takes a host most of its time; fleets are made from few images."""
    from gpufleet import catalog
    from gpufleet.driver.facts import GpuFacts
    from gpufleet.driver.plan import allowed
    from gpufleet.kernel.facts import KernelFacts
    from gpufleet.upgrade.facts import NextUpgrade, PackageState
    from gpufleet.upgrade.plan import of_this_host

    gpus = host.fact(GpuFacts)
    kernels = host.fact(KernelFacts)
    state = host.fact(PackageState)
    upgrade = upgrades.get(state.digest, lambda: host.fact(NextUpgrade))
    return Pictures(kernels, gpus, of_this_host(upgrade, state), allowed(gpus, catalog.drivers()))


def foretell(
    path: Path,
    limit: Sequence[str] = (),
    told: Callable[[int, int], None] = lambda done, of: None,
) -> list[Asked[Forecast]]:
    """The forecast of every host. Raises UsageError for an invalid inventory or limit."""
    from gpufleet.driver.forecast import forecast

    upgrades: Alike[Upgrade] = Alike()

    def one(host: Asker) -> Forecast:
        seen = pictures(host, upgrades)
        return forecast(
            seen.kernels,
            seen.gpus,
            seen.upgrade,
            host.settings,
            allowed=seen.allowed,
            apply=_apply(path, host),
        )

    return ask(path, one, limit, told)


def examine(
    path: Path,
    limit: Sequence[str] = (),
    told: Callable[[int, int], None] = lambda done, of: None,
) -> list[Asked[tuple[Finding, ...]]]:
    """What is wrong on every host. Raises UsageError for an invalid inventory or limit."""
    from gpufleet.demo.facts import DemoService
    from gpufleet.driver.doctor import findings, in_order
    from gpufleet.kernel.plan import leaks, target
    from gpufleet.mirrors import doctor as mirrors

    upgrades: Alike[Upgrade] = Alike()

    def one(host: Asker) -> tuple[Finding, ...]:
        seen = pictures(host, upgrades)
        sources = mirror_files(host)
        service = host.fact(DemoService, address=f"http://{host.target.demo_on_host}")
        found = findings(
            seen.kernels,
            seen.gpus,
            service,
            seen.upgrade,
            host.settings,
            allowed=seen.allowed,
            pin=leaks(seen.kernels, target(seen.kernels, host.settings.kernel.drift)),
            apply=_apply(path, host),
        )
        environments = _environments(host, path, bool(seen.gpus.gpus))
        return in_order([*found, *mirrors.findings(sources), *environments])

    return ask(path, one, limit, told)


def _environments(host: Asker, path: Path, gpu: bool) -> tuple[Finding, ...]:
    """What is wrong with a host's Python environments: one command."""
    from gpufleet.python_env.conda import digests, recipes
    from gpufleet.python_env.doctor import findings
    from gpufleet.python_env.facts import InsideEnvironments

    try:
        wanted, made = digests(host.settings), recipes(host.settings)
    except FleetError:  # nothing can be made of these settings: preflight says why
        return ()
    seen = host.fact(InsideEnvironments, root=str(host.settings.root))
    return findings(seen, host.settings, wanted, made, gpu=gpu, apply=_apply(path, host))


def _apply(path: Path, host: Asker) -> str:
    """The command that applies to one host."""
    return f"./fleet apply -i {path} --limit {host.name}"
