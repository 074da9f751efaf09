"""Says which of several sources is asked next, and when patience with them is at its end."""

from __future__ import annotations

import random
import threading
import time

from gpufleet.weights.fetch.plan import Policy, pause
from gpufleet.weights.fetch.work import Failed, Stopped

#: Tries in vain, after which another source has its turn.
_TRIES = 3

_LUCK = random.Random()


class Turns:
    """Whose turn it is, for one file or one set's list."""

    def __init__(self, count: int, policy: Policy, stop: threading.Event) -> None:
        self._live = list(range(count))
        self._policy = policy
        self._stop = stop
        self._why: list[str] = []
        self._last = ""
        self._tries = 0
        self._since = time.monotonic()

    @property
    def left(self) -> int:
        """How many sources are left."""
        return len(self._live)

    def next(self) -> int:
        """The source to ask. Raises Failed if none is left, or patience is at its end."""
        if not self._live:
            raise Failed("; ".join(self._why))
        if self._tries and time.monotonic() - self._since > self._policy.patience:
            seconds = time.monotonic() - self._since
            waited = f"{seconds / 3600:.0f} hours" if seconds >= 7200 else f"{seconds:.0f} s"
            raise Failed(f"nothing came for {waited}: {self._last}")
        return self._live[0]

    def progress(self) -> None:
        """Something came."""
        self._tries = 0
        self._since = time.monotonic()

    def out(self, index: int, why: str) -> None:
        """A source is of no use."""
        self._live.remove(index)
        self._why.append(why)

    def rest(self, why: str, asked: float | None) -> float:
        """How many seconds to rest after a try in vain; the next source may have its turn then."""
        self._last = why
        self._tries += 1
        if self._tries % _TRIES == 0:
            self._live.append(self._live.pop(0))
        return pause(self._policy, self._tries, _LUCK.random(), asked)

    def sleep(self, seconds: float) -> None:
        """Rest. Raises Stopped."""
        if self._stop.wait(seconds):
            raise Stopped
