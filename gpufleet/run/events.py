"""What a run reports while it runs: events as JSON lines, and the picture that they add up to."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Container, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from gpufleet.run.rolling import Batch, Member
from gpufleet.run.rolling import read as read_member
from gpufleet.weights.plan import Progress

#: Environment variable that holds the file descriptor to write events to.
ENV = "GPUFLEET_EVENTS"

Kind = Literal[
    "host",  # the run will work on it; message: its target as JSON
    "refused",  # the inventory, a setting or an option is invalid; nothing was changed
    "connected",
    "unreachable",  # message: the connector's error
    "started",  # an operation
    "finished",  # an operation, without error
    "failed",  # an operation, or the host outside of one; message: its output, a line each
    "finding",  # something that keeps the host from taking the deploy
    "warning",  # something that a person should know and that stops nothing
    "pending",  # a dry run: this operation would change something
    "progress",  # weights travel to the host, or have arrived; message: a Progress as JSON
    "member",  # the run is a rolling one; message: the host's rolling.Member as JSON
]


@dataclass(frozen=True)
class Event:
    """One thing that happened. `at` is in seconds since the epoch, `seconds` a duration."""

    kind: Kind
    host: str = ""
    concern: str = ""
    operation: str = ""
    message: str = ""
    changed: bool = False
    seconds: float = 0.0
    at: float = field(default_factory=time.time)

    def line(self) -> str:
        """The event as one line of JSON."""
        return json.dumps(asdict(self)) + "\n"


def read(line: str | bytes) -> Event | None:
    """The event that a line holds, or None if it holds none."""
    try:
        fields = json.loads(line)
        event = Event(**fields)
    except (ValueError, TypeError):
        return None
    return event if event.kind in get_args(Kind) else None


def emit(kind: Kind, host: str = "", **fields: Any) -> None:
    """Report an event to the fleet command, if that is what started this run."""
    target = os.environ.get(ENV)
    if not target:
        return
    try:
        os.write(int(target), Event(kind, host, **fields).line().encode())
    except BrokenPipeError:
        # Nobody is left to read: the fleet command was killed, so stop before the next change.
        raise SystemExit(1) from None


@dataclass
class Concern:
    """What one concern did on one host. `seconds` is the host's own time, not its waits."""

    name: str
    seconds: float = 0.0
    changed: list[str] = field(default_factory=list)
    operations: int = 0
    state: Literal["running", "ok", "failed", "stopped"] = "running"

    @property
    def ended(self) -> bool:
        return self.state != "running"


HostState = Literal[
    "connecting",
    "preparing",
    "running",
    "done",
    "failed",
    "unreachable",
    "stopped",
    "untouched",  # a rolling apply has not come to it yet, or never will
]


@dataclass
class Host:
    """One host of a run, as the events so far tell."""

    name: str
    state: HostState = "connecting"
    since: float = field(default_factory=time.time)
    """When it entered this state or started this operation, in seconds since the epoch."""
    concern: str = ""
    operation: str = ""
    """The operation that runs now, empty between two."""
    concerns: dict[str, Concern] = field(default_factory=dict)
    error: Event | None = None
    findings: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """Each begins with its concern."""
    pending: list[tuple[str, str]] = field(default_factory=list)
    """Of a dry run: (concern, operation)."""
    target: dict[str, Any] = field(default_factory=dict)
    member: Member | None = None
    """Of a rolling run."""
    weights: Progress | None = None
    """How far its weights are, once that was asked for."""

    @property
    def ok(self) -> bool:
        return self.state not in ("failed", "unreachable", "stopped", "untouched")

    @property
    def changed(self) -> int:
        """How many operations changed something."""
        return sum(len(concern.changed) for concern in self.concerns.values())


@dataclass
class Picture:
    """All hosts of a run; `fold` adds an event to it."""

    hosts: dict[str, Host] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    order: list[Batch] = field(default_factory=list)
    """The batches that a rolling apply has begun."""

    def fold(self, event: Event) -> None:
        """Take one event in."""
        if event.kind == "refused":
            self.refused.append(event.message)
            return
        host = self.hosts.setdefault(event.host, Host(event.host, since=event.at))
        if event.kind == "host":
            host.target = json.loads(event.message or "{}")
        elif event.kind == "member":
            host.member = read_member(event.message)
        elif event.kind == "progress":
            host.weights = Progress(**json.loads(event.message))
        elif event.kind == "finding":
            host.findings.append(event.message)
            host.state = "failed"
        elif event.kind == "warning":
            line = f"{event.concern}: {event.message}"
            if line not in host.warnings:  # a rolling run comes to a host twice
                host.warnings.append(line)
        elif event.kind == "pending":
            host.pending.append((event.concern, event.operation))
        elif event.kind in ("connected", "unreachable"):
            # A host that reboots in an operation connects again: its operation tells how it went.
            if host.state == "connecting":
                host.state = "preparing" if event.kind == "connected" else "unreachable"
                host.since = event.at
                host.error = event if event.kind == "unreachable" else None
        else:
            self._fold_operation(host, event)

    @staticmethod
    def _fold_operation(host: Host, event: Event) -> None:
        if event.kind == "started" or event.concern:
            for other in host.concerns.values():
                if not other.ended and other.name != event.concern:
                    other.state = "ok"
            concern = host.concerns.setdefault(event.concern, Concern(event.concern))
        if event.kind == "started":
            host.concern, host.operation, host.since = event.concern, event.operation, event.at
            if host.ok:
                host.state = "running"
            return
        if event.concern:
            concern.operations += 1
            concern.seconds += event.seconds
            if event.changed:
                concern.changed.append(event.operation)
        if event.kind == "finished":
            host.operation = ""
            host.since = event.at
            return
        host.state = "failed"
        # The first failure is the cause: of a nested operation, the inner one.
        host.error = host.error or event
        if event.concern:
            concern.state = "failed"

    @property
    def members(self) -> list[Member]:
        """The hosts of a rolling run; empty if it is none."""
        return [host.member for host in self.hosts.values() if host.member]

    def wait(self) -> None:
        """A rolling apply begins: no host has its turn yet."""
        for host in self.hosts.values():
            if host.ok:
                host.state = "untouched"

    def begin(self, batch: Batch) -> None:
        """It is the turn of these hosts."""
        self.order.append(batch)
        for name in batch.hosts:
            self.hosts[name].state, self.hosts[name].since = "connecting", time.time()

    def close(self, complete: bool = True, names: Container[str] | None = None) -> None:
        """The run is over, if not `complete` before its end: end every concern and host, or
        those of the hosts named."""
        for host in self.hosts.values():
            if names is not None and host.name not in names:
                continue
            for concern in host.concerns.values():
                if not concern.ended:
                    concern.state = "ok" if complete and host.ok else "stopped"
            if host.ok:
                host.state = "done" if complete else "stopped"
            if not complete:
                host.pending.clear()  # half a plan is none

    def ended(self) -> Iterator[tuple[Host, Concern]]:
        """Every concern that has come to its end on its host."""
        for host in self.hosts.values():
            for concern in host.concerns.values():
                if concern.ended:
                    yield host, concern
