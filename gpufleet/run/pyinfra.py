"""Runs pyinfra's own command on an inventory, follows its events and says how it went."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal

from gpufleet import ROOT
from gpufleet.errors import UsageError
from gpufleet.run import advice, events, only, override, rolling
from gpufleet.run.events import Host, Picture
from gpufleet.run.inventory import check_file, group_data, split
from gpufleet.run.override import Override
from gpufleet.run.rolling import Batch, Member
from gpufleet.run.state import lock, open_log
from gpufleet.run.targets import Target

#: Read by gpufleet.run.follow in pyinfra's process: our process id, the --limit patterns (a line
#: each), whether it is a dry run, and the hosts of this batch (a line each; none before the first).
PARENT_ENV, LIMIT_ENV, DRY_ENV = "GPUFLEET_PARENT", "GPUFLEET_LIMIT", "GPUFLEET_DRY"
BATCH_ENV = "GPUFLEET_BATCH"

#: As a shell reports a command that Ctrl-C ended.
INTERRUPTED = 130
PENDING = 3

#: How often `watch` is called while nothing happens, in seconds.
TICK = 0.5

Watch = Callable[[Picture], None]
Command = Literal["apply", "plan", "mirrors restore", "weights push"]


@dataclass(frozen=True)
class Result:
    """How a run went. `errors` are whole lines, one a problem; they name host and concern.

    `order` are the batches that a rolling apply went in, or would go in if it is a plan; empty
    where all hosts go at once.
    """

    command: Command
    inventory: str
    hosts: tuple[Host, ...]
    errors: tuple[str, ...]
    exit_code: int
    seconds: float
    log: Path
    interrupted: bool = False
    order: tuple[Batch, ...] = ()

    @property
    def failed(self) -> list[str]:
        """Names of the hosts that failed by themselves."""
        return [host.name for host in self.hosts if host.state in ("failed", "unreachable")]

    @property
    def untouched(self) -> list[str]:
        """Names of the hosts that a rolling apply did not come to."""
        return [host.name for host in self.hosts if host.state == "untouched"]

    @property
    def changed(self) -> int:
        """How many operations changed something, all hosts together."""
        return sum(host.changed for host in self.hosts)


def apply(inventory: Path, **options: Any) -> Result:
    """Apply the deploy to the inventory's hosts. Options are those of `Run`.

    Raises UsageError for an inventory or option that is invalid, FleetError if another apply of
    this inventory runs on this machine. Hosts that fail are in the result.
    """
    return _change("apply", inventory, **options)


def restore_mirrors(inventory: Path, **options: Any) -> Result:
    """Put back the package sources that mirrors replaced. Options and errors as for apply."""
    return _change("mirrors restore", inventory, deploy=ROOT / "restore_mirrors.py", **options)


def push_weights(inventory: Path, **options: Any) -> Result:
    """Bring the model's weights to the hosts, and do nothing else. Options and errors as for
    apply; `override` says what is not as the settings have it."""
    return _change("weights push", inventory, **{**options, "only": ("weights",)})


def _change(command: Command, inventory: Path, **options: Any) -> Result:
    # One file can stand for several fleets: inventory/lab.py is the lab that GPUFLEET_LAB names.
    what = f"{inventory.resolve()} {os.environ.get('GPUFLEET_LAB', '')}"
    with lock(what, str(inventory)) as descriptor:
        return Run(command, inventory, inherit=(descriptor,), **options).run()


def plan(inventory: Path, **options: Any) -> Result:
    """Find out what apply would change, and change nothing. Options and errors as for apply."""
    return Run("plan", inventory, **options).run()


@dataclass
class Run:
    """One run of pyinfra, or where hosts are rolled over (`rolling.in_effect`): one that changes
    nothing, for preflight and every host's kind, and then one a batch.

    `limit` are names and groups of hosts, `only` names of concerns, `watch` is called with the
    picture after every event and every TICK, `output` gets pyinfra's own output too.
    `override` is what holds in place of settings.
    """

    command: Command
    inventory: Path
    limit: Sequence[str] = ()
    only: Sequence[str] = ()
    deploy: Path = ROOT / "deploy.py"
    watch: Watch = lambda picture: None
    output: IO[str] | None = None
    inherit: tuple[int, ...] = ()
    override: Override = field(default_factory=Override)
    picture: Picture = field(default_factory=Picture)
    _tail: deque[str] = field(default_factory=lambda: deque(maxlen=200))
    _interrupts: int = 0
    _child: subprocess.Popen[bytes] | None = None

    def run(self) -> Result:
        check_file(self.inventory)
        only.check(self.only)
        started = time.monotonic()
        path, log = open_log(self.command.replace(" ", "-"), self.inventory.stem)
        with log, _OnInterrupt(self):
            ended = self._start(log)
            members = self.picture.members
            if self.command != "plan" and members and ended.whole:
                ended = self._roll(members, ended, log)
            else:
                self.picture.close(complete=ended.whole)
        self.watch(self.picture)
        errors, exit_code = self._judge(ended)
        order = self.picture.order
        if self.command == "plan" and ended.whole:
            order = rolling.batches(members)
        return Result(
            command=self.command,
            inventory=str(self.inventory),
            hosts=tuple(self.picture.hosts.values()),
            errors=tuple(errors),
            exit_code=exit_code,
            seconds=time.monotonic() - started,
            log=path,
            interrupted=self._interrupts > 0,
            order=tuple(order),
        )

    def _start(self, log: IO[str], batch: Sequence[str] = ()) -> _Ended:
        """Run pyinfra on all hosts or on those of the batch, to its end."""
        self._tail.clear()
        code = self._follow(self._arguments(), self._environment(batch), log)
        aborted = advice.abort(list(self._tail)) if code else None
        whole = code in (0, 1) and aborted is None and not self._interrupts
        return _Ended(code, aborted, whole)

    def _roll(self, members: Sequence[Member], ended: _Ended, log: IO[str]) -> _Ended:
        """Apply batch after batch, until one fails or is stopped; returns how the last ended."""
        hosts = self.picture.hosts
        self.picture.wait()
        while not self._interrupts and (
            batch := rolling.following(members, {host.name: host.state for host in hosts.values()})
        ):
            log.write(f"# {batch}\n")
            self.picture.begin(batch)
            ended = self._start(log, batch.hosts)
            self.picture.close(ended.whole, batch.hosts)
            if ended.code and all(hosts[name].ok for name in batch.hosts):
                break  # it does not say what failed
        return ended

    def _arguments(self) -> list[str]:
        config = Path(__file__).with_name("pyinfra_config.py")
        inventory = self.inventory.resolve()
        arguments = [sys.executable, "-m", "pyinfra", "-v", "--config", str(config)]
        # A dry run as JSON asks no questions; -y alone would skip the search for changes.
        arguments += ["-y"] if self.command != "plan" else ["--dry", "--json"]
        for name in split(self.limit):
            arguments += ["--limit", name]
        for folder in group_data(inventory):
            arguments += ["--group-data", str(folder)]
        return [*arguments, str(inventory), str(self.deploy.resolve())]

    def _environment(self, batch: Sequence[str]) -> Mapping[str, str]:
        return {
            **os.environ,
            only.ENV: ",".join(only.check(self.only)),
            PARENT_ENV: str(os.getpid()),
            LIMIT_ENV: "\n".join(split(self.limit)),
            BATCH_ENV: "\n".join(batch),
            override.ENV: self.override.dump(),
            DRY_ENV: "1" if self.command == "plan" else "",
            "PYINFRA_PROGRESS": "off",
            "PYTHONUNBUFFERED": "1",
        }

    def _follow(
        self, arguments: Sequence[str], environment: Mapping[str, str], log: IO[str]
    ) -> int:
        """Run the command to its end; returns its exit status as subprocess does."""
        log.write(f"# {' '.join(arguments)}\n")
        incoming, outgoing = os.pipe()
        child = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env={**environment, events.ENV: str(outgoing)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(outgoing, *self.inherit),
            # Its own session: Ctrl-C comes through us, once, and no question reaches the terminal.
            start_new_session=True,
        )
        os.close(outgoing)
        self._child = child
        if self._interrupts:  # it came while the child was started
            child.send_signal(signal.SIGINT)
        assert child.stdout is not None
        with selectors.DefaultSelector() as selector:
            readers = {
                incoming: _Lines(self._take_event),
                child.stdout.fileno(): _Lines(lambda line: self._take_output(line, log)),
            }
            for descriptor in readers:
                selector.register(descriptor, selectors.EVENT_READ)
            while selector.get_map():
                ready = selector.select(TICK)
                for key, _ in ready:
                    data = os.read(key.fd, 65536)
                    readers[key.fd].feed(data)
                    if not data:
                        selector.unregister(key.fd)
                self.watch(self.picture)
                # A process that pyinfra left behind may hold the pipes open.
                if not ready and child.poll() is not None:
                    break
            os.close(incoming)
            child.stdout.close()
            return child.wait()

    def _take_event(self, line: str) -> None:
        event = events.read(line)
        # What breaks once we have asked it to stop was stopped: it did not fail.
        if event and not (self._interrupts and event.kind in ("failed", "unreachable")):
            self.picture.fold(event)

    def _take_output(self, line: str, log: IO[str]) -> None:
        self._tail.append(line)
        log.write(line + "\n")
        if self.output is not None:
            self.output.write(line + "\n")
            self.output.flush()

    def _judge(self, ended: _Ended) -> tuple[list[str], int]:
        """The run's errors, one line each, and the fleet command's exit code."""
        code, aborted = ended.code, ended.aborted
        hosts = self.picture.hosts.values()
        if self.picture.refused and not self.picture.order:
            return self.picture.refused, UsageError.exit_code
        if self._interrupts:
            lines = [line for host in hosts for line in problems(host) or _stopped(host)]
            return lines + self._not_begun(), INTERRUPTED
        errors = [line for host in hosts for line in problems(host)]
        # Somebody edited the inventory between two batches: some hosts were changed all the same.
        errors += self.picture.refused
        if aborted and not any(host.findings for host in hosts):
            errors.append(_plain(aborted.message))
        if code and not hosts:
            errors = errors or ["pyinfra could not load the inventory; see the log"]
            return errors, UsageError.exit_code
        if code < 0:
            errors.append(f"pyinfra was ended by signal {-code}; apply again")
        if code and not errors:
            errors.append("pyinfra failed without saying why; see the log")
        errors += self._not_begun()
        if errors:
            invalid = aborted is not None and aborted.invalid
            return errors, UsageError.exit_code if invalid else 1
        pending = any(host.pending for host in hosts)
        return [], PENDING if pending else 0

    def _not_begun(self) -> list[str]:
        """A line for the hosts that a rolling apply did not come to, if there are any."""
        hosts = self.picture.hosts
        rest = [host.name for host in hosts.values() if host.state == "untouched"]
        last = self.picture.order[-1] if self.picture.order else Batch(tuple(hosts))
        failed = {name: _where(hosts[name]) for name in last.hosts if hosts[name].state == "failed"}
        return [rolling.stopped(failed, last, rest)] if rest else []


@dataclass(frozen=True)
class _Ended:
    """How pyinfra ended: its exit status, why it broke off if it says so, and whether it has come
    to the end of the deploy on every host that did not fail."""

    code: int
    aborted: advice.Abort | None
    whole: bool


class _OnInterrupt:
    """Ctrl-C asks pyinfra to stop, and no other batch begins; a second one kills it."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __enter__(self) -> None:
        self.before = signal.signal(signal.SIGINT, self.handle)

    def __exit__(self, *exc: object) -> None:
        signal.signal(signal.SIGINT, self.before)

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.run._interrupts += 1
        first = self.run._interrupts == 1
        if first:
            print("stopping; Ctrl-C again ends it at once", file=sys.stderr)
        child = self.run._child
        if child is not None and child.poll() is None:
            os.killpg(child.pid, signal.SIGINT if first else signal.SIGKILL)


class _Lines:
    """Cuts a stream of bytes into lines."""

    def __init__(self, take: Callable[[str], None]) -> None:
        self.take = take
        self.rest = b""

    def feed(self, data: bytes) -> None:
        """Pass on the lines that are whole; no data at all is the end."""
        *lines, self.rest = (self.rest + data).split(b"\n")
        if not data and self.rest:
            lines, self.rest = [self.rest], b""
        for line in lines:
            self.take(line.decode(errors="replace").rstrip("\r"))


def problems(host: Host) -> list[str]:
    """Why a host failed, one line each; empty if it did not."""
    if host.findings:
        return [f"{host.name}: preflight: {_plain(finding)}" for finding in host.findings]
    if host.error is None:
        return []
    if host.error.kind == "unreachable":
        target = Target(**host.target)
        reason = advice.connection(host.error.message, target)
        return [f"{host.name}: cannot connect as {target}: {reason}"]
    reason = advice.operation(host.error.message.splitlines())
    return [f"{host.name}: {_where(host)}: {reason}"]


def _where(host: Host) -> str:
    """Concern and operation in which a host failed."""
    if host.error is None:
        return "preflight"
    return ": ".join(filter(None, [host.error.concern or "facts", host.error.operation]))


def _stopped(host: Host) -> list[str]:
    """A line that says where Ctrl-C met a host, if it did."""
    if host.state != "stopped":
        return []
    if host.operation:
        seconds = time.time() - host.since
        where = f"in {host.concern}: {host.operation} (after {seconds:.0f} s)"
    else:
        where = f"after {host.concern}" if host.concern else "before any change"
    return [f"{host.name}: stopped {where}"]


def _plain(text: str) -> str:
    return advice.one_line(text, limit=1000)
