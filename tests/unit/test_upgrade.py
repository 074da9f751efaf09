"""What apt says about the next upgrade, read from what it says on real hosts."""

from __future__ import annotations

import pytest
from gpu_hosts import text, upgrade

from gpufleet.upgrade import plan
from gpufleet.upgrade.facts import NextUpgrade
from gpufleet.upgrade.plan import NONE, Change, Origin, Unattended, by_itself, changes, parse

SECURITY = "Debian-Security:12/oldstable-security"


def test_changes_have_their_versions_and_where_these_come_from():
    found = {change.name: change for change in changes(text("apt-debian-12-headers").splitlines())}
    assert found["linux-image-amd64"] == Change(
        "linux-image-amd64", "6.1.176-1", "6.1.192-2", (SECURITY,)
    )
    new = found["linux-image-6.1.0-56-amd64"]
    assert (new.is_new, new.is_removed, new.new) == (True, False, "6.1.192-2")


def test_ubuntu_has_a_version_in_several_pockets():
    found = {change.name: change for change in upgrade("ubuntu-24.04-prebuilt").changes}
    assert found["linux-generic"].origins == (
        "Ubuntu:24.04/noble-updates",
        "Ubuntu:24.04/noble-security",
    )


def test_removals_are_changes_without_a_new_version():
    removed = [c for c in upgrade("ubuntu-24.04-hold-meta").changes if c.is_removed]
    assert removed == [Change("linux-generic", "6.8.0-31.31", None)]


def test_a_name_loses_its_architecture():
    (change,) = changes(["Inst libnvidia-ml1:i386 [1] (2 Debian:12/stable [i386]) []"])
    assert change.name == "libnvidia-ml1"


def test_what_is_kept_back_is_listed():
    assert upgrade("debian-12-held").kept_back == ("linux-headers-amd64", "linux-image-amd64")
    assert upgrade("debian-12-headers").kept_back == ()


def test_apts_refusal_is_told_by_what_is_unmet():
    lines = [
        "== simulation",
        "Reading package lists...",
        "You might want to run 'apt --fix-broken install' to correct these.",
        "The following packages have unmet dependencies:",
        " nvidia-smi : Depends: libnvidia-ml1 (= 535.261.03-1) but 550.1 is installed",
        "E: Unmet dependencies. Try 'apt --fix-broken install' with no packages.",
    ]
    said = parse(lines)
    assert said.error.startswith("nvidia-smi : Depends: libnvidia-ml1")
    assert parse(["== simulation", "E: dpkg was interrupted"]).error == "dpkg was interrupted"


def test_a_host_without_apt_has_nothing_to_say():
    assert parse([]) == NONE
    assert NextUpgrade.default() == NONE
    assert not NONE.available


def test_the_age_of_the_lists_is_told_where_there_are_any():
    assert upgrade("debian-12-headers").lists_age_s == 3600
    bare = parse(["== simulation"])
    assert bare.lists_age_s is None
    assert bare.stale


class TestUnattendedUpgrades:
    def test_of_debian_take_what_debian_and_its_security_have(self):
        said = upgrade("debian-12-headers", "debian-12")
        assert said.unattended is not None
        assert said.unattended.active
        assert "origin=Debian,codename=bookworm-security,label=Debian-Security" in (
            said.unattended.patterns
        )
        assert by_itself(said).changes == said.changes

    def test_of_ubuntu_take_the_security_pocket_and_not_the_updates(self):
        said = upgrade("ubuntu-24.04-prebuilt", "ubuntu-24.04")
        assert said.unattended is not None
        assert said.unattended.patterns[:2] == (
            "origin=Ubuntu,archive=noble",
            "origin=Ubuntu,archive=noble-security",
        )
        left = {c.name for c in said.changes} - {c.name for c in by_itself(said).changes}
        assert left == {"linux-firmware-nvidia-graphics"}  # only in noble-updates

    def test_remove_nothing(self):
        said = by_itself(upgrade("ubuntu-24.04-hold-meta", "ubuntu-24.04"))
        assert [change for change in said.changes if change.is_removed] == []

    def test_are_off_without_their_timer_or_option(self):
        dump = ['APT::Periodic::Unattended-Upgrade "1";']

        def active(*lines: str) -> bool:
            said = parse(["== simulation", "== unattended", *lines]).unattended
            assert said is not None
            return said.active

        assert active(*dump, "timer=enabled")
        assert not active(*dump, "timer=masked")
        assert not active('APT::Periodic::Unattended-Upgrade "0";', "timer=enabled")
        assert not active("timer=enabled")

    def test_spare_names_that_begin_as_the_blacklist_says(self):
        held = Unattended(True, (), ("linux-", "libcuda1$", "broken("), reboots=False)
        assert held.spares("linux-image-amd64")
        assert not held.spares("kernel-linux-x")
        assert not held.spares("libcuda1-dev")

    @pytest.mark.parametrize(
        ("pattern", "allowed"),
        [
            ("origin=Debian,codename=bookworm,label=Debian", True),
            ("o=Debian,a=oldstable", True),
            ("o=Debian,a=stable", False),
            ("site=*.example", True),
            ("origin=*", True),
            ("nonsense=Debian", False),
        ],
    )
    def test_match_origins_by_every_key(self, pattern, allowed):
        here = Origin(
            "Debian", "Debian", "oldstable", "bookworm", "main", "mirror.example", "12.15"
        )
        assert Unattended(True, (pattern,), (), False).allows(here) is allowed


def test_packages_are_traced_to_the_source_they_were_installed_from():
    lines = [
        "== simulation",
        "== origins",
        "Package files:",
        " 100 /var/lib/dpkg/status",
        "     release a=now",
        " 500 http://mirror.example/compute/cuda/repos/debian12/x86_64  Packages",
        "     release o=NVIDIA,l=NVIDIA CUDA,c=",
        "     origin mirror.example",
        " 500 http://mirror.example/debian bookworm/non-free amd64 Packages",
        "     release v=12.15,o=Debian,a=oldstable,n=bookworm,l=Debian,c=non-free,b=amd64",
        "     origin mirror.example",
        "== installed",
        "libcuda1:",
        "  Installed: 535.261.03-1",
        "  Candidate: 535.309.01-1",
        "  Version table:",
        "     535.309.01-1 500",
        "        500 http://mirror.example/other bookworm/main amd64 Packages",
        " *** 535.261.03-1 500",
        "        500 http://mirror.example/debian bookworm/non-free amd64 Packages",
        "        100 /var/lib/dpkg/status",
        "nvidia-smi:",
        "  Installed: 999",
        "  Version table:",
        " *** 999 100",
        "        100 /var/lib/dpkg/status",
    ]
    said = parse(lines)
    assert said.came_from == (("libcuda1", "Debian"), ("nvidia-smi", ""))
    assert [origin.origin for origin in said.origins if origin.label] == ["NVIDIA", "Debian"]


def test_lists_older_than_three_days_are_stale():
    assert plan.LISTS_OLD_S == 3 * 86_400
    assert not upgrade("debian-12-headers").stale
    assert upgrade("debian-12-headers", lists_age_s=4 * 86_400).stale
