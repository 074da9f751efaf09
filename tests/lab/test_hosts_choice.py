"""Sites are probed from a host, the one that works is chosen, and what works is kept when none
does: behind the wall, where one real mirror answers and can be told to fail."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fleets
import pytest
from fleets import Fleet, Host, fleet, ok, words

from gpufleet.lab.walled import SITE, Mirror
from gpufleet.mirrors.plan import CACHE, PIP_CONF

INDEX = "https://mirror.gpufleet.test/pypi/web/simple"

SOURCES = "/etc/apt/sources.list.d/debian.sources"

#: Notes every command that comes through ssh, and runs it.
COUNT = """ForceCommand /bin/sh -c 'echo >>/root/commands; exec /bin/sh -c "$SSH_ORIGINAL_COMMAND"'
"""


@pytest.fixture(scope="module")
def walled(can_boot: None) -> Iterator[Fleet]:
    """One fresh host that reaches nothing but the mirror host."""
    fleets.sweep()
    name = f"t-{os.getpid()}-choice"
    try:
        yield fleets.boot(name, 1, "--walled")
    finally:
        fleets.take_down(name)


@pytest.fixture
def host(walled: Fleet) -> Host:
    return walled.hosts[0]


@pytest.fixture
def mirror(walled: Fleet) -> Iterator[Mirror]:
    """The mirror, in order again after the test."""
    seen = walled.lab.mirror
    yield seen
    seen.clear()


@pytest.fixture(scope="module")
def auto(walled: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An inventory in which the host chooses for itself."""
    settings = walled.lab.settings
    mirrors = {**settings["mirrors"], "site": "auto"}
    return walled.inventory(tmp_path_factory.mktemp("auto"), {**settings, "mirrors": mirrors})


def probed(auto: Path, *options: str) -> dict[tuple[str, str], Any]:
    """What `fleet mirrors probe` says, by site and service."""
    done = fleet("mirrors", "probe", "-i", auto, "--json", *options)
    (one,) = done.document["hosts"]
    assert one["error"] is None
    return {(row["site"], row["service"]): row for row in one["found"]}


def test_the_one_site_that_answers_is_found_and_the_others_are_named(auto: Path, host: Host):
    found = probed(auto)
    assert {found[SITE, service]["state"] for service in ("apt", "pypi", "torch")} == {"ok"}
    assert found[SITE, "pypi"]["bytes_per_second"] > 0
    assert set(found[SITE, "apt"]["parts"]) == {"debian", "debian-security"}
    others = {row["state"] for (site, _), row in found.items() if site != SITE}
    assert others == {"unreachable"}
    assert len({site for site, _ in found}) > 10
    assert host.path(CACHE).exists()


FAULTS: dict[str, tuple[str, str, dict[str, str], str, str]] = {
    "pip's user agent alone": (
        "pypi",
        "forbidden",
        {"agent": "^pip/"},
        "refused",
        "403 to pip, though not to curl",
    ),
    "a redirect to another site": ("pypi", "elsewhere", {}, "elsewhere", "redirects to "),
    "a captive portal": ("pypi", "portal", {}, "portal", "a login portal?"),
    "garbage with 200": ("apt", "garbage", {}, "garbage", "'7f3a garbage 9c1e', which is no InRel"),
    "a package list that nobody signed": (
        "apt",
        "stale",
        {},
        "garbage",
        "a file is not: answers 2",
    ),
    "an index without files": ("pypi", "stale", {}, "garbage", "which is no package index"),
    "files that are gone": ("pypi", "dead", {}, "cut", "its index is well, a file is not: cuts "),
    "cut connections": ("apt", "dropped", {}, "cut", "cuts the connection after 0 bytes"),
    "no such folder": ("torch", "missing", {}, "missing", "has no /pytorch/whl/cpu/torch/ (404)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_site_that_fails_says_how_in_one_line(auto: Path, mirror: Mirror, fault: str):
    service, kind, how, state, why = FAULTS[fault]
    mirror.fault(service, kind, **how)
    row = probed(auto, "--site", SITE, "--service", service)[SITE, service]
    assert row["state"] == state, row
    words(row["why"], why)
    assert "\n" not in row["why"]


def test_a_certificate_for_another_name_is_named(auto: Path, mirror: Mirror):
    mirror.fault("site", "certificate")
    row = probed(auto, "--site", SITE, "--service", "pypi")[SITE, "pypi"]
    assert (row["state"], row["bytes_per_second"]) == ("certificate", None)
    words(row["why"], "its certificate is wrong")


def test_apply_takes_what_works_and_a_second_one_asks_next_to_nothing(auto: Path, host: Host):
    probed(auto)
    ok(fleet("apply", "-i", auto, "--only", "mirrors"))
    assert f"index-url = {INDEX}\n" in host.path(PIP_CONF).read_text()
    shown = fleet("mirrors", "show", "-i", auto, "--json").document["hosts"][0]
    services = {row["service"]: row for row in shown["services"]}
    assert (services["pypi"]["site"], services["pypi"]["policy"]) == (SITE, "measured")
    assert (services["hf"]["site"], services["hf"]["policy"]) == ("official", "official")
    assert PIP_CONF in shown["written"]
    host.path("/etc/ssh/sshd_config.d/count.conf").write_text(COUNT)
    host.reload_sshd()
    log = host.path("/root/commands")
    log.write_text("")
    try:
        again = ok(fleet("apply", "-i", auto, "--only", "mirrors", "--json"))
        commands = log.read_text().count("\n")
    finally:
        host.path("/etc/ssh/sshd_config.d/count.conf").unlink()
        host.reload_sshd()
    assert again.changed(host.name) == {}
    # preflight's, the fact of the mirrors, and what lies where they would be written
    assert 0 < commands <= 4


def test_what_works_is_kept_when_every_site_is_down_and_apply_says_so(
    auto: Path, host: Host, mirror: Mirror
):
    before = host.path(PIP_CONF).read_bytes()
    mirror.fault("site", "missing")
    host.path(CACHE).unlink()
    done = ok(fleet("apply", "-i", auto, "--only", "mirrors"))
    kept = f"apt, pypi, conda, miniconda, torch: kept at {SITE}: no site passed: {SITE}: "
    words(done.out + done.err, f"{host.name}: warning: mirrors: {kept}")
    assert host.path(PIP_CONF).read_bytes() == before
    mirror.clear()
    probed(auto)
    shown = fleet("mirrors", "show", "-i", auto, "--json").document["hosts"][0]
    services = {row["service"]: row for row in shown["services"]}
    assert services["pypi"]["policy"] == "measured"


def test_a_site_that_passes_a_probe_and_fails_a_client_is_left_out_until_it_is_probed_again(
    auto: Path, host: Host, mirror: Mirror
):
    ok(fleet("mirrors", "restore", "-i", auto))
    original = host.path(SOURCES).read_bytes()
    # The probe asks every suite for its InRelease, and one for its packages.
    mirror.fault("apt", "forbidden", path="/dists/bookworm-updates/main/")
    assert probed(auto)[SITE, "apt"]["state"] == "ok"
    first = fleet("apply", "-i", auto, "--only", "mirrors")
    assert first.code == 1
    words(first.err, f"apt cannot use {mirror.name}", "403", "apply again, and official comes next")
    assert not host.path(PIP_CONF).exists()

    second = ok(fleet("apply", "-i", auto, "--only", "mirrors"))
    words(
        second.out + second.err,
        "mirrors: apt, miniforge, cuda_apt, hf: left to the official site",
        f"{SITE}: passed the probe and then failed: apt: E: Failed to fetch {mirror.url}",
    )
    assert host.path(SOURCES).read_bytes() == original
    assert f"index-url = {INDEX}\n" in host.path(PIP_CONF).read_text()

    mirror.clear()
    probed(auto, "--service", "apt")
    ok(fleet("apply", "-i", auto, "--only", "mirrors"))
    assert mirror.url in host.path(SOURCES).read_text()
