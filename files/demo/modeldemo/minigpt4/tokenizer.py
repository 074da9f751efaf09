"""Turns text into LLaMA token ids and back, with nothing but the model's own tokenizer.model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import sentencepiece

from ..engine import ModelDemoError


class Tokenizer:
    """SentencePiece exactly as the original LLaMA tokenizer used it.

    Reading tokenizer.model directly keeps clear of what breaks around it: class names that no
    longer exist, empty special tokens, a missing add_bos_token. Text can never turn into a
    control token, whatever a user types.
    """

    def __init__(self, file: Path) -> None:
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise ModelDemoError(
                f"{file}: not a SentencePiece model; fetch the file again"
            ) from error
        self.bos: int = self._pieces.bos_id()
        self.eos: int = self._pieces.eos_id()
        self.size: int = self._pieces.vocab_size()

    def encode(self, text: str) -> list[int]:
        """The ids of a text on its own; SentencePiece puts its word mark in front."""
        ids: list[int] = self._pieces.encode(text)
        return ids

    def encode_after(self, before: str, text: str) -> list[int]:
        """The ids that `text` adds when it follows `before`."""
        return self.encode(before + text)[len(self.encode(before)) :]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; control ids, and ids past the vocabulary such as [PAD], have none."""
        known = [i for i in ids if i < self.size and not self._pieces.is_control(i)]
        text: str = self._pieces.decode(known)
        return text

    @cached_property
    def separators(self) -> list[list[int]]:
        """Every id sequence by which `###` can end a text, shortest forms only.

        [835] and [2277, 29937] for LLaMA's own vocabulary: alone, and after a word.
        """
        alone = self.encode("###")
        if len(alone) > 1 and self._pieces.id_to_piece(alone[0]) == "▁":
            alone = alone[1:]
        after = self.encode_after("\n", "###")
        return [alone] if alone == after[-len(alone) :] else [alone, after]
