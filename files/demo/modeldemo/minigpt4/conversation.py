"""Writes a conversation the way MiniGPT-4 was trained to read it, and cleans what it answers."""

from __future__ import annotations

from collections.abc import Sequence

from ..engine import BadRequest, Turn

SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I "
    "provide it to you. Please answer my questions."
)
SEPARATOR = "###"
HUMAN, ASSISTANT = "Human", "Assistant"
IMAGE = "<ImageHere>"


def prompt(turns: Sequence[Turn]) -> str:
    """The text up to the answer that is to come, with one IMAGE where the picture goes.

    Raises BadRequest unless the turns alternate, start and end with the user's and are not empty.
    """
    expected = ["user", "assistant"] * (len(turns) // 2) + ["user"]
    if [t.role for t in turns] != expected:
        raise BadRequest(
            "messages: roles must alternate user, assistant, …, user; "
            f"got {', '.join(t.role for t in turns) or 'none'}"
        )
    if any(not t.text.strip() for t in turns):
        raise BadRequest("messages: a message has no text; write a question")
    text = SYSTEM + SEPARATOR
    for i, turn in enumerate(turns):
        role = HUMAN if turn.role == "user" else ASSISTANT
        picture = f"<Img>{IMAGE}</Img> " if i == 0 else ""
        text += f"{role}: {picture}{turn.text}{SEPARATOR}"
    return f"{text}{ASSISTANT}:"


def around_image(text: str) -> tuple[str, str]:
    """What comes before and after the picture.

    Only the first IMAGE is the picture: one that a user types later stays text.
    """
    before, _, after = text.partition(IMAGE)
    return before, after


def clean(answer: str) -> str:
    """Upstream's post-processing: up to the separator, after the last role name, stripped."""
    return answer.split(SEPARATOR)[0].split(f"{ASSISTANT}:")[-1].strip()
