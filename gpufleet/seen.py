"""Remembers what a host's facts said until an operation changes the host: pyinfra asks anew each
time, which is a command over SSH."""

from __future__ import annotations

import weakref
from typing import Any, TypeVar

from pyinfra.api import FactBase
from pyinfra.api.host import Host
from pyinfra.context import ctx_host, ctx_state

_T = TypeVar("_T")

# Preparing and executing look for themselves: everything may change between the two.
_seen: weakref.WeakKeyDictionary[Host, dict[tuple[Any, ...], Any]] = weakref.WeakKeyDictionary()


def fresh(fact: type[FactBase[_T]], **arguments: Any) -> _T:
    """The fact of the host at hand, asked once until `changed` is called."""
    host: Host = ctx_host.get()
    remembered = _seen.setdefault(host, {})
    key = (ctx_state.get().is_executing, fact, *sorted(arguments.items()))
    if key not in remembered:
        remembered[key] = host.get_fact(fact, **arguments)
    value: _T = remembered[key]
    return value


def changed() -> None:
    """Forget what was seen of the host at hand: an operation is about to change it, or did."""
    _seen.pop(ctx_host.get(), None)
