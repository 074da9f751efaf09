"""The protocol between the systems that answer and the servers that carry the answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the defaults are those of MiniGPT-4's demo."""

    temperature: float = 1.0  # 0 means greedy
    num_beams: int = 1
    max_new_tokens: int = 300
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: Literal["user", "assistant"]
    text: str


class ModelDemoError(Exception):
    """One line for a person: what is wrong, where, what to do."""


class BadRequest(ModelDemoError):
    """A request that cannot be answered because of what the caller sent."""


class Engine(Protocol):
    """A loaded system that answers one conversation at a time."""

    model_id: str
    needs_image: bool

    def stream(
        self, image: Image.Image | None, turns: Sequence[Turn], sampling: Sampling
    ) -> Iterator[str]:
        """Yield pieces of the answer to the last user turn.

        Joined, the pieces are the post-processed answer. One call at a time: the server holds a
        lock. Closing the iterator early stops the generation promptly. Raises BadRequest for a
        conversation that cannot be answered.
        """
        ...
