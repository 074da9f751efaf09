"""What all tests share: markers, what runs side by side, and when pyinfra may patch a process."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

#: Folder -> the marker of its tests: these boot real hosts, those drive a browser on one.
MARKERS = {"lab": "lab", "vm": "lab", "browser": "browser"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Where tests run side by side, a file stays in one process, and so do all files that look at
    # the one deployed lab.
    shared = {item.path for item in items if "deployed" in getattr(item, "fixturenames", ())}
    for item in items:
        if marker := MARKERS.get(item.path.parent.name):
            item.add_marker(marker)
        group = "deployed" if item.path in shared else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    if items and items[0].config.getoption("numprocesses", None):
        # The longest first, so that the processes end together.
        items.sort(key=lambda item: (item.path not in shared, "lab" not in item.keywords))


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
