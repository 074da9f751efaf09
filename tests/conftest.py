"""What all tests share: their markers, and that pyinfra patches a process at its start or never."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

#: Folder -> the marker of its tests: these boot real hosts, those drive a browser on one.
MARKERS = {"lab": "lab", "vm": "lab", "browser": "browser"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if marker := MARKERS.get(item.path.parent.name):
            item.add_marker(marker)


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
