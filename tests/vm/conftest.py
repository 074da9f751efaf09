"""The tests of this folder share one virtual machine, which a deploy brings from state to state."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lab"))

import fleets
from fleets import Fleet, Host, ok

from gpufleet import lab
from gpufleet.errors import FleetError
from gpufleet.lab import machine, qemu

#: A data centre's GPU, as far as a PCI bus shows it: NVIDIA A100.
GPU = "10de:20b5:0302"


@pytest.fixture(scope="session")
def can_emulate() -> None:
    """Skips where no virtual machine can run, with the lab's own reason."""
    try:
        machine.require_root()
        qemu.ensure_packages()
    except FleetError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def name() -> str:
    """Of the shared lab; labs of test runs that were killed are known by theirs."""
    return f"t-{os.getpid()}-0"


@pytest.fixture(scope="session")
def machines(can_emulate: None, name: str) -> Iterator[Fleet]:
    """The shared lab: one virtual machine with a GPU."""
    fleets.sweep()
    try:
        up = fleets.fleet("lab", "up", "--vm", "--pci", GPU, "--name", name, "--hosts", "1")
        ok(up)
        seen = lab.load(name)
        yield Fleet(name, [Host(seen, host.name).settled() for host in seen.hosts])
    finally:
        fleets.take_down(name)


@pytest.fixture(scope="session")
def host(machines: Fleet) -> Host:
    return machines.hosts[0]
