"""Forwards a host's demo to a port of this machine with ssh -L."""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from gpufleet.errors import FleetError, UsageError
from gpufleet.run.advice import one_line
from gpufleet.run.targets import Target

#: How long ssh may take to log in, in seconds.
PATIENCE = 30


def command(goal: Target, local: int, *options: str) -> list[str]:
    """The ssh command that listens on 127.0.0.1:local for the host's demo."""
    failing = ("-o", "ExitOnForwardFailure=yes", "-o", "ServerAliveInterval=15")
    return goal.ssh("-L", goal.forward(local), *failing, *options)


def require_free(port: int) -> None:
    """Raise UsageError if something listens on 127.0.0.1:port, or it may not be opened."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    except OSError as error:
        raise UsageError(
            f"port {port} of this machine: {error.strerror}; choose another with --local"
        ) from None


def free_port() -> int:
    """A port of 127.0.0.1 that nothing uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def forwarded(goal: Target) -> Iterator[str]:
    """The address of the host's demo on this machine, as long as the context lasts.

    Raises FleetError if ssh cannot log in within PATIENCE seconds.
    """
    local = free_port()
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(
            # cat ends when its input does, which is when this process does, however it ends.
            [*command(goal, local, "-o", "BatchMode=yes"), "cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
        try:
            deadline = time.monotonic() + PATIENCE
            while not _listens(local):
                if child.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    words = one_line(said.read()) or "ssh gave no answer in time"
                    raise FleetError(f"{goal.name}: cannot reach the demo as {goal}: {words}")
                time.sleep(0.05)
            yield f"http://127.0.0.1:{local}"
        finally:
            child.terminate()
            child.communicate()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
