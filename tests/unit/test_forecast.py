"""What a reboot and an upgrade do to the GPU, foretold from what apt says on real archives."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from gpu_hosts import (
    DEBIAN_NEW,
    DEBIAN_OLD,
    NOTHING,
    UBUNTU_NEW,
    UBUNTU_OLD,
    debian,
    gpus,
    held,
    settings,
    ubuntu,
    upgrade,
)

from gpufleet.cli import forecast as cli
from gpufleet.driver.forecast import Coming, Forecast, forecast, upstream
from gpufleet.kernel.picture import Grub, Kernel, NextBoot
from gpufleet.run.asking import Asked
from gpufleet.upgrade.plan import Change, Upgrade

DEBIAN_DRIVER, UBUNTU_DRIVER = gpus("535.261.03"), gpus("535.161.08")


def codes(part: Any) -> list[str]:
    return [reason.code for reason in part.reasons]


def on_debian(name: str, picture: Any = None, **options: Any) -> Forecast:
    kernels = picture or debian()
    return forecast(kernels, DEBIAN_DRIVER, upgrade(name), settings(), **options)


def on_ubuntu(name: str, picture: Any = None) -> Forecast:
    return forecast(picture or ubuntu(), UBUNTU_DRIVER, upgrade(name), settings())


class TestTheNextReboot:
    def test_is_safe_where_the_next_kernel_has_what_it_needs(self):
        said = forecast(debian(), DEBIAN_DRIVER, NOTHING, settings())
        assert (said.reboot.verdict, said.reboot.kernel) == ("safe", DEBIAN_OLD)
        assert said.reboot.why == "first entry of grub.cfg"
        assert (said.upgrade.verdict, said.safe, said.reasons) == ("nothing", True, ())

    def test_is_unsafe_with_every_reason_and_what_mends_it(self):
        new = Kernel(DEBIAN_NEW, False, 1, True, None)
        picture = debian(
            kernels=(*debian().kernels, new), next_boot=NextBoot(DEBIAN_NEW, "grubenv next_entry")
        )
        said = forecast(picture, DEBIAN_DRIVER, NOTHING, settings(), apply="fleet apply -i x")
        assert said.reboot.verdict == "unsafe"
        assert codes(said.reboot) == ["no-headers", "no-module", "nouveau"]
        assert {reason.mend for reason in said.reboot.reasons} == {"fleet apply -i x --only driver"}
        assert [(one.release, one.running, one.next, one.ok) for one in said.kernels] == [
            (DEBIAN_OLD, True, False, True),
            (DEBIAN_NEW, False, True, False),
        ]
        assert not said.safe

    def test_into_an_unknown_kernel_is_not_called_safe(self):
        picture = debian(next_boot=NextBoot(None, "no grub.cfg"))
        said = forecast(picture, DEBIAN_DRIVER, NOTHING, settings())
        assert (said.reboot.verdict, codes(said.reboot)) == ("unsafe", ["unknown-kernel"])
        assert "no grub.cfg" in said.reboot.reasons[0].text

    def test_into_a_kernel_that_is_not_installed_is_unsafe(self):
        picture = debian(next_boot=NextBoot("6.1.0-9-amd64", "GRUB_DEFAULT"))
        assert codes(forecast(picture, DEBIAN_DRIVER, NOTHING, settings()).reboot) == [
            "not-installed"
        ]

    def test_judges_the_flavour_by_what_the_gpus_take(self):
        said = forecast(debian(), DEBIAN_DRIVER, NOTHING, settings(), allowed=frozenset({"open"}))
        assert codes(said.reboot) == ["flavour"]
        assert "driver.modules" in said.reboot.reasons[0].mend


class TestAHostWithoutGpus:
    def test_has_nothing_to_lose(self):
        picture = debian(kernels=(), next_boot=NextBoot(None, "no kernel"))
        nobody = gpus("", gpus=(), loaded="", userland="")
        said = forecast(
            picture, nobody, upgrade("debian-12-no-headers"), settings(accelerator="cpu")
        )
        assert (said.gpu, said.safe, said.reasons) == (False, True, ())
        assert said.notes == ("no GPU to lose",)

    def test_is_one_whose_gpus_are_gone_if_it_is_to_have_some(self):
        new = Kernel(DEBIAN_OLD, True, 1, False, None)
        said = forecast(debian(kernels=(new,)), gpus("", gpus=()), NOTHING, settings())
        assert said.gpu
        assert not said.safe

    def test_is_not_one_that_has_gpus_and_uses_its_cpu(self):
        picture = debian(kernels=(Kernel(DEBIAN_OLD, True, 1, False, None),))
        said = forecast(picture, DEBIAN_DRIVER, NOTHING, settings(accelerator="cpu"))
        assert codes(said.reboot) == ["no-module"]
        assert any("accelerator is cpu" in note for note in said.notes)


class TestAnUpgradeOfDebian:
    def test_with_the_headers_meta_rebuilds_and_needs_a_reload(self):
        said = on_debian("debian-12-headers")
        assert said.upgrade.kernels == (DEBIAN_NEW,)
        assert (said.upgrade.kernel, said.upgrade.libraries) == (DEBIAN_NEW, "535.309.01")
        assert codes(said.upgrade) == ["reload"]
        assert "535.309.01 while module 535.261.03" in said.upgrade.reasons[0].text
        assert any("DKMS builds" in note for note in said.notes)

    def test_without_it_boots_a_kernel_that_has_no_module(self):
        said = on_debian("debian-12-no-headers", apply="fleet apply -i x --limit gpu1")
        assert said.reboot.verdict == "safe"
        assert said.upgrade.verdict == "unsafe"
        assert codes(said.upgrade) == ["no-headers", "no-module", "reload"]
        first = said.upgrade.reasons[0]
        assert first.text == (
            f"kernel {DEBIAN_NEW} comes and boots next: no headers for kernel {DEBIAN_NEW}"
        )
        assert "fleet apply -i x --limit gpu1 --only kernel" in first.mend

    def test_is_kept_from_its_kernel_by_the_holds_and_says_so(self):
        said = on_debian(
            "debian-12-held", held(debian(), "linux-image-amd64", "linux-headers-amd64")
        )
        assert (said.upgrade.kernels, said.upgrade.kernel) == ((), DEBIAN_OLD)
        assert codes(said.upgrade) == ["reload"]  # the driver is not held
        note = "the holds keep out what is newer of linux-headers-amd64, linux-image-amd64"
        assert note in said.notes

    def test_into_a_full_boot_makes_no_initrd(self):
        said = on_debian("debian-12-headers", debian(boot_free_kib=90 * 1024))
        assert codes(said.upgrade) == ["no-initrd", "reload", "boot-space"]
        assert "90 MiB free" in said.upgrade.reasons[-1].text

    def test_does_not_matter_to_a_grub_that_boots_the_old_kernel(self):
        entry = f"gnulinux-advanced-1>gnulinux-{DEBIAN_OLD}-advanced-1"
        pinned = debian(grub=Grub(True, default=entry), next_boot=NextBoot(DEBIAN_OLD, "GRUB"))
        said = on_debian("debian-12-no-headers", pinned)
        assert said.upgrade.kernel == DEBIAN_OLD
        # The driver moves on, DKMS builds it for the running kernel, and the module is replaced.
        assert codes(said.upgrade) == ["reload"]

    def test_boots_the_first_entry_once_the_pinned_kernel_is_gone(self):
        entry = f"gnulinux-advanced-1>gnulinux-{DEBIAN_OLD}-advanced-1"
        pinned = debian(grub=Grub(True, default=entry), next_boot=NextBoot(DEBIAN_OLD, "GRUB"))
        changes = (
            Change(f"linux-image-{DEBIAN_NEW}", None, "6.1.192-2"),
            Change(f"linux-image-{DEBIAN_OLD}", "6.1.176-1", None),
        )
        said = forecast(pinned, DEBIAN_DRIVER, Upgrade(True, changes), settings())
        assert said.upgrade.kernel == DEBIAN_NEW
        assert "kernel-removed" in codes(said.upgrade)


class TestAnUpgradeOfUbuntu:
    """The leaks of a half-made pin, and the branch that its name does not pin."""

    def test_with_prebuilt_modules_jumps_to_another_branch(self):
        said = on_ubuntu("ubuntu-24.04-prebuilt")
        assert (said.upgrade.kernel, said.upgrade.libraries) == (UBUNTU_NEW, "580.178.04")
        # The archive built the new branch for the new kernel: it would work after the reboot.
        assert codes(said.upgrade) == ["branch", "reload"]
        assert "from branch 535 to 580" in said.upgrade.reasons[0].text

    def test_leaks_through_holds_on_the_kernel_itself(self):
        names = (f"linux-image-{UBUNTU_OLD}", f"linux-headers-{UBUNTU_OLD}")
        said = on_ubuntu("ubuntu-24.04-hold-image", held(ubuntu(), *names))
        assert said.upgrade.kernels == (UBUNTU_NEW,)

    def test_leaks_through_a_hold_on_the_image_meta_and_loses_the_other_metas(self):
        said = on_ubuntu("ubuntu-24.04-hold-meta", held(ubuntu(), "linux-image-generic"))
        assert said.upgrade.kernels == (UBUNTU_NEW,)
        assert codes(said.upgrade) == ["branch", "reload", "meta-removed"]
        assert "removes linux-generic" in said.upgrade.reasons[-1].text

    def test_leaks_through_the_metas_of_the_modules(self):
        names = ("linux-generic", "linux-image-generic", "linux-headers-generic")
        said = on_ubuntu("ubuntu-24.04-hold-three", held(ubuntu(), *names))
        assert said.upgrade.kernels == (UBUNTU_NEW,)

    def test_leaves_the_kernel_once_all_four_are_held_and_breaks_on_the_driver_that_is_not(self):
        names = ("linux-generic", "linux-image-generic", "linux-headers-generic")
        both = held(ubuntu(), *names, "linux-modules-nvidia-535-server-generic")
        said = on_ubuntu("ubuntu-24.04-hold-four", both)
        assert (said.upgrade.kernels, said.upgrade.kernel) == ((), UBUNTU_OLD)
        # Libraries of 580 beside a module of 535.
        assert codes(said.upgrade) == ["version", "branch", "reload"]
        assert "module 535.161.08 does not match the libraries 580.178.04" in (
            said.upgrade.reasons[0].text
        )

    def test_takes_the_gpu_where_only_the_driver_is_held(self):
        names = ("nvidia-headless-no-dkms-535-server", "linux-modules-nvidia-535-server-generic")
        said = on_ubuntu("ubuntu-24.04-hold-driver", held(ubuntu(), *names))
        assert said.upgrade.libraries == "535.161.08"
        assert codes(said.upgrade) == ["no-module"]
        assert f"kernel {UBUNTU_NEW} comes and boots next" in said.upgrade.reasons[0].text
        assert any(note.startswith("kept back without a hold") for note in said.notes)

    def test_builds_by_dkms_where_headers_come_along(self):
        said = on_ubuntu("ubuntu-24.04-dkms", ubuntu(dkms=True))
        assert codes(said.upgrade) == ["branch", "reload"]

    def test_skips_dkms_where_they_do_not(self):
        said = on_ubuntu("ubuntu-24.04-dkms-no-headers", ubuntu(dkms=True))
        assert codes(said.upgrade) == ["no-headers", "no-module", "branch", "reload"]


class TestWhatHappensByItself:
    def test_is_off_without_unattended_upgrades(self):
        assert on_debian("debian-12-no-headers").unattended.verdict == "off"

    def test_takes_the_gpu_on_a_debian_as_it_is_set_up_by_default(self):
        said = forecast(
            debian(), DEBIAN_DRIVER, upgrade("debian-12-no-headers", "debian-12"), settings()
        )
        assert said.unattended == said.upgrade

    def test_takes_it_on_ubuntu_through_its_security_pocket(self):
        said = forecast(
            ubuntu(), UBUNTU_DRIVER, upgrade("ubuntu-24.04-prebuilt", "ubuntu-24.04"), settings()
        )
        assert said.unattended.verdict == "unsafe"
        assert said.unattended.kernels == (UBUNTU_NEW,)

    def test_is_nothing_where_the_blacklist_names_kernel_and_driver(self):
        ahead = upgrade("debian-12-no-headers", "debian-12")
        assert ahead.unattended is not None
        blacklist = ("linux-", "nvidia-", "libnvidia-", "libcuda1", "firmware-nvidia")
        spared = replace(ahead, unattended=replace(ahead.unattended, blacklist=blacklist))
        said = forecast(debian(), DEBIAN_DRIVER, spared, settings())
        assert (said.unattended.verdict, said.upgrade.verdict) == ("nothing", "unsafe")


class TestOtherTransactions:
    def after(self, *changes: Change, **picture: Any) -> Coming:
        ahead = Upgrade(True, changes, lists_age_s=60)
        return forecast(debian(**picture), DEBIAN_DRIVER, ahead, settings()).upgrade

    def test_that_touch_neither_kernel_nor_driver_are_nothing(self):
        libraries = Change("libssl3", "3.0.1", "3.0.2")
        tools = Change("nvidia-container-toolkit", "1.17", "1.18")
        firmware = Change("linux-firmware-nvidia-graphics", None, "2024")
        assert self.after(libraries, tools, firmware).verdict == "nothing"

    def test_that_renew_the_running_kernel_in_place_are_safe(self):
        said = self.after(Change(f"linux-image-{DEBIAN_OLD}", "6.1.176-1", "6.1.176-2"))
        assert (said.verdict, said.kernels) == ("safe", ())

    def test_that_remove_driver_packages_name_them(self):
        said = self.after(
            Change("libnvidia-ml1", "535", None), Change("nvidia-kernel-dkms", "535", None)
        )
        assert "driver-removed" in [reason.code for reason in said.reasons]
        assert "libnvidia-ml1, nvidia-kernel-dkms" in said.reasons[-1].text

    def test_that_apt_refuses_are_unsafe_and_quote_it(self):
        ahead = Upgrade(True, error="nvidia-smi : Depends: libnvidia-ml1 (= 535)")
        said = forecast(debian(), DEBIAN_DRIVER, ahead, settings()).upgrade
        assert (said.verdict, codes(said)) == ("unsafe", ["apt"])
        assert "libnvidia-ml1 (= 535)" in said.reasons[0].text

    def test_of_hosts_without_apt_are_unknown(self):
        said = forecast(debian(), DEBIAN_DRIVER, None, settings())
        assert (said.upgrade.verdict, said.safe) == ("unknown", True)
        assert "no apt-get here: what an upgrade would do is not known" in said.notes

    def test_bring_unsigned_modules_under_secure_boot(self):
        said = self.after(
            Change(f"linux-image-{DEBIAN_NEW}", None, "6.1.192-2"),
            Change(f"linux-headers-{DEBIAN_NEW}", None, "6.1.192-2"),
            secure_boot=True,
        )
        assert "unsigned" in [reason.code for reason in said.reasons]

    def test_with_modules_of_the_archive_are_signed_and_of_its_flavour(self):
        name = f"linux-modules-nvidia-535-server-open-{UBUNTU_NEW}"
        changes = (
            Change(f"linux-image-{UBUNTU_NEW}", None, "6.8.0-149.149"),
            Change(name, None, "6.8.0-149.149"),
        )
        picture = ubuntu(secure_boot=True)
        said = forecast(picture, UBUNTU_DRIVER, Upgrade(True, changes), settings())
        assert said.upgrade.verdict == "safe"
        closed = forecast(
            picture,
            UBUNTU_DRIVER,
            Upgrade(True, changes),
            settings(),
            allowed=frozenset({"proprietary"}),
        )
        assert codes(closed.upgrade) == ["flavour"]

    def test_that_update_the_driver_drop_it_where_headers_are_missing(self):
        bare = replace(debian().kernels[0], headers=False)
        said = self.after(
            Change("nvidia-kernel-dkms", "535.261.03-1", "535.309.01-0+deb12u1"),
            Change("libnvidia-ml1", "535.261.03-1", "535.309.01-0+deb12u1"),
            kernels=(bare,),
        )
        assert [reason.code for reason in said.reasons] == ["no-headers", "no-module", "reload"]


def test_old_or_missing_lists_are_told():
    def notes(seconds: int | None) -> str:
        ahead = replace(NOTHING, lists_age_s=seconds)
        return " ".join(forecast(debian(), DEBIAN_DRIVER, ahead, settings()).notes)

    assert notes(3600) == ""
    assert "10 days old" in notes(10 * 86_400)
    assert "no package lists" in notes(None)


def test_a_pin_that_is_switched_off_is_part_of_the_advice():
    ahead = upgrade("debian-12-no-headers")
    said = forecast(debian(), DEBIAN_DRIVER, ahead, settings(kernel={"pin": False}))
    assert all("set kernel.pin" in reason.mend for reason in said.upgrade.reasons)


def test_without_grub_the_newest_kernel_is_next():
    picture = debian(grub=Grub(False), next_boot=NextBoot(DEBIAN_OLD, "the newest installed"))
    said = on_debian("debian-12-no-headers", picture)
    assert said.upgrade.kernel == DEBIAN_NEW


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("535.309.01-0+deb12u1", "535.309.01"),
        ("535.161.08-0ubuntu2", "535.161.08"),
        ("1:580.65.06-1", "580.65.06"),
        ("580.178.04", "580.178.04"),
    ],
)
def test_a_version_without_its_packaging(version, said):
    assert upstream(version) == said


class TestTheTable:
    """What the command prints of a forecast."""

    def test_of_a_safe_host_says_why(self):
        said = Asked("gpu1", forecast(debian(), DEBIAN_DRIVER, NOTHING, settings()))
        assert cli._row(said) == ["gpu1", DEBIAN_OLD, "safe", "nothing", "first entry of grub.cfg"]
        assert cli._lines(said) == []

    def test_of_a_host_without_gpus_says_that(self):
        nobody = gpus("", gpus=())
        picture = debian(kernels=(), next_boot=NextBoot(None, "no kernel"))
        said = forecast(picture, nobody, NOTHING, settings(accelerator="cpu"))
        assert cli._row(Asked("cpu1", said)) == ["cpu1", "-", "safe", "nothing", "no GPU to lose"]

    def test_of_an_unsafe_host_has_a_line_for_every_reason_with_what_to_do(self):
        ahead = upgrade("debian-12-no-headers", "debian-12")
        said = Asked("gpu1", forecast(debian(), DEBIAN_DRIVER, ahead, settings()))
        row, lines = cli._row(said), cli._lines(said)
        assert row[:4] == ["gpu1", DEBIAN_OLD, "safe", "unsafe"]
        assert row[4].endswith("(and 2 more)")
        assert len(lines) == 3
        assert all(line.startswith("gpu1: unattended-upgrades: ") for line in lines)
        assert all("fleet apply --only" in line for line in lines)

    def test_of_a_host_that_could_not_be_asked_knows_its_name(self):
        gone: Asked[Forecast] = Asked("gone", None, "gone: cannot connect")
        assert cli._row(gone) == ["gone", "-", "-", "-", "could not be asked"]
        assert cli._document(gone) == {"name": "gone", "error": "gone: cannot connect"}

    def test_as_json_has_what_the_commands_documentation_names(self):
        ahead = upgrade("debian-12-no-headers")
        document = cli._document(
            Asked("gpu1", forecast(debian(), DEBIAN_DRIVER, ahead, settings()))
        )
        again = json.loads(json.dumps(document))
        assert set(again) == {
            *("name", "error", "safe", "gpu", "kernels"),
            *("reboot", "upgrade", "unattended", "notes"),
        }
        assert set(again["kernels"][0]) == {"release", "running", "next", "ok", "problems"}
        assert set(again["reboot"]) == {"verdict", "kernel", "why", "reasons"}
        assert set(again["upgrade"]) == {"verdict", "kernel", "kernels", "libraries", "reasons"}
        assert set(again["upgrade"]["reasons"][0]) == {"code", "text", "mend"}
        assert all(f'"{key}"' in str(cli.__doc__) for key in again)
