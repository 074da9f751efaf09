"""A mirror site is written whole, and the choice of `official` leaves no trace of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import sites
import yaml
from fleets import Fleet, Host, fleet, ok, words
from sites import Site

FILES = ("/etc/pip.conf", "/etc/uv/uv.toml", "/etc/conda/.condarc")


@pytest.fixture(scope="module")
def site(deployed: Fleet) -> Iterator[Site]:
    """A mirror of the archives that the hosts use."""
    (host, *_) = deployed.hosts
    uris = [uri for stanza in _sources(host) for uri in stanza["URIs"].split()]
    archives = {uri.rstrip("/").rpartition("/")[2]: uri for uri in uris}
    made = Site(deployed.gateway, sites.Forwarded(archives))
    with sites.serving(made):
        yield made


@pytest.fixture(scope="module")
def settings(site: Site) -> dict[str, object]:
    folders = {"conda-forge": "/anaconda/cloud", "pytorch": "/anaconda/cloud"}
    services = {
        "apt": {"archives": {"debian": "/debian", "debian-security": "/debian-security"}},
        "pypi": {"index": "/pypi/web/simple"},
        "conda": {"base": "/anaconda", "subchannels": ["main", "r", "msys2"], "cloud": folders},
    }
    own = {"hosts": [site.host], "scheme": "http", "services": services}
    return {"site": "own", "sites": {"own": own}}


@pytest.fixture(scope="module")
def chosen(
    deployed: Fleet, settings: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """An inventory that chooses the site; the module ends with the hosts on `official`."""
    yield deployed.inventory(tmp_path_factory.mktemp("mirrors"), {"mirrors": settings})
    ok(deployed.apply("--only", "mirrors"))


@pytest.fixture(scope="module")
def before(deployed: Fleet) -> list[dict[str, tuple[str, int, int]]]:
    return [_package_files(host) for host in deployed.hosts]


def _package_files(host: Host) -> dict[str, tuple[str, int, int]]:
    """Digest, mode and owner of every file that decides where packages come from."""
    files = [path for path in host.path("/etc/apt").rglob("*") if path.is_file()]
    files += [path for path in map(host.path, FILES) if path.exists()]
    return {
        str(path): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mode,
            path.stat().st_uid,
        )
        for path in files
    }


def _sources(host: Host) -> list[dict[str, str]]:
    """The stanzas of debian.sources, as apt's manual (sources.list(5)) describes them."""
    text = host.path("/etc/apt/sources.list.d/debian.sources").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    stanzas = "\n".join(lines).split("\n\n")
    return [
        dict(line.split(": ", 1) for line in stanza.splitlines() if line)
        for stanza in stanzas
        if stanza.strip()
    ]


def _security(host: Host) -> set[tuple[str, str]]:
    """(address, suite) of every security source."""
    return {
        (uri, suite)
        for stanza in _sources(host)
        for uri in stanza["URIs"].split()
        for suite in stanza["Suites"].split()
        if suite.endswith("-security")
    }


def test_the_site_is_written_into_every_package_manager(
    deployed: Fleet, site: Site, chosen: Path, before: list[dict[str, tuple[str, int, int]]]
) -> None:
    security = [_security(host) for host in deployed.hosts]
    done = ok(fleet("apply", "-i", chosen, "--json"))
    for host, secure in zip(deployed.hosts, security, strict=True):
        assert list(done.changed(host.name)) == ["mirrors"]
        pip, uv, conda = (host.path(path).read_text() for path in FILES)
        assert f"index-url = {site.url}/pypi/web/simple\n" in pip
        assert f'url = "{site.url}/pypi/web/simple"\ndefault = true\n' in uv
        channels = yaml.safe_load(conda)
        assert channels["default_channels"] == [
            f"{site.url}/anaconda/pkgs/{name}" for name in ("main", "r", "msys2")
        ]
        assert channels["custom_channels"] == {
            "conda-forge": f"{site.url}/anaconda/cloud",
            "pytorch": f"{site.url}/anaconda/cloud",
        }
        mirrored = {
            (uri, suite)
            for stanza in _sources(host)
            for uri in stanza["URIs"].split()
            for suite in stanza["Suites"].split()
        } - _security(host)
        assert mirrored == {(f"{site.url}/debian", s) for s in ("bookworm", "bookworm-updates")}
        # Security updates stay where they were, and are still there.
        assert secure
        assert _security(host) == secure


def test_apt_understands_what_was_written(deployed: Fleet, site: Site, chosen: Path) -> None:
    for host in deployed.hosts:
        wanted = host.sh("apt-get update --print-uris")
        assert f"'{site.url}/debian/dists/bookworm/InRelease'" in wanted
        assert f"'{site.url}/debian/dists/bookworm-updates/InRelease'" in wanted
        assert not re.search(rf"'{re.escape(site.url)}\S*security", wanted)


def test_a_second_apply_changes_nothing(deployed: Fleet, chosen: Path) -> None:
    done = ok(fleet("apply", "-i", chosen, "--json"))
    assert [done.changed(host.name) for host in deployed.hosts] == [{}, {}]


def _sessions(host: Host) -> int:
    """How many commands sshd has started so far, this one among them."""
    return int(host.sh("journalctl -t sshd -o cat | grep -c '^Starting session: command'"))


@pytest.fixture
def counted(one: Host) -> Iterator[Host]:
    """A host whose sshd notes every command."""
    config = one.path("/etc/ssh/sshd_config.d/00-count.conf")
    config.write_text("LogLevel VERBOSE\n")
    one.reload_sshd()
    yield one
    config.unlink()
    one.reload_sshd()


def test_with_nothing_to_do_mirrors_and_environment_cost_four_commands_at_most(
    counted: Host, chosen: Path
) -> None:
    def commands(concerns: str) -> int:
        before = _sessions(counted)
        limit = ("--limit", counted.name, "--only", concerns, "--json")
        assert ok(fleet("apply", "-i", chosen, *limit)).changed(counted.name) == {}
        return _sessions(counted) - before - 1

    preflight = commands("preflight")
    assert preflight > 0
    assert commands("mirrors,python_env") - preflight <= 4


def test_security_suites_move_to_the_site_only_when_asked(
    deployed: Fleet, site: Site, settings: dict[str, object], chosen: Path, tmp_path: Path
) -> None:
    asked = deployed.inventory(tmp_path, {"mirrors": {**settings, "apt_security": True}})
    ok(fleet("apply", "-i", asked, "--only", "mirrors"))
    for host in deployed.hosts:
        assert _security(host) == {(f"{site.url}/debian-security", "bookworm-security")}


def test_a_file_that_somebody_edited_is_not_put_back_but_named(
    deployed: Fleet, chosen: Path, one: Host, two: Host
) -> None:
    edited = two.path("/etc/pip.conf")
    written = edited.read_text()
    edited.write_text(written + "timeout = 60\n")
    done = fleet("apply", "-i", "inventory/lab.py", "--only", "mirrors", GPUFLEET_LAB=deployed.name)
    assert done.code == 1
    words(done.complaint, f"{two.name}: mirrors", "/etc/pip.conf was edited since", "run it again")
    assert edited.read_text() == written + "timeout = 60\n"
    # All of a host's files or none.
    assert two.path("/etc/uv/uv.toml").exists()
    assert not one.path("/etc/pip.conf").exists()
    edited.write_text(written)


def test_official_puts_every_file_back_byte_for_byte(
    deployed: Fleet, chosen: Path, before: list[dict[str, tuple[str, int, int]]]
) -> None:
    ok(deployed.apply())
    assert [_package_files(host) for host in deployed.hosts] == before
    done = ok(deployed.apply("--only", "mirrors"))
    assert [done.changed(host.name) for host in deployed.hosts] == [{}, {}]
