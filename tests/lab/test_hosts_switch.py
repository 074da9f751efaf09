"""A switch of mirrors is proved by the real apt, pip and uv on the host, and by the lab's conda;
where one of them does not work with a site, what was in force before stays in force, byte for byte.

The lab's conda stands for Miniconda's, which the build machines cannot fetch: the same commands,
over a real solver and real packages (gpufleet/lab/conda_double)."""

from __future__ import annotations

import ensurepip
import os
import shutil
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fleets
import pytest
import sites
from fleets import HOME, Fleet, Host, fleet, ok, words
from sites import Site

from gpufleet import catalog
from gpufleet.lab import channel
from gpufleet.mirrors.choice import decide
from gpufleet.mirrors.plan import RECORD, record
from gpufleet.python_env import wheelhouse
from gpufleet.python_env.plan import UV_LOCK
from gpufleet.settings import Mirrors

FILES = ("/etc/pip.conf", "/etc/uv/uv.toml", "/etc/conda/.condarc")
CONDA = f"{HOME}/conda"
FORGE = "/anaconda/cloud/conda-forge"
SOURCES = "/etc/apt/sources.list.d/debian.sources"
PIP = "/usr/lib/python3/dist-packages"


@pytest.fixture(scope="module")
def lab(can_boot: None) -> Iterator[Fleet]:
    """One host that has pip, uv and conda."""
    name = f"t-{os.getpid()}-switch"
    try:
        made = fleets.boot(name, 1)
        (host,) = made.hosts
        (bundled,) = Path(ensurepip.__file__).parent.glob("_bundled/pip-*.whl")
        zipfile.ZipFile(bundled).extractall(host.path(PIP))
        (wheel,) = wheelhouse.build(UV_LOCK, "").glob("uv-*.whl")
        with zipfile.ZipFile(wheel) as opened:
            (member,) = [n for n in opened.namelist() if n.endswith("/scripts/uv")]
            uv = host.path("/usr/local/bin/uv")
            uv.write_bytes(opened.read(member))
            uv.chmod(uv.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
        installer = channel.ensure() / "miniconda" / channel.INSTALLER
        shutil.copy(installer, host.path("/root/conda.sh"))
        host.sh(f"mkdir -p {HOME} && sh /root/conda.sh -b -p {CONDA} && rm /root/conda.sh")
        yield made
    finally:
        fleets.take_down(name)


@pytest.fixture(scope="module")
def host(lab: Fleet) -> Host:
    return lab.hosts[0]


@pytest.fixture(scope="module")
def there(lab: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Site]]:
    """The official archive and two mirrors of it, all well."""
    archive = sites.archive()
    both = {**archive, **sites.index(tmp_path_factory.mktemp("index"))}
    both = sites.Folder(both, channel.ensure())
    made = {"official": Site(lab.gateway, archive)}
    made |= {name: Site(lab.gateway, both) for name in ("one", "two")}
    source = lab.hosts[0].path(SOURCES)
    source.write_text(sites.SOURCE.format(url=made["official"].url, suite=sites.SUITE))
    with sites.serving(*made.values()):
        yield made


@pytest.fixture
def mirrors(there: dict[str, Site]) -> Iterator[dict[str, Site]]:
    """The same, nothing asked yet, and without faults again afterwards."""
    for site in there.values():
        site.asked.clear()
    yield there
    for site in there.values():
        site.fault, site.at = "", "/"


def settings(mirrors: dict[str, Site], site: str) -> dict[str, dict[str, Any]]:
    own = {name: one.setting() for name, one in mirrors.items() if name != "official"}
    return {"mirrors": {"site": site, "sites": own}}


@pytest.fixture
def switch(lab: Fleet, mirrors: dict[str, Site], tmp_path: Path):
    """Apply the concern with another site."""

    def run(site: str, *options: str) -> fleets.Done:
        chosen = lab.inventory(tmp_path, settings(mirrors, site))
        return fleet("apply", "-i", chosen, "--only", "mirrors", *options)

    return run


@pytest.fixture
def restore(lab: Fleet, mirrors: dict[str, Site], tmp_path: Path):
    def run(*options: str) -> fleets.Done:
        chosen = lab.inventory(tmp_path, settings(mirrors, "one"))
        return fleet("mirrors", "restore", "-i", chosen, *options)

    return run


def content(host: Host) -> dict[str, tuple[bytes, int, int]]:
    """Bytes, mode and time of change of everything that decides where packages come from."""
    paths = [*map(host.path, FILES), *host.path("/etc/apt").rglob("*")]
    paths += host.path("/var/lib/gpufleet").rglob("*")
    return {
        str(p): (p.read_bytes(), p.stat().st_mode, p.stat().st_mtime_ns)
        for p in paths
        if p.is_file()
    }


@pytest.fixture(scope="module")
def before(host: Host, there: dict[str, Site]) -> dict[str, tuple[bytes, int, int]]:
    """What the first test finds."""
    return content(host)


class TestInOrder:
    """One host's way from its own sources to a mirror, through faults, and back."""

    def test_a_switch_is_proved_by_every_client(self, host, mirrors, switch, before) -> None:
        stale = host.path(f"{CONDA}/pkgs/cache/of-another-site.json")
        stale.parent.mkdir(parents=True, exist_ok=True)
        stale.touch()
        done = ok(switch("one", "--json"))
        assert list(done.changed(host.name)) == ["mirrors"]
        assert mirrors["one"].clients >= {"Debian APT-HTTP", "pip", "uv"}
        assert any(path.startswith(FORGE) for _, path in mirrors["one"].asked)
        assert not stale.exists()
        # The lists of the host itself are left alone.
        assert not list(host.path("/var/lib/apt/lists").glob("*_dists_bookworm_Release"))

    def test_where_nothing_changes_nothing_is_asked(self, host, mirrors, switch) -> None:
        assert ok(switch("one", "--json")).changed(host.name) == {}
        assert mirrors["one"].asked == []

    @pytest.mark.parametrize(
        ("fault", "at", "client", "said"),
        [
            ("garbage", "/", "apt", "does the network require authentication?"),
            ("portal", "/", "apt", "does the network require authentication?"),
            ("missing", "/debian/dists/bookworm/main", "apt", "404"),
            ("cut", "/debian/dists/bookworm/main", "apt", "Failed to fetch"),
            ("refuse:pip", "/", "pip", "403"),
            ("portal", "/simple", "pip", "from versions: none"),
            ("cut", "/files", "pip", "DO NOT MATCH THE HASHES"),
            ("refuse:uv", "/", "uv", "403"),
            ("missing", FORGE, "conda", "404"),
            ("garbage", FORGE, "conda", "Error"),
            ("cut", f"{FORGE}/linux-64", "conda", "IncompleteRead"),
        ],
    )
    def test_a_site_that_fails_a_client_does_not_come_into_force(
        self, host, mirrors, switch, fault, at, client, said
    ) -> None:
        in_force = content(host)
        mirrors["two"].fault, mirrors["two"].at = fault, at
        done = switch("two")
        assert done.code == 1
        words(done.complaint, f"{host.name}: mirrors", f"{client} cannot use {mirrors['two'].host}")
        words(done.complaint, said, "before is in force again", "to another, then apply again")
        assert content(host) == in_force

    def test_a_site_that_is_down_does_not_come_into_force(
        self, host, mirrors, switch, lab, tmp_path
    ) -> None:
        in_force = content(host)
        down = Site(lab.gateway, {})
        down.server.server_close()
        chosen = lab.inventory(tmp_path, settings({"down": down}, "down"))
        done = fleet("apply", "-i", chosen, "--only", "mirrors")
        assert done.code == 1
        words(done.complaint, f"apt cannot use {down.host}", "in force again")
        assert content(host) == in_force

    def test_a_disk_that_fills_while_the_files_are_written_changes_none(
        self, host, mirrors, switch
    ) -> None:
        in_force = content(host)
        host.sh("cp -a /etc/uv /root/uv && mount -t tmpfs -o size=4k,mode=755 none /etc/uv")
        try:
            # One page is all there is.
            host.sh("cp -a /root/uv/. /etc/uv")
            done = switch("two")
            assert done.code == 1
            words(done.complaint, f"{host.name}: mirrors", "No space left", "free space")
            assert host.sh("cat /etc/uv/uv.toml") == host.sh("cat /root/uv/uv.toml")
        finally:
            host.sh("umount /etc/uv; rm -r /root/uv")
        assert content(host) == in_force

    def test_after_all_this_the_host_still_gets_packages(self, host, mirrors) -> None:
        host.sh("mkdir -p /tmp/l/partial")
        host.sh("apt-get update -o Dir::State::lists=/tmp/l -o APT::Update::Error-Mode=any")
        assert mirrors["one"].asked
        assert mirrors["two"].asked == []

    def test_a_source_of_somebody_elses_that_fails_does_not_stand_in_the_way(
        self, host, mirrors, switch
    ) -> None:
        theirs = host.path("/etc/apt/sources.list.d/theirs.list")
        theirs.write_text("deb http://127.0.0.1:9/nothing bookworm stable\n")
        try:
            ok(switch("two"))
            assert f"{mirrors['two'].url}/debian" in host.path(SOURCES).read_text()
        finally:
            theirs.unlink()

    def test_a_restore_refuses_where_somebody_edited(self, host, restore) -> None:
        pip = host.path("/etc/pip.conf")
        written = pip.read_bytes()
        pip.write_bytes(written + b"timeout = 60\n")
        edited = content(host)
        done = restore()
        assert done.code == 1
        words(done.complaint, f"{host.name}: mirrors", "/etc/pip.conf was edited since", "delete")
        assert content(host) == edited
        pip.write_bytes(written)

    def test_a_restore_brings_back_every_byte(self, host, restore, before) -> None:
        done = ok(restore("--json"))
        assert done.document["command"] == "mirrors restore"
        assert list(done.changed(host.name)) == ["mirrors"]
        (warning,) = done.document["hosts"][0]["warnings"]
        words(warning, "the next apply writes one again", "mirrors.site")
        assert content(host) == before
        assert ok(restore("--json")).changed(host.name) == {}


def test_where_no_site_works_what_is_in_force_stays_and_that_is_said(
    lab, host, mirrors, switch, tmp_path
) -> None:
    """As after a choice by measurement: the host remembers what it put in force."""
    ok(switch("one"))
    own = Mirrors.model_validate({**settings(mirrors, "one")["mirrors"]})
    host.path(RECORD).write_text(record(decide(own, catalog.mirrors())))
    in_force = content(host)
    down = {name: Site(lab.gateway, {}) for name in ("one", "two")}
    for site in down.values():
        site.server.server_close()
    auto = settings(down, "auto")
    auto["mirrors"] |= {"exclude": list(catalog.mirrors().sites)}
    chosen = lab.inventory(tmp_path, auto)
    done = ok(fleet("apply", "-i", chosen, "--only", "mirrors", "--json"))
    warnings = done.document["hosts"][0]["warnings"]
    (kept,) = [line for line in warnings if "apt, pypi, conda: kept at one" in line]
    words(kept, "no site passed", "fleet mirrors show")
    for path in (*FILES, SOURCES):
        assert content(host)[str(host.path(path))] == in_force[str(host.path(path))]
    ok(fleet("mirrors", "restore", "-i", chosen))


def test_whatever_wins_over_the_choice_is_said(lab, host, mirrors, switch, tmp_path) -> None:
    host.path("/etc/environment").write_text("PIP_INDEX_URL=https://a:secret@pypi.example.org/s\n")
    host.path("/root/.condarc").write_text("channels:\n  - https://conda.example.org/main\n")
    try:
        done = ok(switch("one"))
        asked = fleet("doctor", "-i", lab.inventory(tmp_path), "--json")
    finally:
        host.path("/etc/environment").write_text("")
        host.path("/root/.condarc").unlink()
    said = [one for one in fleets.lines_about(done.out, host) if "warning" in one]
    assert len(said) == 2
    words(said[0], "PIP_INDEX_URL wins over /etc/pip.conf", "/etc/environment:1", "remove the line")
    words(
        said[1], "channels there wins over /etc/conda/.condarc", "/root/.condarc:1", "conda clean"
    )
    findings = asked.document["hosts"][0]["findings"]
    mirrors_ = {one["code"]: one for one in findings if one["code"].startswith("mirrors-")}
    assert set(mirrors_) == {"mirrors-environment", "mirrors-conda-file"}
    assert mirrors_["mirrors-environment"]["evidence"] == "/etc/environment:1"
    assert "secret" not in done.out + done.err + asked.out
