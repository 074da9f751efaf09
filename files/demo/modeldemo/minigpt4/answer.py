"""Turns the ids that a model writes into pieces of a cleaned answer, as they come."""

from __future__ import annotations

from collections.abc import Iterable

from .conversation import ASSISTANT, SEPARATOR
from .tokenizer import Tokenizer

_ROLE = f"{ASSISTANT}:"


class Answer:
    """Grows by ids; gives out text only once nothing that follows can take it back.

    Joined, the pieces are `conversation.clean` of the whole text. One case differs: what came
    before a role name in the middle of an answer has been given out, so it stays.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = ""
        self._start = 0

    def add(self, ids: Iterable[int]) -> str:
        """The text that is certain now and was not given out before; often empty."""
        self._ids += ids
        head, separator, _ = self._text().partition(SEPARATOR)
        if not separator:
            head = _without_beginnings(head)
        return self._give(head)

    @property
    def ended(self) -> bool:
        """Whether the separator has come, in whatever tokens."""
        return SEPARATOR in self._text()

    def finish(self) -> str:
        """What is left once no more ids come."""
        return self._give(self._text().partition(SEPARATOR)[0])

    def _text(self) -> str:
        ids = self._ids
        # Upstream's order: a leading <unk>, then a leading <s>.
        for control in (0, 1):
            if ids[:1] == [control]:
                ids = ids[1:]
        return self._tokenizer.decode(ids)

    def _give(self, head: str) -> str:
        if not self._given:
            self._start = head.rfind(_ROLE) + len(_ROLE) if _ROLE in head else 0
        visible = head[self._start :].replace(_ROLE, "").strip()
        piece = visible[len(self._given) :]
        self._given = visible
        return piece


def _without_beginnings(text: str) -> str:
    """Text without an end that may yet become a separator, a role name or a whole character."""
    text = text.rstrip("\ufffd")
    for marker in (SEPARATOR, _ROLE):
        for length in range(len(marker) - 1, 0, -1):
            if text.endswith(marker[:length]):
                return text[:-length]
    return text
