"""What a test process keeps to: pyinfra patches it at its start or never."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


def _patched() -> bool:
    """Whether gevent has replaced threads, locks and subprocesses of this process."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.saved)


@pytest.fixture(autouse=True, scope="module")
def not_patched_half_way() -> Iterator[None]:
    """What began with real threads hangs when they are replaced under it, in some later test."""
    before = _patched()
    yield
    assert _patched() == before, "this patched the process for all tests after it: tests/operations"
