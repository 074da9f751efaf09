"""The driver that a host gets: one that fits, with the reasons, or every reason why none does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from gpu_hosts import DEBIAN_OLD, UBUNTU_NEW, UBUNTU_OLD, debian, module, package, ubuntu

from gpufleet import catalog
from gpufleet.driver.picture import Gpu, GpuPicture, Offer, Smi
from gpufleet.driver.plan import (
    Choice,
    Refusal,
    allowed,
    choose,
    installed_branch,
    kernel_packages,
)
from gpufleet.kernel.picture import KernelPicture, NextBoot, Package
from gpufleet.settings import Driver

K80, P40, V100, T4, A100 = "102d", "1b38", "1db6", "1eb8", "20b5"
H100, L4, GH200, B200, B300 = "2330", "27b8", "2342", "2901", "3182"
BOTH = frozenset({"open", "proprietary"})


def cards(*devices: str, **changes: Any) -> GpuPicture:
    """A host with these GPUs and no driver."""
    picture = GpuPicture(
        gpus=tuple(Gpu(f"0000:{slot:02x}:00.0", id, "") for slot, id in enumerate(devices, 1)),
        smi=Smi(False),
        loaded="",
        userland="",
        nouveau_loaded=False,
        refcount=0,
        holders=(),
        nvswitch=False,
        persistenced="absent",
        fabricmanager="absent",
        fabricmanager_version="",
        devices=(),
    )
    return replace(picture, **changes)


def bare(picture: KernelPicture, **changes: Any) -> KernelPicture:
    """The same host before any driver."""
    kernels = tuple(replace(one, module=None, dkms=()) for one in picture.kernels)
    packages = tuple(one for one in picture.packages if "nvidia" not in one.name)
    return replace(picture, kernels=kernels, packages=packages, **changes)


DEBIAN, UBUNTU = bare(debian()), bare(ubuntu())
RHEL = replace(DEBIAN, family="rhel", os="rocky", os_version="9.4", packages=())
TENCENT = replace(DEBIAN, family="other", os="tencentos", os_version="3.1", packages=())


def chosen(
    gpus: GpuPicture, kernels: KernelPicture = UBUNTU, cuda: str | None = "13.0", **driver: Any
) -> Choice:
    choice = choose(Driver(**driver), kernels, gpus, catalog.drivers(), cuda)
    assert isinstance(choice, Choice), choice
    return choice


def refused(
    gpus: GpuPicture, kernels: KernelPicture = UBUNTU, cuda: str | None = "13.0", **driver: Any
) -> str:
    """The one finding, which says what to do after its last colon."""
    choice = choose(Driver(**driver), kernels, gpus, catalog.drivers(), cuda)
    assert isinstance(choice, Refusal), choice
    (line,) = choice.findings
    assert "\n" not in line
    assert line.rpartition(": ")[2]
    return line


class TestFlavours:
    @pytest.mark.parametrize(
        ("devices", "expected"),
        [
            ((V100,), {"proprietary"}),
            ((P40, V100), {"proprietary"}),
            ((T4, L4, H100), BOTH),
            ((B200,), {"open"}),
            ((GH200,), {"open"}),
            ((V100, A100), {"proprietary"}),
            ((A100, B200), {"open"}),
            ((V100, B200), set()),
            ((), BOTH),
        ],
    )
    def test_are_what_every_card_takes(self, devices: tuple[str, ...], expected: set[str]):
        assert allowed(cards(*devices), catalog.drivers()) == expected

    def test_a_card_newer_than_the_catalogue_is_taken_as_the_newest(self):
        assert allowed(cards("f00d"), catalog.drivers()) == {"open"}
        choice = chosen(cards("f00d"))
        assert "0000:01:00.0 (10de:f00d) is not in catalog/drivers.yaml" in choice.reasons[0]

    def test_of_cards_that_share_none_are_refused_and_the_cards_named(self):
        line = refused(cards(V100, B200), source="nvidia")
        assert "Volta GPU 0000:01:00.0 takes proprietary" in line
        assert "Blackwell GPU 0000:02:00.0 takes open" in line
        assert line.endswith("put them into different hosts")

    def test_a_setting_that_a_card_does_not_take_is_refused(self):
        line = refused(cards(A100, V100), modules="open")
        assert line == (
            "Volta GPU 0000:02:00.0 does not take open modules: set driver.modules to auto"
        )
        assert "Blackwell" in refused(cards(B200), modules="proprietary")

    def test_a_setting_that_they_take_is_followed(self):
        assert chosen(cards(T4), modules="proprietary").flavour == "proprietary"
        assert chosen(cards(T4), modules="open").flavour == "open"

    def test_auto_takes_what_is_advised_for_the_branch(self):
        assert chosen(cards(T4)).flavour == "open"
        assert chosen(cards(T4), DEBIAN, None).flavour == "proprietary"

    def test_auto_leaves_what_is_installed_and_fits(self):
        old = ubuntu()
        driver = module(UBUNTU_OLD, "580.95.05")
        kernels = replace(old, kernels=(replace(old.kernels[0], module=driver),))
        picture = cards(T4, userland="580.95.05")
        assert chosen(picture, kernels).flavour == "proprietary"

    def test_a_branch_that_dropped_one_has_the_other(self):
        assert chosen(cards(T4), branch="615").flavour == "open"
        assert "branch 615 has none" in refused(cards(T4), branch="615", modules="proprietary")


class TestTheBranch:
    def test_is_the_long_lived_one_that_the_archive_has(self):
        choice = chosen(cards(T4))
        assert choice.branch == "580"
        assert "branch 580 (lts): the best that ubuntu 24.04's archive has" in choice.reasons

    def test_is_what_the_settings_say(self):
        assert chosen(cards(T4), branch="595").branch == "595"

    def test_that_is_installed_and_fits_stays(self):
        picture = cards(T4, userland="595.45.04")
        assert chosen(picture).branch == "595"

    def test_that_is_installed_and_does_not_fit_is_left_with_the_reason(self):
        picture = cards(T4, userland="535.161.08")
        choice = chosen(picture, ubuntu())
        assert choice.branch == "580"
        assert any("branch 535 is installed: CUDA 13.0" in reason for reason in choice.reasons)

    def test_that_the_archive_moved_on_is_not_asked_for_again(self):
        """Its packages depend on 580's today: asking for one would bring another branch."""
        picture = cards(T4, userland="535.161.08", loaded="535.161.08")
        choice = chosen(picture, ubuntu(), cuda="12.2")
        assert choice.branch == "535"
        installed = {one.name for one in ubuntu().packages}
        assert set(choice.packages) <= installed
        assert any("to move on, set driver.branch to 580" in reason for reason in choice.reasons)

    def test_that_the_archive_gives_another_for_is_refused_with_its_name(self):
        offers = (
            Offer("nvidia-headless-no-dkms-535-server", "535.309.01-0ubuntu0", "580"),
            Offer("nvidia-headless-no-dkms-580-server", "580.178.04-0ubuntu0"),
        )
        line = refused(cards(T4, offers=offers), cuda="12.2", branch="535")
        assert line == (
            "driver.branch 535: ubuntu 24.04's archive gives 580 to who asks for it: set "
            "driver.branch to 580, or driver.source to nvidia"
        )

    def test_that_nobody_has_is_refused_with_what_there_is(self):
        line = refused(cards(T4), cuda="12.2", branch="545")
        assert "ubuntu 24.04's archive has 580, 595, 615" in line

    def test_of_the_hosts_own_sources_goes_before_the_catalogues(self):
        offers = (Offer("nvidia-headless-no-dkms-595-server", "595.91.07-0ubuntu0"),)
        assert chosen(cards(T4, offers=offers)).branch == "595"
        moved_on = (Offer("nvidia-kernel-dkms", "580.95.05-1"),)
        assert chosen(cards(T4, offers=moved_on), DEBIAN).branch == "580"

    @pytest.mark.parametrize(
        ("cuda", "floor"), [("11.8", 450), ("12.4", 525), ("13.0", 580), (None, 0)]
    )
    def test_meets_the_floor_of_the_environments_cuda(self, cuda: str | None, floor: int):
        for source in ("distribution", "nvidia"):
            assert int(chosen(cards(T4), cuda=cuda, source=source).branch) >= floor

    def test_for_a_cuda_that_nobody_listed_is_refused(self):
        line = refused(cards(T4), cuda="10.2")
        assert line.startswith("CUDA 10.2 is not in catalog/drivers.yaml: set driver.cuda to one")

    def test_below_the_floor_is_refused(self):
        line = refused(cards(T4), branch="570", source="nvidia")
        assert line == (
            "driver.branch 570: CUDA 13.0 of the environment needs driver 580 or later, not 570: "
            "set it to 580 or later"
        )

    def test_of_debian_is_one_and_the_way_out_is_named(self):
        assert refused(cards(T4), DEBIAN) == (
            "debian 12's archive has driver 535: CUDA 13.0 of the environment needs driver 580 or "
            "later, not 535: set driver.source to nvidia, which has 580"
        )
        assert chosen(cards(T4), DEBIAN, "12.2").branch == "535"
        trixie = replace(DEBIAN, os_version="13")
        assert chosen(cards(T4), trixie, "12.4").branch == "550"

    def test_below_the_pair_works_and_says_so(self):
        choice = chosen(cards(T4), DEBIAN, "12.8")
        assert any("older than 570.26" in reason for reason in choice.reasons)
        same = chosen(cards(T4, userland="580.60.01"))
        assert any("580.60.01 is older than 580.65.06" in reason for reason in same.reasons)
        newer = chosen(cards(T4, userland="580.95.05"))
        assert not any("older than" in reason for reason in newer.reasons)

    def test_that_gets_no_fixes_says_so(self):
        choice = chosen(cards(T4), DEBIAN, "12.2")
        assert "branch 535 gets no fixes since 2026-06: plan to move on" in choice.reasons

    @pytest.mark.parametrize(
        ("device", "branch", "words"),
        [
            (V100, "595", "Volta GPU 0000:01:00.0 is driven up to 580, not by 595"),
            (B300, "570", "Blackwell Ultra GPU 0000:01:00.0 needs driver 580 or later, not 570"),
            (H100, "470", "Hopper GPU 0000:01:00.0 needs driver 525 or later, not 470"),
        ],
    )
    def test_that_a_card_is_not_driven_by_is_refused(self, device: str, branch: str, words: str):
        line = refused(cards(device), cuda=None, source="nvidia", branch=branch)
        assert words in line

    def test_for_cards_that_no_driver_takes_together_there_is_none(self):
        line = refused(cards(K80, V100), cuda="13.0", source="nvidia")
        assert "Kepler GPU 0000:01:00.0 is driven up to 470 and CUDA 13.0" in line
        assert line.endswith("use another GPU, or set accelerator to cpu")
        line = refused(cards(K80, H100), cuda=None, source="nvidia")
        assert "no driver takes both" in line

    def test_of_volta_ends_where_cuda_13_begins(self):
        assert chosen(cards(V100)).branch == "580"

    def test_every_finding_of_a_setting_comes_at_once(self):
        choice = choose(
            Driver(branch="535", modules="open"), UBUNTU, cards(V100), catalog.drivers(), "13.0"
        )
        assert isinstance(choice, Refusal)
        assert len(choice.findings) == 2


class TestUbuntusPackages:
    def test_are_ready_made_modules_for_exactly_the_kernels_in_use(self):
        choice = chosen(cards(T4))
        assert choice.prebuilt
        assert choice.packages == (
            "nvidia-headless-no-dkms-580-server-open",
            "nvidia-utils-580-server",
            "libnvidia-compute-580-server",
            "nvidia-compute-utils-580-server",
        )
        assert kernel_packages(choice, UBUNTU, UBUNTU_NEW) == (
            f"linux-headers-{UBUNTU_NEW}",
            f"linux-modules-nvidia-580-server-open-{UBUNTU_NEW}",
        )

    def test_have_no_open_in_their_names_for_the_proprietary_flavour(self):
        choice = chosen(cards(V100))
        assert choice.packages[0] == "nvidia-headless-no-dkms-580-server"
        wanted = f"linux-modules-nvidia-580-server-{UBUNTU_OLD}"
        assert kernel_packages(choice, UBUNTU, UBUNTU_OLD)[1] == wanted

    def test_are_dkms_where_the_archive_has_no_module_for_one_of_the_kernels(self):
        name = "linux-modules-nvidia-580-server-open"
        offers = (
            Offer("nvidia-headless-no-dkms-580-server-open", "580.178.04-0ubuntu0"),
            Offer(f"{name}-{UBUNTU_NEW}", "6.8.0-149.149"),
        )
        choice = chosen(cards(T4, offers=offers))
        assert not choice.prebuilt
        assert "nvidia-dkms-580-server-open" in choice.packages
        assert f"DKMS: no ready-made module for kernel {UBUNTU_OLD}" in choice.reasons
        assert kernel_packages(choice, UBUNTU, UBUNTU_OLD) == (f"linux-headers-{UBUNTU_OLD}",)
        new = replace(UBUNTU, running=UBUNTU_NEW, next_boot=NextBoot(UBUNTU_NEW, ""))
        assert chosen(cards(T4, offers=offers), new).prebuilt

    def test_are_dkms_for_a_kernel_that_is_not_canonicals(self):
        own = replace(UBUNTU, running="6.8.0-31-own", next_boot=NextBoot(None, ""))
        assert not chosen(cards(T4), own).prebuilt

    def test_stay_dkms_where_that_is_installed(self):
        dkms = ubuntu(dkms=True)
        packages = (*dkms.packages, package("nvidia-dkms-580-server-open", "580.95.05"))
        assert not chosen(cards(T4), replace(dkms, packages=packages)).prebuilt


class TestOtherPackages:
    @pytest.mark.parametrize("source", ["nvidia", "nvidia-cn"])
    def test_of_nvidias_repository_are_its_metas(self, source: str):
        assert chosen(cards(T4), DEBIAN, source=source).packages == ("nvidia-open-580",)
        assert chosen(cards(V100), source=source).packages == ("cuda-drivers-580",)

    def test_of_debian_have_no_desktop(self):
        choice = chosen(cards(T4), DEBIAN, None)
        assert choice.packages == (
            "nvidia-smi",
            "libcuda1",
            "libnvidia-ml1",
            "libnvidia-cfg1",
            "nvidia-persistenced",
            "nvidia-modprobe",
            "nvidia-kernel-dkms",
        )
        assert kernel_packages(choice, DEBIAN, DEBIAN_OLD) == (f"linux-headers-{DEBIAN_OLD}",)
        opened = chosen(cards(T4), DEBIAN, None, modules="open")
        assert opened.packages[-1] == "nvidia-open-kernel-dkms"

    @pytest.mark.parametrize(
        ("version", "headers"),
        [("8.10", "kernel-devel-"), ("9.4", "kernel-devel-matched-"), ("10", "kernel-devel-match")],
    )
    def test_of_the_rhel_family_match_the_very_kernel(self, version: str, headers: str):
        release = "5.14.0-503.11.1.el9_5.x86_64"
        kernels = replace(RHEL, os_version=version)
        choice = chosen(cards(H100), kernels, source="nvidia")
        assert choice.packages == (
            "nvidia-driver-cuda",
            "nvidia-persistenced",
            "kmod-nvidia-open-dkms",
        )
        (name,) = kernel_packages(choice, kernels, release)
        assert name.startswith(headers)
        assert name.endswith(release)

    def test_of_a_distribution_that_is_not_known_are_refused(self):
        line = refused(cards(T4), TENCENT)
        assert line.startswith("tencentos 3.1 has no driver packages that are known here: ")
        assert "runfile" in line

    def test_a_run_file_is_for_any(self):
        name = "/files/NVIDIA-Linux-x86_64-580.95.05.run"
        choice = chosen(cards(T4), TENCENT, source="runfile", runfile=name)
        assert choice.branch == "580"
        assert "dkms" in choice.packages
        assert kernel_packages(choice, TENCENT, "5.4.119-19.0009.28") == ()

    @pytest.mark.parametrize(
        ("driver", "words"),
        [
            ({}, "driver.runfile is not set"),
            ({"runfile": "driver.run"}, "its version is not in its name"),
            ({"runfile": "NVIDIA-Linux-aarch64-580.95.05.run"}, "its version is not in its name"),
            ({"runfile": "NVIDIA-Linux-x86_64-535.104.05.run"}, "give a file of 580 or later"),
            (
                {"runfile": "NVIDIA-Linux-x86_64-580.95.05.run", "branch": "595"},
                "driver.runfile is of branch 580",
            ),
        ],
    )
    def test_a_run_file_that_does_not_fit_is_refused(self, driver: dict[str, str], words: str):
        assert words in refused(cards(T4), source="runfile", **driver)


class TestPresent:
    def test_takes_what_is_there_and_installs_nothing(self):
        picture = cards(T4, userland="580.95.05", loaded="580.95.05")
        choice = chosen(picture, TENCENT, source="present")
        assert (choice.branch, choice.packages) == ("580", ())

    def test_is_refused_where_nothing_is(self):
        assert refused(cards(T4), source="present").startswith(
            "driver.source is present and there is no driver: "
        )

    def test_is_refused_where_it_does_not_fit(self):
        picture = cards(T4, userland="535.161.08")
        line = refused(picture, ubuntu(), source="present")
        assert line.startswith("the driver that is present: CUDA 13.0 of the environment needs ")
        assert line.endswith("install 580 or later, or set driver.source")


class TestSecureBoot:
    def test_takes_the_distributions_signed_modules(self):
        assert chosen(cards(H100), replace(UBUNTU, secure_boot=True)).prebuilt

    def test_refuses_what_nobody_signs(self):
        line = refused(cards(H100), replace(UBUNTU, secure_boot=True), source="nvidia")
        assert "set driver.source to distribution, whose modules are signed" in line
        line = refused(cards(H100), replace(DEBIAN, secure_boot=True), None)
        assert line == (
            "Secure Boot is on and no key that DKMS could sign with is enrolled: enrol one at the "
            "host's console (mokutil --import), or turn Secure Boot off"
        )

    def test_takes_dkms_where_its_key_is_enrolled(self):
        keys = ("Debian Secure Boot CA", "gpu1 Secure Boot Module Signature key")
        enrolled = replace(DEBIAN, secure_boot=True, trusted_signers=keys)
        assert not chosen(cards(T4), enrolled, None).prebuilt
        others = replace(DEBIAN, secure_boot=True, trusted_signers=keys[:1])
        assert "Secure Boot" in refused(cards(T4), others, None)


class TestNvswitches:
    def test_bring_the_fabric_manager_of_the_branch(self):
        choice = chosen(cards(H100, nvswitch=True))
        assert choice.fabric_manager
        assert choice.packages[-1] == "nvidia-fabricmanager-580"
        assert not chosen(cards(H100)).fabric_manager

    def test_on_debian_need_another_source(self):
        line = refused(cards(A100, nvswitch=True), DEBIAN, None)
        assert line == (
            "the NVSwitches of this host need the fabric manager, which debian 12's archive does "
            "not have: set driver.source to nvidia"
        )
        there = cards(A100, nvswitch=True, fabricmanager="active")
        assert chosen(there, DEBIAN, None).fabric_manager

    def test_of_blackwell_need_the_subnet_manager_too(self):
        picture = cards(B200, nvswitch=True)
        assert chosen(picture, source="nvidia").packages[-1] == "nvlsm"
        assert "nvlsm" in refused(picture)

    def test_beside_a_driver_that_is_present_must_have_theirs(self):
        picture = cards(H100, nvswitch=True, userland="580.95.05")
        line = refused(picture, source="present")
        assert line.endswith("install nvidia-fabricmanager in the driver's version")


def test_a_host_without_a_gpu_gets_none():
    assert "no NVIDIA GPU on the PCI bus" in refused(cards())


@pytest.mark.parametrize(
    ("gpus", "packages", "branch"),
    [
        (cards(T4), (), ""),
        (cards(T4, userland="535.161.08"), (), "535"),
        (cards(T4, loaded="470.256.02"), (), "470"),
        (
            cards(T4),
            (
                Package(
                    "nvidia-smi", "535.261.03-1", "nvidia-graphics-drivers", "install", "installed"
                ),
            ),
            "535",
        ),
        (
            cards(T4),
            (
                Package(
                    "nvidia-smi", "535.261.03-1", "nvidia-graphics-drivers", "install", "unpacked"
                ),
            ),
            "",
        ),
    ],
)
def test_the_branch_that_is_there(gpus: GpuPicture, packages: tuple[Package, ...], branch: str):
    assert installed_branch(replace(DEBIAN, packages=packages), gpus) == branch
