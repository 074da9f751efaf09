"""Everything that can be wrong with kernel, driver and demo: found, with what it was seen by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from gpu_hosts import (
    DEBIAN_NEW,
    DEBIAN_OLD,
    NOTHING,
    debian,
    gpus,
    held,
    module,
    package,
    settings,
    ubuntu,
    upgrade,
)

from gpufleet.demo.plan import Service
from gpufleet.driver.doctor import Finding, findings, wrong
from gpufleet.driver.picture import Gpu, Offer, Smi
from gpufleet.kernel.picture import Kernel, NextBoot
from gpufleet.upgrade.plan import Unattended

VERSION = "535.261.03"
WELL = Service(
    active="active",
    enabled=True,
    needs_reload=False,
    revision_on_disk="a1",
    revision_running="a1",
    health='{"status": "ok", "model": "pico"}',
)


def examine(
    kernels: Any = None,
    cards: Any = None,
    *,
    service: Any = WELL,
    ahead: Any = NOTHING,
    own: Any = None,
    **options: Any,
) -> tuple[Finding, ...]:
    return findings(
        kernels or debian(),
        cards or gpus(VERSION),
        service,
        ahead,
        own or settings(),
        **options,
    )


def the(code: str, found: tuple[Finding, ...]) -> Finding:
    """The one finding with this code."""
    (finding,) = [each for each in found if each.code == code]
    assert finding.evidence
    assert finding.mend
    return finding


def spoilt(**changes: Any) -> Any:
    """A Debian host whose one kernel is different."""
    return debian(kernels=(replace(debian().kernels[0], **changes),))


def test_a_host_where_all_is_well_has_no_findings():
    assert examine() == ()
    assert not wrong(examine())


class TestTheRunningKernel:
    def test_without_a_module_is_an_error_with_dkms_as_evidence(self):
        found = examine(spoilt(module=None, dkms=()), gpus(VERSION, loaded=""))
        finding = the("no-module", found)
        assert finding.severity == "error"
        assert finding.cause.startswith("the GPU does not work on the running kernel")
        assert f"modinfo -k {DEBIAN_OLD} nvidia finds none" in finding.evidence

    def test_without_headers_loses_its_module_at_the_next_driver_update(self):
        finding = the("no-headers-left", examine(spoilt(headers=False)))
        assert finding.severity == "warning"
        assert f"/lib/modules/{DEBIAN_OLD}/build/include" in finding.evidence

    @pytest.mark.parametrize(
        ("changes", "code", "evidence"),
        [
            ({"module": module("6.1.0-9-amd64", VERSION)}, "vermagic", "6.1.0-9-amd64"),
            ({"initrd_bytes": 0}, "no-initrd", f"/boot/initrd.img-{DEBIAN_OLD}"),
            ({"nouveau_in_initrd": True}, "nouveau", f"/boot/initrd.img-{DEBIAN_OLD}"),
        ],
    )
    def test_has_each_problem_of_the_verdict_with_the_value_seen(self, changes, code, evidence):
        assert evidence in the(code, examine(spoilt(**changes))).evidence

    def test_with_an_unsigned_module_under_secure_boot_asks_for_a_key(self):
        finding = the("unsigned", examine(debian(secure_boot=True)))
        assert finding.evidence == "signer none; Secure Boot on"
        assert "mokutil --import" in finding.mend

    def test_with_the_wrong_flavour_names_the_setting(self):
        finding = the("flavour", examine(allowed=frozenset({"open"})))
        assert finding.evidence == "licence NVIDIA"
        assert "driver.modules" in finding.mend

    def test_that_is_not_installed_is_said_once(self):
        found = examine(debian(running="6.18.0"))
        assert "6.18.0" in the("running-not-installed", found).evidence


class TestTheNextKernel:
    NEW = Kernel(DEBIAN_NEW, True, 1, False, module(DEBIAN_NEW, VERSION))

    def pending(self, kernel: Kernel) -> Any:
        return debian(
            kernels=(*debian().kernels, kernel),
            next_boot=NextBoot(DEBIAN_NEW, "first entry of grub.cfg"),
        )

    def test_that_works_is_a_note_and_nothing_wrong(self):
        found = examine(self.pending(self.NEW))
        assert the("reboot-pending", found).severity == "note"
        assert not wrong(found)

    def test_that_does_not_is_an_error_with_every_reason(self):
        bare = replace(self.NEW, module=None, headers=False)
        found = examine(self.pending(bare))
        assert [each.code for each in found] == ["no-headers", "no-module", "unsafe"]
        assert f"running {DEBIAN_OLD}, next {DEBIAN_NEW}" in the("unsafe", found).evidence

    def test_whose_build_failed_unseen_by_dpkg_says_so(self):
        why = "error: implicit declaration of function 'drm_gem_prime_handle_to_fd'"
        broken = replace(self.NEW, module=None, dkms_error=why)
        finding = the("dkms-failed", examine(self.pending(broken)))
        assert finding.severity == "error"
        assert "dpkg counts it as a success" in finding.cause
        assert finding.evidence == why
        assert "driver.branch" in finding.mend

    def test_whose_build_failed_as_dpkg_knows_is_found_by_both(self):
        broken = replace(self.NEW, module=None, dkms_error="error: x")
        picture = replace(self.pending(broken), audit=("nvidia-kernel-dkms",))
        found = examine(picture)
        assert "dpkg counts" not in the("dkms-failed", found).cause
        assert "nvidia-kernel-dkms" in the("half-configured", found).evidence

    def test_that_nothing_tells_is_a_warning(self):
        picture = debian(next_boot=NextBoot(None, "no grub.cfg"))
        assert the("next-unknown", examine(picture)).severity == "warning"


class TestTheGpus:
    def test_that_are_not_there(self):
        found = examine(cards=gpus("", gpus=(), smi=Smi(True), userland=VERSION, persistenced="x"))
        assert the("no-gpu", found).severity == "error"

    def test_of_which_one_fell_off_the_bus(self):
        seen = (("00000000:17:00.0", "Tesla T4", 15360),)
        found = examine(cards=gpus(VERSION, smi=Smi(True, seen, VERSION)))
        finding = the("fell-off-the-bus", found)
        assert finding.evidence == "nvidia-smi lists 1 of 2; missing: 0000:65:00.0"
        assert "Xid" in finding.mend

    def test_of_which_one_is_gone_from_the_bus_itself(self):
        cards = gpus(VERSION)
        left = replace(cards, gpus=cards.gpus[:1], lost=("0000:65:00.0",))
        left = replace(left, smi=replace(left.smi, gpus=left.smi.gpus[:1]))
        finding = the("fell-off-the-bus", examine(cards=left))
        assert finding.evidence == "nvidia-smi lists 1 of 2; missing: 0000:65:00.0"

    def test_that_nouveau_has(self):
        cards = tuple(replace(card, driver="nouveau") for card in gpus(VERSION).gpus)
        found = examine(cards=gpus(VERSION, gpus=cards, nouveau_loaded=True, loaded=""))
        assert "nouveau drives 0000:17:00.0" in the("nouveau-bound", found).evidence

    def test_that_a_virtual_machine_has(self):
        cards = (Gpu("0000:17:00.0", "1eb8", "vfio-pci"), gpus(VERSION).gpus[1])
        found = examine(cards=gpus(VERSION, gpus=cards))
        assert the("other-driver", found).evidence == "0000:17:00.0: vfio-pci"

    def test_whose_module_is_not_loaded(self):
        failed = Smi(True, error="NVIDIA-SMI has failed because it couldn't communicate")
        found = examine(cards=gpus(VERSION, loaded="", smi=failed, devices=()))
        assert [each.code for each in found] == ["not-loaded"]
        assert "modprobe nvidia" in found[0].mend

    def test_whose_libraries_are_newer_than_the_module(self):
        failed = Smi(True, error="Failed to initialize NVML: Driver/library version mismatch")
        cards = gpus(VERSION, userland="535.309.01", smi=failed, holders=("python (pid 7)",))
        found = examine(spoilt(module=module(DEBIAN_OLD, "535.309.01")), cards)
        finding = the("mismatch", found)
        expected = f"loaded {VERSION}, libraries 535.309.01; in use by python (pid 7)"
        assert finding.evidence == expected
        assert "smi" not in [each.code for each in found]

    def test_whose_module_on_the_disk_is_newer(self):
        cards = gpus(VERSION, userland="")
        found = examine(spoilt(module=module(DEBIAN_OLD, "535.309.01")), cards)
        assert the("loaded-old", found).severity == "warning"

    def test_that_nvidia_smi_does_not_reach_for_a_reason_of_its_own(self):
        failed = Smi(True, error="Unable to determine the device handle for GPU0: Unknown Error")
        assert the("smi", examine(cards=gpus(VERSION, smi=failed))).evidence == failed.error
        missing = Smi(False)
        assert the("no-smi", examine(cards=gpus(VERSION, smi=missing))).severity == "error"

    def test_without_unified_memory(self):
        found = examine(cards=gpus(VERSION, devices=("nvidia0", "nvidiactl")))
        assert "no /dev/nvidia-uvm beside nvidia0, nvidiactl" in the("no-uvm", found).evidence

    def test_whose_persistence_daemon_does_not_run(self):
        found = examine(cards=gpus(VERSION, persistenced="failed"))
        assert the("persistenced", found).evidence == "nvidia-persistenced.service is failed"


class TestNvSwitches:
    def test_need_the_fabric_manager(self):
        found = examine(cards=gpus(VERSION, nvswitch=True))
        assert "802" in the("fabricmanager", found).cause

    def test_need_it_in_exactly_the_drivers_version(self):
        cards = gpus(
            VERSION, nvswitch=True, fabricmanager="active", fabricmanager_version="535.309.01-1"
        )
        finding = the("fabricmanager-version", examine(cards=cards))
        assert finding.evidence == f"fabric manager 535.309.01-1, driver {VERSION}"
        same = replace(cards, fabricmanager_version=f"{VERSION}-1")
        assert examine(cards=same) == ()

    def test_are_what_a_failing_fabric_manager_lacks(self):
        found = examine(cards=gpus(VERSION, fabricmanager="failed"))
        assert the("fabricmanager-not-needed", found).severity == "warning"


class TestThePackages:
    def test_that_are_half_configured(self):
        half = package("nvidia-kernel-dkms", VERSION, status="half-configured")
        picture = debian(packages=(*debian().packages[:-4], half))
        finding = the("half-configured", examine(picture))
        assert finding.evidence == "dpkg --audit: nvidia-kernel-dkms (half-configured)"
        assert "dpkg --configure -a" in finding.mend

    def test_whose_dependencies_are_broken(self):
        complaint = "nvidia-smi : Depends: libnvidia-ml1 (= 535) but it is not installed"
        assert complaint in the("broken", examine(debian(broken=complaint))).evidence

    def test_of_a_run_file_beside_the_distributions(self):
        finding = the("runfile-and-packages", examine(debian(runfile=True)))
        assert "/usr/bin/nvidia-uninstall beside nvidia-kernel-dkms" in finding.evidence

    def test_of_a_run_file_alone_and_another_source(self):
        bare = debian(runfile=True, packages=())
        assert the("runfile", examine(bare)).severity == "warning"
        assert examine(bare, own=settings(driver={"source": "runfile"})) == ()

    def test_of_several_origins(self):
        came = (("libcuda1", "NVIDIA"), ("nvidia-kernel-dkms", "Debian"), ("libssl3", "Else"))
        found = examine(ahead=replace(NOTHING, came_from=came))
        finding = the("mixed-origins", found)
        assert finding.evidence == "NVIDIA: libcuda1; Debian: nvidia-kernel-dkms"

    def test_of_several_versions(self):
        libraries = (
            package("libnvidia-ml1", "535.261.03-1"),
            package("libnvidia-compute", "570.1"),
        )
        found = examine(debian(packages=libraries))
        assert the("mixed-versions", found).severity == "error"

    def test_that_only_lead_to_a_newer_branch_are_no_second_version(self):
        names = ("libnvidia-compute-535-server", "libnvidia-compute-580-server")
        versions = ("535.309.01-0ubuntu0.24.04.2", "580.178.04-0ubuntu0.24.04.1")
        pair = tuple(map(package, names, versions))
        found = examine(ubuntu(packages=pair), gpus("535.161.08"))
        assert "mixed-versions" not in [each.code for each in found]

    def test_whose_name_means_another_branch_today(self):
        offers = (
            Offer("nvidia-utils-535-server", "535.309.01", "580"),
            Offer("nvidia-headless-570-server", "570.1", "580"),
        )
        cards = gpus("535.161.08", offers=offers)
        found = examine(ubuntu(), cards)
        assert the("branch-moved", found).evidence == "nvidia-utils-535-server brings 580"
        assert examine(held(ubuntu(), "nvidia-utils-535-server"), cards) == ()

    def test_being_changed_now_is_a_note(self):
        found = examine(debian(apt_lock="unattended-upgr (pid 812)"))
        assert not wrong(found)
        assert the("apt-busy", found).evidence == "unattended-upgr (pid 812)"

    def test_in_a_full_boot(self):
        finding = the("boot-full", examine(debian(boot_free_kib=50 * 1024)))
        assert finding.evidence == "50 MiB free, 1 kernel"


class TestThePin:
    def test_that_drifted(self):
        picture = debian(pinned="6.1.0-49-amd64")
        finding = the("pin-drift", examine(picture))
        assert finding.evidence == f"pinned 6.1.0-49-amd64, running {DEBIAN_OLD}"
        assert "kernel.drift" in finding.mend

    def test_of_names_that_are_not_installed_protects_nothing(self):
        picture = replace(debian(), holds=frozenset({"nvidia-driver-535", "curl"}))
        finding = the("idle-holds", examine(picture))
        assert finding.evidence == "apt-mark showhold: nvidia-driver-535"
        assert finding.mend == "on the host: apt-mark unhold nvidia-driver-535"

    def test_that_is_not_in_force_has_a_finding_for_every_line_of_its_audit(self):
        lines = (
            "linux-image-amd64 is not held and brings the next kernel in: apply again",
            "GRUB boots 6.1.0-9-amd64 by default: run update-grub",
        )
        pinned = debian(pinned=DEBIAN_OLD)
        found = [f for f in examine(pinned, pin=lines, apply="fleet apply") if f.code == "pin"]
        assert [f.evidence for f in found] == [line.partition(": ")[0] for line in lines]
        assert [f.mend for f in found] == ["fleet apply --only kernel", "run update-grub"]
        off = settings(kernel={"pin": False})
        assert examine(pinned, pin=lines, own=off) == ()

    def test_that_was_never_set_is_one_finding(self):
        lines = ("linux-image-amd64 is not held: apply again", "a: b", "c: d")
        finding = the("not-pinned", examine(pin=lines))
        assert finding.evidence == "linux-image-amd64 is not held and 2 more"

    def test_leaks_through_unattended_upgrades(self):
        itself = Unattended(True, (), (), reboots=True)
        found = examine(ahead=replace(NOTHING, unattended=itself))
        assert "linux-image-amd64" in the("unattended", found).evidence
        assert "Automatic-Reboot" in the("unattended-reboot", found).evidence

    def test_does_not_where_holds_or_the_blacklist_keep_everything(self):
        names = [each.name for each in debian().packages]
        quiet = Unattended(True, (), (), reboots=False)
        assert examine(held(debian(), *names), ahead=replace(NOTHING, unattended=quiet)) == ()
        blacklist = ("linux-", "nvidia-", "libnvidia-", "libcuda1")
        spared = replace(NOTHING, unattended=replace(quiet, blacklist=blacklist))
        assert examine(ahead=spared) == ()


class TestTheNextUpgrade:
    def test_that_takes_the_gpu_away_is_a_warning_for_each_reason(self):
        found = examine(ahead=upgrade("debian-12-no-headers"))
        codes = [each.code for each in found]
        assert codes == ["upgrade-no-headers", "upgrade-no-module", "upgrade-reload"]
        assert "apt-get dist-upgrade" in found[0].cause

    def test_that_comes_by_itself_says_so(self):
        found = examine(ahead=upgrade("debian-12-no-headers", "debian-12"))
        assert "unattended-upgrades" in the("upgrade-no-module", found).cause

    def test_of_lists_that_are_old_is_a_note(self):
        found = examine(ahead=replace(NOTHING, lists_age_s=20 * 86_400))
        assert the("stale-lists", found).evidence == "20 days old"
        assert not wrong(found)


class TestTheDemo:
    @pytest.mark.parametrize(
        ("changes", "code", "evidence"),
        [
            ({"active": "failed", "health": ""}, "demo-down", "failed"),
            ({"health": '{"status": "failed", "error": "CUDA error 802"}'}, "demo-ill", "802"),
            ({"health": "<html>"}, "demo-ill", "no answer"),
            ({"revision_running": "a0"}, "demo-old", "running a0, on disk a1"),
            ({"enabled": False}, "demo-not-enabled", "not enabled"),
        ],
    )
    def test_that_is_not_well(self, changes, code, evidence):
        assert evidence in the(code, examine(service=replace(WELL, **changes))).evidence

    def test_that_is_not_installed(self):
        none = Service("inactive", False, False, None, None)
        found = examine(service=none, apply="fleet apply -i x")
        assert [each.code for each in found] == ["no-demo"]
        assert found[0].mend == "fleet apply -i x"


def test_a_host_without_gpus_is_judged_by_its_packages_and_demo():
    cpu = settings(accelerator="cpu")
    nobody = gpus("", gpus=(), smi=Smi(False), loaded="", persistenced="absent", devices=())
    bare = debian(kernels=(), next_boot=NextBoot(None, "no kernel"), audit=("curl",))
    found = examine(bare, nobody, own=cpu, ahead=upgrade("debian-12-no-headers"))
    assert [each.code for each in found] == ["half-configured"]


def test_errors_come_first_and_notes_last():
    picture = debian(apt_lock="apt (pid 3)", boot_free_kib=1024, broken="x")
    severities = [each.severity for each in examine(picture)]
    assert severities == ["error", "warning", "note"]
