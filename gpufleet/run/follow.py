"""Inside pyinfra's process: watches its state and reports every step as an event."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import re
import signal
import sys
import time
from collections import defaultdict, deque
from dataclasses import asdict
from typing import Any

import gevent
from paramiko import SSHException
from pyinfra import logger
from pyinfra.api import Host, State
from pyinfra.api.exceptions import PyinfraError
from pyinfra.api.state import BaseStateCallback
from pyinfra.connectors.util import CommandOutput
from pyinfra.context import ctx_host, ctx_state

from gpufleet.run import inventory, only, override, rolling
from gpufleet.run.events import emit
from gpufleet.run.pyinfra import BATCH_ENV, DRY_ENV, LIMIT_ENV, PARENT_ENV
from gpufleet.settings import Settings, parse
from gpufleet.shell import script

ANSI = re.compile(r"\x1b\[[0-9;]*[a-zA-Z]")

# Lines that pyinfra logged as warnings or errors about a host since its operation started. uv
# lists every hash that the lock names, a hundred for some packages, after the line that says why.
_logged: dict[str, deque[str]] = defaultdict(lambda: deque(maxlen=2000))
_started: dict[tuple[str, str], float] = {}
_failed: set[str] = set()
#: Said of a host whose connection broke; advice knows it.
_DROPPED = "Server connection dropped"
#: Settings of the hosts whose kind is to be asked: of none unless the run is a rolling one.
_to_ask: dict[str, Settings] = {}


def follow() -> None:
    """Report this run; called by pyinfra_config.py, before the inventory is loaded."""
    _die_with_parent()
    state = ctx_state.get()
    init = state.init

    def init_and_watch(*args: Any, **kwargs: Any) -> None:
        # State.init is the first moment that knows all hosts and takes callbacks, and the last
        # one before any connection.
        init(*args, **kwargs)
        if batch := _lines(BATCH_ENV):
            # By name alone: --limit would take a group of that name too.
            state.limit_hosts = [host for host in state.inventory if host.name in batch]
        state.add_callback_handler(Watcher())
        logger.addHandler(_Collector(logging.WARNING))
        _announce(state)

    state.init = init_and_watch


def _die_with_parent() -> None:
    """Have the kernel end this process when the fleet command is gone, however it ended.

    Elsewhere than on Linux the next event meets a closed pipe instead.
    """
    parent = os.environ.get(PARENT_ENV)
    if not parent or not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1  # <linux/prctl.h>
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != int(parent):  # it went before the kernel knew
        raise SystemExit(1)


def _announce(state: State) -> None:
    """Report the hosts of this run; stop it if the inventory, a setting or --limit is invalid."""
    problems = inventory.empty(state.inventory) or inventory.unmatched(
        state.inventory, _lines(LIMIT_ENV)
    )
    gone = set(_lines(BATCH_ENV)) - {host.name for host in state.inventory}
    problems += [f"{name}: the inventory has it no more; apply again" for name in sorted(gone)]
    for host in inventory.hosts(state):
        target, wrong = inventory.check_host(host)
        problems += wrong
        emit("host", host.name, message=json.dumps(asdict(target)))
    for problem in problems:
        emit("refused", message=problem)
    if problems:
        raise SystemExit(2)
    if not _lines(BATCH_ENV):
        _survey(state)


def _lines(variable: str) -> list[str]:
    """The lines of an environment variable that the fleet command has set."""
    return [line for line in os.environ.get(variable, "").split("\n") if line]


def _survey(state: State) -> None:
    """Find out whether these hosts are applied to in batches.

    If so, the kind of each is asked when it is connected, and an apply does no more this time
    than preflight: the fleet command starts it again for every batch.
    """
    chosen = {host.name: parse(host.data.dict(), host.name) for host in inventory.hosts(state)}
    if not override.read().together and rolling.in_effect(list(chosen.values())):
        _to_ask.update(chosen)
        if not os.environ.get(DRY_ENV):
            os.environ[only.ENV] = only.ALWAYS


def _ask_kind(host: Host) -> None:
    """Report a host of a rolling run."""
    settings = _to_ask.pop(host.name, None)
    if settings is None:
        return
    try:
        _, said = host.run_shell_command(script(rolling.SCRIPT), _timeout=60)
        kind = rolling.parse(said.stdout_lines)
    except (OSError, EOFError, PyinfraError, SSHException):
        # Preflight asks it next, and says what is wrong.
        kind = rolling.Kind()
    member = rolling.Member(host.name, kind, settings.rolling.canary, settings.rolling.batch)
    emit("member", host.name, message=member.dump())


class _Collector(logging.Handler):
    """Keeps what pyinfra says about each host: a failing command's output, timeouts, tracebacks."""

    def emit(self, record: logging.LogRecord) -> None:
        line = ANSI.sub("", record.getMessage()).strip()
        if match := re.match(r"\[([^\]]+)\]\s*(.*)", line, re.DOTALL):
            _logged[match[1]].append(match[2][:2000])


def _name(state: State, host: Host, op_hash: str) -> tuple[str, str]:
    """(concern, operation): pyinfra joins the names of nested @deploys with a bar."""
    names = sorted(state.get_op_meta(op_hash).names)
    # Hosts may give the same operation different names.
    own = state.get_op_data_for_host(host, op_hash).global_arguments.get("name")
    name = next((n for n in names if own and n.endswith(str(own))), names[0])
    concern, _, operation = name.partition(" | ")
    return (concern, operation) if operation else ("deploy", concern)


class Watcher(BaseStateCallback):
    """pyinfra's callbacks, turned into events."""

    @staticmethod
    def host_connect(state: State, host: Host) -> None:
        emit("connected", host.name)
        _ask_kind(host)

    @staticmethod
    def host_connect_error(state: State, host: Host, error: Exception) -> None:
        emit("unreachable", host.name, message=str(error))

    @staticmethod
    def operation_host_start(state: State, host: Host, op_hash: str) -> None:
        if op_hash in state.ops[host]:
            _logged[host.name].clear()
            _started[host.name, op_hash] = time.monotonic()
            concern, operation = _name(state, host, op_hash)
            emit("started", host.name, concern=concern, operation=operation)

    @staticmethod
    def operation_host_success(
        state: State, host: Host, op_hash: str, retry_count: int = 0
    ) -> None:
        _report_when_complete(state, host, op_hash)

    @staticmethod
    def operation_host_error(
        state: State, host: Host, op_hash: str, retry_count: int = 0, max_retries: int = 0
    ) -> None:
        _report_when_complete(state, host, op_hash)

    @staticmethod
    def host_disconnect(state: State, host: Host) -> None:
        if host in state.failed_hosts and host.name not in _failed:
            # A fact failed: no operation did.
            emit("failed", host.name, message="\n".join(_logged[host.name]))
        elif os.environ.get(DRY_ENV):
            _report_pending(state, host)


def _report_when_complete(state: State, host: Host, op_hash: str) -> None:
    # pyinfra calls back just before it notes whether the operation changed anything, and does
    # not yield in between: a new greenlet runs right after.
    gevent.spawn(_report, state, host, op_hash, time.monotonic() - _started[host.name, op_hash])


def _report(state: State, host: Host, op_hash: str, seconds: float) -> None:
    data = state.get_op_data_for_host(host, op_hash)
    concern, operation = _name(state, host, op_hash)
    fields = {"concern": concern, "operation": operation, "seconds": round(seconds, 3)}
    if data.operation_meta.did_succeed() or data.global_arguments["_ignore_errors"]:
        emit("finished", host.name, changed=data.operation_meta.did_change(), **fields)
    else:
        _failed.add(host.name)
        # A command that was cut off has said nothing of why.
        said = [_DROPPED] if _is_gone(host) else _logged[host.name]
        emit("failed", host.name, message="\n".join(said), **fields)


def _is_gone(host: Host) -> bool:
    """Whether the connection to a host broke; pyinfra takes that for a command that failed."""
    client = getattr(host.connector, "client", None)
    transport = client.get_transport() if client is not None else None
    return transport is not None and not transport.is_active()


def _report_pending(state: State, host: Host) -> None:
    """Report what a dry run found: every operation that would change this host.

    pyinfra leaves conditions (`_if`) open until an operation runs. Here each operation in turn
    counts as done, with a change if it would make one, so that conditions on earlier operations
    and on facts have their answer.
    """
    with ctx_state.use(state), ctx_host.use(host):
        for op_hash in host.op_hash_order:
            if op_hash not in state.ops[host]:
                continue
            data = state.get_op_data_for_host(host, op_hash)
            meta = data.operation_meta
            conditions: Any = data.global_arguments.get("_if") or []
            if callable(conditions):
                conditions = [conditions]
            changes = bool(meta.will_change) and all(condition() for condition in conditions)
            meta.set_complete(True, ["would run"] if changes else [], CommandOutput([]))
            if changes:
                concern, operation = _name(state, host, op_hash)
                emit("pending", host.name, concern=concern, operation=operation)
