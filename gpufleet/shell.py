"""Shell commands for hosts, with every value quoted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from pyinfra.api import QuoteString, StringCommand


def script(text: str, *arguments: str) -> StringCommand:
    """Run a POSIX shell script with the arguments as $1, $2, …"""
    words = [QuoteString(argument) for argument in arguments]
    return StringCommand("sh -c", QuoteString(text), "sh", *words)


def failing(message: str) -> StringCommand:
    """Fail this host's operation with one line; an exception would stop every host's."""
    return StringCommand("echo", QuoteString(message), ">&2; exit 1")


@dataclass(frozen=True)
class Hidden:
    """Text for a command's standard input (`_stdin`), which pyinfra's log never shows."""

    text: str = field(repr=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self.readlines())

    def readlines(self) -> list[str]:
        """What pyinfra writes, as of a file."""
        return self.text.splitlines(keepends=True)
