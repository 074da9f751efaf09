"""Turns conversations into StarChat's prompt, and new tokens into text, by tokenizer.json."""

from __future__ import annotations

import codecs
import json
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer as Model
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..engine import Conversation, ModelDemoError

SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
DOCUMENT_END = "<|endoftext|>"


class Tokenizer:
    """StarChat's byte-level vocabulary; no text can become one of its special tokens."""

    def __init__(self, file: Path) -> None:
        try:
            parts = json.loads(file.read_text(encoding="utf-8"))
            special = {token["content"]: int(token["id"]) for token in parts["added_tokens"]}
            # Without them the model has no way to find one in what a user typed.
            self._model = Model.from_str(json.dumps(parts | {"added_tokens": []}))
        except Exception as error:
            # The library raises a plain Exception.
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise ModelDemoError(
                f"{file}: not a tokenizer ({reason}); fetch the file again"
            ) from error
        absent = [t for t in (SYSTEM, USER, ASSISTANT, END, DOCUMENT_END) if t not in special]
        if absent:
            raise ModelDemoError(
                f"{file}: has no token {absent[0]}; it is not StarChat's, fetch it from the "
                "model's own repository"
            )
        self._special = special
        self.ends = frozenset(special[t] for t in (SYSTEM, USER, ASSISTANT, END, DOCUMENT_END))
        """The tokens that end an answer: its own, and those by which another turn begins."""
        self.size: int = 1 + max(*special.values(), *self._model.get_vocab().values())
        alphabet: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
        bytes_of = {character: byte for byte, character in alphabet.items()}
        known = {i: t for t, i in self._model.get_vocab().items() if t not in special}
        try:
            self._bytes = {i: bytes(bytes_of[c] for c in t) for i, t in known.items()}
        except KeyError:
            raise ModelDemoError(
                f"{file}: its vocabulary is not byte-level; it is not StarChat's, fetch it from "
                "the model's own repository"
            ) from None

    def encode(self, text: str) -> list[int]:
        """The ids of a text that stands between two special tokens."""
        ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        return ids

    def prompt(self, conversation: Conversation) -> list[int]:
        """`<|system|>\\n…<|end|>\\n<|user|>\\n…<|end|>\\n<|assistant|>`, a pair for every turn."""
        return self.joined(self.parts(conversation))

    def parts(self, conversation: Conversation) -> list[list[int]]:
        """The ids of the system prompt, and those of each turn."""
        roles = (USER if turn.role == "user" else ASSISTANT for turn in conversation.turns)
        said = (self._said(role, t.text) for role, t in zip(roles, conversation.turns, strict=True))
        return [self._said(SYSTEM, conversation.system), *said]

    def joined(self, parts: list[list[int]]) -> list[int]:
        """The prompt that the parts make: the assistant's turn is open."""
        return [*chain.from_iterable(parts), self._special[ASSISTANT]]

    def _said(self, role: str, text: str) -> list[int]:
        special = self._special
        return [special[role], *self.encode(f"\n{text}"), special[END], *self.encode("\n")]

    def spell(self, token: int) -> bytes:
        """What a token adds to the text: nothing for special tokens and unused ids."""
        return self._bytes.get(token, b"")


class Text:
    """Grows by tokens; gives out whole characters only, and no line breaks at the beginning.

    A character that the answer's end cuts is not given out.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._begun = False

    def add(self, token: int) -> str:
        """The text that is certain now and was not given out before; often empty."""
        text = self._decode(self._tokenizer.spell(token))
        if not self._begun:
            text = text.lstrip("\n")
            self._begun = bool(text)
        return text
