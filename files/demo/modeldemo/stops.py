"""Ends a text that comes in pieces before the first of some strings."""

from __future__ import annotations

from collections.abc import Sequence


class Stops:
    """Holds back only what may yet become one of the strings."""

    def __init__(self, strings: Sequence[str] = ()) -> None:
        self._strings = [string for string in strings if string]
        self._held = ""
        self.met = False
        """Whether one of the strings has come; what follows it is not wanted."""

    def add(self, text: str) -> str:
        """The text that is certain now."""
        self._held += text
        found = [at for s in self._strings if (at := self._held.find(s)) >= 0]
        if found:
            self.met = True
            certain, self._held = self._held[: min(found)], ""
            return certain
        keep = max((_beginning(self._held, string) for string in self._strings), default=0)
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(certain) :]
        return certain

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        rest, self._held = self._held, ""
        return rest


def _beginning(text: str, string: str) -> int:
    """How many characters at the end of the text are the beginning of the string."""
    for length in range(min(len(string) - 1, len(text)), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0
