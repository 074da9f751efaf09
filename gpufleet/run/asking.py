"""Asks every host of an inventory at once: one connection a host, one command a fact, nothing
changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from gpufleet.errors import FleetError
from gpufleet.run import advice, inventory
from gpufleet.run.targets import Target
from gpufleet.settings import Settings, parse

if TYPE_CHECKING:
    from pyinfra.api import FactBase, State
    from pyinfra.api.host import Host

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
