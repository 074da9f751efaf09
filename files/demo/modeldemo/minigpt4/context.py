"""Lays out what a LLaMA reads: the tokens of a conversation with its pictures in their places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..engine import BadRequest
from .conversation import Segment
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Picture:
    """A picture's place in the context; `number` tells the pictures of a process apart."""

    number: int
    width: int

    @property
    def marks(self) -> list[int]:
        """What the decoder knows its positions by; no token and no other picture has them."""
        first = 2 + self.number * self.width
        return [-(first + i) for i in range(self.width)]


Part = list[int] | Picture


def layout(
    segments: Sequence[Segment], pictures: Sequence[Picture], tokenizer: Tokenizer, room: int
) -> list[Part]:
    """Ids and pictures in turn, one BOS first, together at most `room` positions long.

    A conversation that is too long loses the beginning of its history, as upstream's does. Unlike
    upstream, it never loses its system prompt, a picture or the question: raises BadRequest where
    those alone are too long.
    """
    texts = [_Text.of(segment, tokenizer) for segment in segments]
    taken = 1 + sum(len(text.ids) for text in texts) + sum(picture.width for picture in pictures)
    excess = taken - room
    for text in texts:
        if excess > 0:
            excess -= text.cut(excess)
    if excess > 0:
        raise BadRequest(
            f"messages: the question and the pictures take {room + excess} tokens, {room} are "
            "left beside max_tokens; shorten the question, send fewer pictures or lower max_tokens"
        )
    parts: list[Part] = [[tokenizer.bos, *texts[0].ids]]
    for picture, text in zip(pictures, texts[1:], strict=True):
        parts += [picture, text.ids]
    return parts


@dataclass
class _Text:
    ids: list[int]
    start: int  # of the ids that may go
    end: int

    @classmethod
    def of(cls, segment: Segment, tokenizer: Tokenizer) -> _Text:
        ids = tokenizer.encode(segment.text)
        if segment.start == segment.end:
            return cls(ids, 0, 0)
        # Tokens do not care where a turn ends: one that straddles it goes or stays as it falls.
        ends = (len(tokenizer.encode(segment.text[:at])) for at in (segment.start, segment.end))
        return cls(ids, *ends)

    def cut(self, excess: int) -> int:
        """Take away as many of the ids as may go and have to; returns how many."""
        count = min(excess, self.end - self.start)
        del self.ids[self.start : self.start + count]
        return count
