"""The errors a person can meet: one line each, saying what, where and what to do."""

from __future__ import annotations


class FleetError(Exception):
    """Something failed. The message is one line: what, where (host, file, field), what to do."""

    exit_code = 1


class UsageError(FleetError):
    """The command line, a setting or an inventory is invalid; nothing was changed."""

    exit_code = 2
