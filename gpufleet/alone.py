"""Lets one process at a time do something that several may want to do at once."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the file's lock; waits for whoever has it, in this process or another."""
    with path.open("w") as flock:
        while True:  # never blocks in flock(2): under gevent that would stop every host
            try:
                fcntl.flock(flock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.2)
        yield
