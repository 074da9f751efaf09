"""Writes a conversation the way MiniGPT-4 was trained to read it, and cleans what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..engine import BadRequest, Turn

SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I "
    "provide it to you. Please answer my questions."
)
SEPARATOR = "###"
HUMAN, ASSISTANT = "Human", "Assistant"
BEFORE_IMAGE, AFTER_IMAGE = "<Img>", "</Img>"


@dataclass(frozen=True)
class Segment:
    """Words between two pictures; those from `start` to `end` are of earlier turns."""

    text: str
    start: int
    end: int


def segments(turns: Sequence[Turn]) -> list[Segment]:
    """The words up to the answer that is to come, parted where the pictures go.

    Upstream's text to the letter. Its mark for a picture is in no segment, so one that a user
    types stays text. An earlier turn may be empty: a model can answer nothing, and be asked on.
    Raises BadRequest unless the turns alternate, start and end with the user's, and the last has
    a question.
    """
    expected = ["user", "assistant"] * (len(turns) // 2) + ["user"]
    if [t.role for t in turns] != expected:
        raise BadRequest(
            "messages: roles must alternate user, assistant, …, user; "
            f"got {', '.join(t.role for t in turns) or 'none'}"
        )
    if not turns[-1].text.strip():
        raise BadRequest("messages: the last one has no text; write a question")
    done: list[Segment] = []
    text = SYSTEM + SEPARATOR
    start = end = len(text)
    for i, turn in enumerate(turns):
        text += f"{HUMAN if turn.role == 'user' else ASSISTANT}: "
        for _ in turn.images:
            done.append(Segment(text + BEFORE_IMAGE, start, end))
            text = f"{AFTER_IMAGE} "
            start = end = len(text)
        text += turn.text + SEPARATOR
        if i < len(turns) - 1:
            end = len(text)
    return [*done, Segment(f"{text}{ASSISTANT}:", start, end)]


def clean(answer: str) -> str:
    """Upstream's post-processing: up to the separator, after the last role name, stripped."""
    return answer.split(SEPARATOR)[0].split(f"{ASSISTANT}:")[-1].strip()
