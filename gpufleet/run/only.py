"""Which concerns a run takes in: all, or those that `fleet apply --only` names."""

from __future__ import annotations

import os
from collections.abc import Iterable

from gpufleet import ROOT
from gpufleet.errors import UsageError

#: Environment variable that holds the names, joined by commas; unset or empty means all.
ENV = "GPUFLEET_ONLY"

#: Runs whatever was selected: nothing may change on a host that cannot take the deploy.
ALWAYS = "preflight"


def concerns() -> list[str]:
    """The names of all concerns: the modules of tasks/, one @deploy each."""
    return sorted(path.stem for path in (ROOT / "tasks").glob("[!_]*.py"))


def check(names: Iterable[str]) -> tuple[str, ...]:
    """Split at commas and return concerns' names. Raises UsageError for a name that is none."""
    chosen = tuple(part for name in names for part in name.split(",") if part)
    known = concerns()
    for name in chosen:
        if name not in known:
            raise UsageError(f"--only {name}: no such concern; use one of {', '.join(known)}")
    return chosen


def alone(concern: str) -> bool:
    """Whether this run takes in no other concern (and preflight)."""
    names = os.environ.get(ENV, "")
    return {name for name in names.split(",") if name} - {ALWAYS} == {concern}


def selected(concern: str) -> bool:
    """Whether deploy.py shall run this concern."""
    names = os.environ.get(ENV, "")
    return not names or concern == ALWAYS or concern in names.split(",")
