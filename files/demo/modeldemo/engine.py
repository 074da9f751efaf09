"""The protocol between the systems that answer and the servers that carry the answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Sampling:
    """How an answer is made; the defaults are those of MiniGPT-4's demo."""

    temperature: float = 1.0  # 0 means greedy
    num_beams: int = 1
    max_new_tokens: int = 300
    top_p: float = 0.9
    top_k: int = 50  # 0 means all
    repetition_penalty: float = 1.0
    seed: int | None = None
    json: bool = False  # an answer for programs, where the page's kind is labels


@dataclass(frozen=True)
class Turn:
    """One message of a conversation; pictures are the user's."""

    role: Literal["user", "assistant"]
    text: str
    images: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """What was said so far; roles alternate, the first turn and the last are the user's."""

    turns: tuple[Turn, ...]
    system: str = ""

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """All pictures, in the order in which they were sent."""
        return tuple(image for turn in self.turns for image in turn.images)


@dataclass(frozen=True)
class Piece:
    """A part of an answer: text that nothing takes back, and the tokens made since the last one."""

    text: str = ""
    new_tokens: int = 0
    prompt_tokens: int = 0  # of the whole question, in the first piece
    pictures_encoded: int = 0
    pictures_reused: int = 0  # encoded for a question before this one
    finish: Literal["stop", "length"] | None = None  # in the last piece


@dataclass(frozen=True)
class Page:
    """What the page of a system shows and the API takes."""

    kind: Literal["chat", "labels"] = "chat"
    pictures: Literal["none", "one", "several"] = "none"
    system_prompt: bool = False
    controls: tuple[str, ...] = ()
    """Fields of Sampling that a person can set, in the order shown."""


class ModelDemoError(Exception):
    """One line for a person: what is wrong, where, what to do."""


class BadRequest(ModelDemoError):
    """A request that cannot be answered because of what the caller sent."""


class OutOfMemory(ModelDemoError):
    """A request that the device had no memory for; the next one may be answered."""


class DeviceLost(ModelDemoError):
    """A device that answers nothing any more in this process; a new one may use it again."""


class Engine(Protocol):
    """A loaded system that answers one conversation at a time."""

    model_id: str
    page: Page
    defaults: Sampling
    """What a request does not say."""
    health: Conversation
    """A small question whose answer proves that the model works."""

    @classmethod
    def load(cls, settings: Any, device: str, model_id: str) -> Engine:
        """Load what `System.read` returned on `auto`, `cpu` or `cuda`; raises ModelDemoError."""
        ...

    def stream(self, conversation: Conversation, sampling: Sampling) -> Iterator[Piece]:
        """Yield the answer to the last user turn in pieces.

        Their texts, joined, are the post-processed answer. A piece without text comes for every
        step that has nothing to show, so that whoever reads can stop at any token. One call at a
        time: the server holds a lock. Closing the iterator early stops the generation promptly.
        Raises BadRequest for a conversation that cannot be answered, OutOfMemory, DeviceLost.
        """
        ...
