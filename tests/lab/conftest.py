"""What the lab tests share: one deployed lab a run, and fresh hosts for tests that need one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count

import fleets
import pytest
from fleets import Boot, Fleet, Host

from gpufleet.errors import FleetError
from gpufleet.lab import machine

_numbers = count(1)


@pytest.fixture(scope="session")
def can_boot() -> None:
    """Skips where no lab can run, with the lab's own reason."""
    try:
        machine.require_root()
    except FleetError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def deployed(pytestconfig: pytest.Config, can_boot: None) -> Fleet:
    """Two hosts that were deployed through the command line. Leave them healthy."""
    fleet = fleets.shared(pytestconfig)
    assert fleet.seen["apply"].code == 0, fleet.seen["apply"].out + fleet.seen["apply"].err
    return fleet


@pytest.fixture
def one(deployed: Fleet) -> Host:
    return deployed.hosts[0]


@pytest.fixture
def two(deployed: Fleet) -> Host:
    return deployed.hosts[1]


@pytest.fixture
def boot(can_boot: None) -> Iterator[Boot]:
    """Boot a fresh lab of one host (or as many as asked); it is taken down after the test."""
    names: list[str] = []

    def up(hosts: int = 1, *options: str) -> Fleet:
        names.append(f"t-{os.getpid()}-{next(_numbers)}")
        return fleets.boot(names[-1], hosts, *options)

    try:
        yield up
    finally:
        for name in names:
            fleets.take_down(name)
