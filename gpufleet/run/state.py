"""Where runs leave their logs and locks on this machine."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO

from gpufleet import ROOT
from gpufleet.errors import FleetError

#: How many logs are kept, all commands together.
KEEP = 20


def folder() -> Path:
    """The folder for logs and locks: .fleet in the checkout, or the user's own if that cannot be
    written."""
    own = ROOT / ".fleet"
    with suppress(OSError):
        own.mkdir(exist_ok=True)
        if os.access(own, os.W_OK | os.X_OK):
            return own
    from platformdirs import user_state_path

    other = user_state_path("gpufleet")
    try:
        other.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FleetError(
            f"cannot write logs to {own} or {other}: {error.strerror}; make one writable"
        ) from None
    return other


def open_log(command: str, inventory: str) -> tuple[Path, IO[str]]:
    """A new log file, readable by its owner only; the oldest beyond KEEP are removed."""
    logs = folder() / "logs"
    logs.mkdir(exist_ok=True)
    prune(logs, KEEP - 1)
    name = f"{command}-{inventory}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in count(1):
        path = logs / f"{name}{f'-{number}' * (number > 1)}.log"
        with suppress(FileExistsError):  # another run began in the same second
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
            return path, os.fdopen(descriptor, "a", buffering=1, encoding="utf-8")
    raise AssertionError


def prune(logs: Path, keep: int) -> None:
    """Remove all but the newest `keep` logs of a folder."""
    with suppress(FileNotFoundError):  # another run prunes at the same time
        newest_first = sorted(logs.glob("*.log"), key=lambda log: -log.stat().st_mtime)
        for old in newest_first[keep:]:
            old.unlink()


@contextmanager
def lock(what: str, name: str) -> Iterator[int]:
    """Hold the only lock on `what` (an inventory's full path) on this machine.

    Yields its file descriptor: a child that inherits it holds the lock until it ends too.
    Raises FleetError if another run holds it; `name` is what the message calls it.
    """
    locks = folder() / "locks"
    locks.mkdir(exist_ok=True)
    path = locks / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.lock"
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another run"
            raise FleetError(
                f"{name}: {holder} is applying it; wait for that to end, then apply again"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} (since {time.strftime('%H:%M:%S')})")
        file.flush()
        yield file.fileno()
