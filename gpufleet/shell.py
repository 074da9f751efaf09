"""Shell commands for hosts, with every value quoted."""

from __future__ import annotations

from pyinfra.api import QuoteString, StringCommand


def script(text: str, *arguments: str) -> StringCommand:
    """Run a POSIX shell script with the arguments as $1, $2, …"""
    words = [QuoteString(argument) for argument in arguments]
    return StringCommand("sh -c", QuoteString(text), "sh", *words)


def failing(message: str) -> StringCommand:
    """Fail this host's operation with one line; an exception would stop every host's."""
    return StringCommand("echo", QuoteString(message), ">&2; exit 1")
