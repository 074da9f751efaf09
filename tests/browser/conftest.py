"""The browser tests look at the lab that the lab tests deploy, or at one of their own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lab"))

import fleets
from fleets import Fleet

from gpufleet.errors import FleetError
from gpufleet.lab import machine


@pytest.fixture(scope="session")
def deployed(pytestconfig: pytest.Config) -> Fleet:
    """A lab whose first host serves the demo."""
    try:
        machine.require_root()
    except FleetError as error:
        pytest.skip(str(error))
    fleet = fleets.shared(pytestconfig, hosts=1)
    fleets.ok(fleet.apply("--limit", fleet.hosts[0].name))
    return fleet
