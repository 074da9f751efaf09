"""The browser tests look at the lab that the lab tests deploy, or at one of their own."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver

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


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """Chromium without a window, in a profile of its own."""
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    for name, path in programs.items():
        if path is None:
            pytest.skip(f"no {name} on PATH; `./fleet test browser` installs it on Debian")
    options = webdriver.ChromeOptions()
    options.binary_location = str(programs["chromium"])
    for flag in (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
        *("hide-scrollbars", "window-size=1280,860", "lang=en"),
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(f"--{flag}")
    service = webdriver.ChromeService(str(programs["chromedriver"]))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()
