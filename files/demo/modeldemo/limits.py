"""How much one service takes from its callers at once, and how long it waits for them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits that a service may set; images.py has those of pictures, questions.py of requests."""

    waiting: int = 8
    """Questions behind the one that is being answered."""
    seconds: float = 300
    """From a question's arrival to the end of its answer."""
    connections: int = 512
    """Half of the files that a service may have open by default."""
    header_seconds: float = 10
    """For a request's line and header."""
    idle_seconds: float = 20
    """Without a byte of a body that was announced."""
    body_seconds: float = 300
    """For all of a body: 20 MiB from a phone."""
    unread_seconds: float = 30
    """In which a client takes nothing of its answer: then it is gone."""
