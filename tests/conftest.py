"""What all tests share: markers, what runs side by side, and when pyinfra may patch a process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

#: Folder -> the marker of its tests: these boot real hosts, those drive a browser on one.
MARKERS = {"lab": "lab", "vm": "lab", "browser": "browser"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if marker := MARKERS.get(item.path.parent.name):
            item.add_marker(marker)


class ByFile(LoadScopeScheduling):
    """Where tests run side by side, a file stays in one process, and so do all files that look at
    the one deployed lab."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "deployed" if _deployed(file) else file


@cache
def _deployed(file: str) -> bool:
    return "deployed: Fleet" in (Path(__file__).parents[1] / file).read_text("utf-8")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    return ByFile(config, log)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """`fleet test` runs pytest several times; who reads only the end learns what failed before."""
    if said := os.environ.get("GPUFLEET_FAILED_BEFORE"):
        terminalreporter.section("failed before this", red=True)
        terminalreporter.write_line(said)


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
