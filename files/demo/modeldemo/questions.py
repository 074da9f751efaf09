"""Reads what programs ask: the body of a chat completion, checked field by field."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from modeldemo.engine import BadRequest, Conversation, Page, Sampling, Turn
from modeldemo.images import MAX_SIDE, SIDE_OF_SEVERAL, decode_url

MAX_TEXT = 200_000  # characters of a conversation: more than any of the models can read
MAX_PICTURES = 8  # of a conversation
MAX_STOPS = 4  # as OpenAI's
# Logits divided by less overflow; there the likeliest token has all the probability anyway.
COLDEST = 1e-4
MAX_NEW_TOKENS = 32_768  # over every model's context; the models know their own

# Parameters of OpenAI's that would change the answer, with the values that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "logprobs": (False,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "modalities": (["text"],),
}


class TooLong(BadRequest):
    """A conversation that no model here can read."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _TextPart(_Strict):
    type: Literal["text"]
    text: str


class _ImageUrl(_Strict):
    url: str


class _ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: _ImageUrl


class _ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Annotated[_TextPart | _ImagePart, Field(discriminator="type")]] | None,
        BeforeValidator(lambda v: [_TextPart(type="text", text=v)] if isinstance(v, str) else v),
    ] = None

    @property
    def text(self) -> str:
        parts = self.content or []
        return "\n".join(p.text for p in parts if isinstance(p, _TextPart)).strip()

    @property
    def images(self) -> list[str]:
        return [p.image_url.url for p in self.content or [] if isinstance(p, _ImagePart)]


class _StreamOptions(_Strict):
    include_usage: bool | None = None


class _ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]


class ChatRequest(_Strict):
    """The body of POST /v1/chat/completions; unknown fields are allowed and ignored."""

    model: str
    messages: list[_ChatMessage] = Field(min_length=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    max_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    response_format: _ResponseFormat | None = None
    # Not OpenAI's: the models' own knobs.
    top_k: int | None = Field(None, ge=0, le=1000)
    num_beams: int | None = Field(None, ge=1, le=10)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)

    @property
    def stops(self) -> list[str]:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [string for string in stop if string]

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, defaults: Sampling, page: Page) -> Sampling:
        """What the request says, over what the model takes by default.

        Raises BadRequest for a form of answer that the model does not write.
        """
        form = self.response_format.type if self.response_format else "text"
        written = ["text", "json_object"] if page.kind == "labels" else ["text"]
        if form not in written:
            raise BadRequest(
                f"response_format: this model answers as {' or '.join(written)}, not as {form}; "
                "change it, or leave it out"
            )
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "max_new_tokens": self.max_completion_tokens or self.max_tokens,
            "seed": self.seed,
            "num_beams": self.num_beams,
            "repetition_penalty": self.repetition_penalty,
            "json": form == "json_object",
        }
        made = replace(defaults, **{k: v for k, v in given.items() if v is not None})
        return replace(made, temperature=0) if made.temperature < COLDEST else made


def parse(body: bytes) -> ChatRequest:
    """Validate a request's body; raises BadRequest that names the field."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        raise BadRequest(f"{where or 'body'}: {first['msg']}") from None
    for name, neutral in NEUTRAL.items():
        value = (request.model_extra or {}).get(name)
        if value is not None and value not in neutral:
            raise BadRequest(f"{name}: this server does not support it; leave it out")
    if len(request.stops) > MAX_STOPS:
        raise BadRequest(f"stop: at most {MAX_STOPS} strings")
    length = sum(len(message.text) for message in request.messages)
    if length > MAX_TEXT:
        raise TooLong(
            f"messages: {length} characters of text, the limit is {MAX_TEXT}; send less of it"
        )
    return request


def conversation(messages: list[_ChatMessage], page: Page) -> Conversation:
    """Turns that take turns: the user's first and last, neighbours of one role joined.

    A model that takes no system prompt has one of its own that it was trained with, so a system
    message goes in front of the first question; among labels it has no place. Where a model looks
    at one picture, the last counts. Raises BadRequest when there is no question to answer, and for
    pictures that images.decode_url refuses.
    """
    if messages[-1].role != "user":
        raise BadRequest("messages: the last one must be the user's")
    if not messages[-1].text:
        raise BadRequest("messages: the last one has no text; ask a question")
    pictures = _pictures(messages, page)
    instructions = [m.text for m in messages if m.role in ("system", "developer") and m.text]
    turns: list[Turn] = []
    for message, images in zip(messages, pictures, strict=True):
        if message.role == "user" or (message.role == "assistant" and turns):
            role: Literal["user", "assistant"] = message.role
            first = not turns and not page.system_prompt and page.kind == "chat"
            before = instructions if first else []
            if turns and turns[-1].role == role:
                joined = turns.pop()
                before, images = [joined.text], joined.images + images
            turns.append(Turn(role, "\n".join(t for t in (*before, message.text) if t), images))
    return Conversation(tuple(turns), "\n".join(instructions) if page.system_prompt else "")


def _pictures(messages: list[_ChatMessage], page: Page) -> list[tuple[Image.Image, ...]]:
    """The decoded pictures of each message that the model looks at."""
    for message in messages:
        if message.images and message.role != "user":
            raise BadRequest(f"messages: an {message.role} message cannot hold a picture")
    count = sum(len(message.images) for message in messages)
    if count > MAX_PICTURES:
        raise BadRequest(f"messages: {count} pictures, the limit is {MAX_PICTURES}; send fewer")
    side = MAX_SIDE
    if page.pictures == "several" and count > 1:
        side = SIDE_OF_SEVERAL
    wanted = count if page.pictures == "several" else min(count, 1)
    left = count - wanted
    found: list[tuple[Image.Image, ...]] = []
    for message in messages:
        skipped = min(left, len(message.images))
        left -= skipped
        found.append(tuple(decode_url(url, side) for url in message.images[skipped:]))
    return found
