"""One command at a time: a lock on a directory, which needs no file of its own."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpufleet.lab.machine import Progress, say_nothing


@contextmanager
def locked(directory: Path, progress: Progress = say_nothing) -> Iterator[None]:
    """Hold `directory`, made when absent, against every other process; waits its turn."""
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            held = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress(f"waiting for another command that holds {directory}", None)
                fcntl.flock(held, fcntl.LOCK_EX)
            # Whoever held it before may have removed it: then this is a lock on nothing.
            if _is(directory, held):
                yield
                return
        finally:
            os.close(held)


def _is(directory: Path, held: int) -> bool:
    try:
        return os.path.samestat(os.fstat(held), directory.stat())
    except FileNotFoundError:
        return False
