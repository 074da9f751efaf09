"""Distribution packages: what is missing, whether lists are stale, and what dpkg really says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from gpufleet.base.facts import AptPackages
from gpufleet.base.plan import PACKAGES, Packages, lists_are_stale, missing, parse

DAY = 86_400


def test_the_facts_lines_are_read():
    lines = ["installed\tgit", "installed\trsync", "lists_age_s\t60"]
    assert parse(lines) == Packages(frozenset({"git", "rsync"}), False, 60)


def test_an_interrupted_dpkg_is_noticed():
    assert parse(["interrupted"]) == Packages(frozenset(), True, None)


def test_what_is_missing_is_installed_in_the_order_asked():
    found = Packages(frozenset({"git", "curl"}), False, 0)
    assert missing(["tmux", "git", "rsync"], found) == ["tmux", "rsync"]
    assert missing(["git", "curl"], found) == []


@pytest.mark.parametrize(
    ("age", "stale"), [(None, True), (0, False), (DAY, False), (DAY + 1, True), (30 * DAY, True)]
)
def test_lists_are_stale_when_there_are_none_or_they_are_older_than_a_day(
    age: int | None, stale: bool
):
    assert lists_are_stale(Packages(frozenset(), False, age)) is stale


def test_every_package_that_gpufleet_needs_has_a_package_name():
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", name) for name in PACKAGES)
    assert len(set(PACKAGES)) == len(PACKAGES)


debian = pytest.mark.skipif(not shutil.which("dpkg-query"), reason="this machine has no dpkg")


def query(name: str) -> bool:
    done = subprocess.run(
        ["dpkg-query", "-W", "-f", "${db:Status-Status}", name],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout == "installed"


@debian
def test_the_script_agrees_with_dpkg_about_this_machine(sh):
    names = (*PACKAGES, "dpkg", "coreutils", "no-such-package")
    done = sh(AptPackages().command(packages=names))
    assert (done.returncode, done.stderr) == (0, "")
    found = AptPackages().process(done.stdout.splitlines())
    assert found.installed == {name for name in names if query(name)} >= {"dpkg", "coreutils"}
    audit = subprocess.run(["dpkg", "--audit"], capture_output=True, text=True, check=False)
    assert found.interrupted == bool(audit.stdout or any(Path("/var/lib/dpkg/updates").iterdir()))


class Apt:
    """A copy of the folders that apt keeps its lists and sources in."""

    def __init__(self, root: Path, sh) -> None:
        self.root, self._sh = root, sh
        self.lists = root / "var/lib/apt/lists"
        self.sources = root / "etc/apt/sources.list.d"
        for folder in (
            self.lists / "partial",
            root / "var/cache/apt",
            self.sources,
            root / "var/lib/dpkg/updates",
        ):
            folder.mkdir(parents=True)

    def put(self, path: Path, age: float) -> None:
        path.touch()
        self.age(path, age)

    def age(self, path: Path, seconds: float) -> None:
        stamp = time.time() - seconds
        os.utime(path, (stamp, stamp))

    def found(self) -> Packages:
        command = str(AptPackages().command(packages=("dpkg",)))
        done = self._sh(re.sub(r"(?<=\s)/(?=(etc|var)/)", f"{self.root}/", command))
        assert done.returncode == 0
        return AptPackages().process(done.stdout.splitlines())


@pytest.fixture
def apt(tmp_path: Path, sh) -> Apt:
    return Apt(tmp_path, sh)


@debian
class TestTheAgeOfLists:
    def test_there_is_none_without_lists(self, apt: Apt):
        assert apt.found().lists_age_s is None

    def test_it_is_the_time_since_the_update(self, apt: Apt):
        apt.put(apt.lists / "h_debian_dists_bookworm_main_binary-amd64_Packages", 5 * DAY)
        apt.put(apt.sources / "debian.sources", 9 * DAY)
        for folder in (apt.lists, apt.lists / "partial"):
            apt.age(folder, 2 * DAY)
        age = apt.found().lists_age_s
        assert age == pytest.approx(2 * DAY, abs=30)

    def test_lists_do_not_count_once_a_source_was_edited_after_them(self, apt: Apt):
        apt.put(apt.lists / "x_Packages.lz4", 600)
        for folder in (apt.lists, apt.lists / "partial"):
            apt.age(folder, 600)
        apt.put(apt.sources / "old.list", 9 * DAY)
        assert apt.found().lists_age_s == pytest.approx(600, abs=30)
        apt.put(apt.sources / "new.list", 60)
        assert apt.found().lists_age_s is None

    def test_an_update_that_was_killed_is_noticed(self, apt: Apt):
        assert not apt.found().interrupted
        (apt.root / "var/lib/dpkg/updates/0001").touch()
        assert apt.found().interrupted
