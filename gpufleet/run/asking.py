"""Asks every host of an inventory at once: one connection a host, one command a fact, nothing
changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from gpufleet.errors import FleetError, UsageError
from gpufleet.run import advice, inventory
from gpufleet.run.targets import Target
from gpufleet.settings import Settings, parse

if TYPE_CHECKING:
    from pyinfra.api import FactBase, State
    from pyinfra.api.host import Host

    from gpufleet.catalog import Service, Site
    from gpufleet.driver.doctor import Finding
    from gpufleet.driver.forecast import Forecast
    from gpufleet.driver.picture import GpuPicture
    from gpufleet.driver.verdict import Flavour
    from gpufleet.kernel.picture import KernelPicture
    from gpufleet.mirrors.choice import Choice, Found
    from gpufleet.mirrors.plan import AptSources
    from gpufleet.upgrade.plan import Upgrade

_T = TypeVar("_T")

#: Seconds that one question may take: apt on a slow disk takes some, a host that hangs for ever.
TIMEOUT = 120


@dataclass(frozen=True)
class Asked(Generic[_T]):
    """One host's answer, or the line that says why there is none."""

    name: str
    answer: _T | None
    error: str | None = None


class Asker:
    """A host that is connected and can be asked for facts."""

    def __init__(self, state: State, host: Host, target: Target, settings: Settings) -> None:
        self._state = state
        self._host = host
        self.name = host.name
        self.target = target
        self.settings = settings

    @property
    def fleet(self) -> int:
        """How many hosts are asked at the same time."""
        return len(inventory.hosts(self._state))

    def fact(self, fact: type[FactBase[_T]], **arguments: Any) -> _T:
        """The host's fact, by one command.

        pyinfra's own get_fact gives a fact's default where the command fails, which would look
        like an answer. Raises FleetError, one line, if the host does not give one.
        """
        from paramiko import SSHException
        from pyinfra.api.arguments import CONNECTOR_ARGUMENT_KEYS, pop_global_arguments
        from pyinfra.api.exceptions import FactProcessError

        asked = fact()
        given, _ = pop_global_arguments(self._state, self._host, {})
        how: dict[str, Any] = {k: v for k, v in given.items() if k in CONNECTOR_ARGUMENT_KEYS}
        how["_timeout"] = how.get("_timeout") or TIMEOUT
        try:
            went_well, output = self._host.run_shell_command(asked.command(**arguments), **how)
        except TimeoutError:
            line = f"no answer within {how['_timeout']} s; look at the host, then ask again"
            raise FleetError(f"{self.name}: {line}") from None
        except (OSError, EOFError, SSHException) as error:
            what = advice.one_line(str(error)) or type(error).__name__
            line = f"the connection broke: {what}; ask again when the host answers"
            raise FleetError(f"{self.name}: {line}") from None
        if not went_well:
            said = advice.operation(output.stderr_lines or output.stdout_lines)
            why = said.removesuffix(f"; {advice.SEE_LOG}")
            raise FleetError(f"{self.name}: cannot look at {fact.__name__}: {why}")
        try:
            return asked.process(output.stdout_lines) if output.stdout_lines else asked.default()
        except (FactProcessError, LookupError, ValueError, TypeError) as error:
            what = f"{fact.__name__} makes no sense: {advice.one_line(str(error))}"
            line = f"what it says of {what}; look whether its shell prints something of its own"
            raise FleetError(f"{self.name}: {line}") from error


def ask(
    path: Path,
    question: Callable[[Asker], _T],
    limit: Sequence[str] = (),
    told: Callable[[int, int], None] = lambda done, of: None,
) -> list[Asked[_T]]:
    """What every host answers to the question, in the inventory's order.

    A host that cannot be asked does not keep the others from answering. `told` is called with how
    many hosts are done, and of how many. Raises UsageError for an invalid inventory or limit.
    """
    state = inventory.load(path, inventory.split(limit))
    from pyinfra.api.exceptions import PyinfraError
    from pyinfra.context import ctx_host

    hosts = inventory.hosts(state)
    done = 0

    def one(host: Host) -> Asked[_T]:
        goal, problems = inventory.check_host(host)
        if problems:
            return Asked(host.name, None, "; ".join(problems))
        try:
            host.connect(show_errors=False, raise_exceptions=True)
        except PyinfraError as error:
            reason = advice.connection(str(error), goal)
            return Asked(host.name, None, f"{host.name}: cannot connect as {goal}: {reason}")
        settings = parse(host.data.dict(), host.name)
        try:
            with ctx_host.use(host):
                return Asked(host.name, question(Asker(state, host, goal, settings)))
        except FleetError as error:
            return Asked(host.name, None, str(error))
        finally:
            host.disconnect()

    def counted(host: Host) -> Asked[_T]:
        nonlocal done
        try:
            return one(host)
        finally:
            done += 1
            told(done, len(hosts))

    jobs = [state.pool.spawn(counted, host) for host in hosts]
    return [job.get() for job in jobs]


@dataclass(frozen=True)
class Pictures:
    """What forecast and doctor judge a host by."""

    kernels: KernelPicture
    gpus: GpuPicture
    upgrade: Upgrade
    allowed: frozenset[Flavour]


def pictures(host: Asker) -> Pictures:
    """Look at a host's kernels, GPUs and next upgrade: three commands."""
    from gpufleet import catalog
    from gpufleet.driver.facts import GpuFacts
    from gpufleet.driver.plan import allowed
    from gpufleet.kernel.facts import KernelFacts
    from gpufleet.upgrade.facts import NextUpgrade

    gpus = host.fact(GpuFacts)
    return Pictures(
        host.fact(KernelFacts),
        gpus,
        host.fact(NextUpgrade),
        allowed(gpus, catalog.drivers()),
    )


def foretell(
    path: Path,
    limit: Sequence[str] = (),
    told: Callable[[int, int], None] = lambda done, of: None,
) -> list[Asked[Forecast]]:
    """The forecast of every host. Raises UsageError for an invalid inventory or limit."""
    from gpufleet.driver.forecast import forecast

    def one(host: Asker) -> Forecast:
        seen = pictures(host)
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

    def one(host: Asker) -> tuple[Finding, ...]:
        seen = pictures(host)
        sources = _mirror_files(host)
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


@dataclass(frozen=True)
class Probed:
    """What a host found of the sites it was asked about, and how much that took."""

    found: tuple[Found, ...]
    bytes: int
    seconds: float
    note: str


def probe_mirrors(
    path: Path,
    limit: Sequence[str] = (),
    told: Callable[[int, int], None] = lambda done, of: None,
    *,
    services: Sequence[Service] = (),
    sites: Sequence[str] = (),
) -> list[Asked[Probed]]:
    """Have every host probe the mirror sites that `auto` may choose, and remember what it found.

    Nothing else is changed. `services` and `sites` limit it. Raises UsageError for an invalid
    inventory or limit; a host whose settings do not know a site says so.
    """
    from gpufleet import catalog
    from gpufleet.mirrors import choice, probe
    from gpufleet.mirrors.facts import MirrorProbe

    wanted = list(services) or list(catalog.SERVICES)

    def one(host: Asker) -> Probed:
        settings, catalogue = host.settings, catalog.mirrors()
        choice.check(settings.mirrors, catalogue)
        known = choice.sites(settings.mirrors, catalogue)
        for name in sites:
            if name not in known:
                line = f"--site {name}: no such site; use one of {', '.join(sorted(known))}"
                raise UsageError(f"{host.name}: {line}")
        about = probe.about(settings, catalog.drivers(), _mirror_files(host))
        plan = probe.plan(
            choice.candidates(settings.mirrors, catalogue),
            about,
            services=wanted,
            only=sites,
            name=host.name,
            hosts=host.fleet,
        )
        asked = {
            (s["site"], s["via"], of) for s in json.loads(plan)["sites"] for of in s["services"]
        }
        if not asked:
            which = "the named sites are" if sites else "every site is"
            line = f"nothing to probe: {which} excluded or without these services for this host"
            raise FleetError(f"{host.name}: {line}")
        kept = host.fact(MirrorProbe, plan=plan)
        found = tuple(row for row in kept.found if (row.site, row.via, row.service) in asked)
        if not found:
            raise FleetError(f"{host.name}: the probe gave no answer; does the host have python3?")
        return Probed(found, kept.bytes, kept.seconds, kept.note)

    return ask(path, one, limit, told)


@dataclass(frozen=True)
class Chosen:
    """The sites that a host's settings and memory choose, and those that are in force there."""

    choice: Choice
    found: tuple[Found, ...]
    """What the host remembers of its probes."""
    due: tuple[Service, ...]
    """Services that the next apply probes first."""
    written: tuple[str, ...]
    """Files of mirror configuration that gpufleet has written there."""
    in_force: Mapping[str, Site]
    """Of a choice by measurement: the sites that the last apply put in force, by service."""


def show_mirrors(
    path: Path,
    limit: Sequence[str] = (),
    told: Callable[[int, int], None] = lambda done, of: None,
) -> list[Asked[Chosen]]:
    """Which site every host gets each kind of package from, and why; nothing is probed.

    Raises UsageError for an invalid inventory or limit.
    """
    from gpufleet import catalog
    from gpufleet.mirrors import probe
    from gpufleet.mirrors.plan import held

    def one(host: Asker) -> Chosen:
        sources = _mirror_files(host)
        about = probe.about(host.settings, catalog.drivers(), sources)
        settings, catalogue = host.settings.mirrors, catalog.mirrors()
        return Chosen(
            probe.choose(settings, catalogue, about),
            probe.read(sources.cache).found,
            probe.missing(settings, catalogue, about),
            sources.written,
            held(sources.record),
        )

    return ask(path, one, limit, told)


def _mirror_files(host: Asker) -> AptSources:
    from gpufleet.mirrors.facts import MirrorFiles

    return host.fact(MirrorFiles, root=str(host.settings.root), user=host.settings.user)


def _apply(path: Path, host: Asker) -> str:
    """The command that applies to one host."""
    return f"./fleet apply -i {path} --limit {host.name}"
