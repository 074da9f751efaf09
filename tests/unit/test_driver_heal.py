"""Re-apply after a kernel upgrade: what is decided for every state, and what people are told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gpufleet import settings
from gpufleet.driver import files, heal, sources
from gpufleet.driver.heal import Decision, Step
from gpufleet.driver.picture import Gpu, GpuPicture, Smi
from gpufleet.driver.plan import Choice, runfile_version
from gpufleet.kernel.picture import (
    Grub,
    Kernel,
    KernelPicture,
    Module,
    NextBoot,
    Package,
)

OLD, NOW, NEW = "6.1.0-40-amd64", "6.1.0-41-amd64", "6.1.0-42-amd64"
VERSION = "535.247.01"


def module(release: str, version: str = VERSION, **changes: Any) -> Module:
    given = Module("nvidia-current", version, f"{release} SMP preempt", "Dual MIT/GPL", "")
    return replace(given, **changes)


def kernel(release: str, *, built: bool = True, **changes: Any) -> Kernel:
    """A kernel that works, or one whose module is still to be built."""
    given = Kernel(release, True, 40 << 20, False, module(release) if built else None)
    return replace(given, **changes)


def package(name: str, version: str = f"{VERSION}-1", **changes: Any) -> Package:
    return replace(
        Package(name, version, "nvidia-graphics-drivers", "install", "installed"), **changes
    )


def entry(release: str) -> tuple[str, str]:
    return f"gnulinux-advanced-u>gnulinux-{release}-advanced-u", release


def kernels(*installed: Kernel, boots: str = NOW, **changes: Any) -> KernelPicture:
    """A Debian host that runs NOW."""
    given = KernelPicture(
        family="debian",
        os="debian",
        os_version="12",
        running=NOW,
        boot_id="b",
        kernels=installed,
        next_boot=NextBoot(boots, "first entry of grub.cfg"),
        grub=Grub(True, "0", entries=tuple(entry(one.release) for one in installed)),
        boot_free_kib=1 << 20,
        secure_boot=False,
        packages=(package("nvidia-kernel-dkms"), package("nvidia-smi")),
        holds=frozenset(),
    )
    return replace(given, **changes)


GPUS = GpuPicture(
    gpus=(Gpu("0000:17:00.0", "20b5", "nvidia"),),
    smi=Smi(True, (("0000:17:00.0", "NVIDIA A100", 81920),), VERSION),
    loaded=VERSION,
    userland=VERSION,
    nouveau_loaded=False,
    refcount=0,
    holders=(),
    nvswitch=False,
    persistenced="active",
    fabricmanager="absent",
    fabricmanager_version="",
    devices=("nvidia-uvm", "nvidia0", "nvidiactl"),
)
CHOICE = Choice(
    source="distribution",
    branch="535",
    flavour="open",
    prebuilt=False,
    packages=("nvidia-kernel-dkms", "nvidia-smi"),
    fabric_manager=False,
    reasons=(),
)


def decide(
    picture: KernelPicture,
    gpus: GpuPicture = GPUS,
    choice: Choice = CHOICE,
    *,
    drift: Any = "adopt",
    reboot: Any = "never",
    **stage: bool,
) -> Decision:
    return heal.decide(
        picture,
        gpus,
        choice,
        frozenset({"open", "proprietary"}),
        settings.Kernel(drift=drift, reboot=reboot),
        settings.Driver(source=choice.source),
        **stage,
    )


def kinds(decision: Decision) -> list[tuple[str, str]]:
    return [(step.kind, step.release) for step in decision.steps]


class TestAHostWhereAllIsWell:
    def test_is_left_alone(self):
        found = decide(kernels(kernel(OLD), kernel(NOW)))
        assert found.nothing
        assert (found.target, found.boot, found.reboot) == (NOW, None, "not-needed")

    def test_is_left_alone_whatever_an_older_kernel_lacks(self):
        assert decide(kernels(kernel(OLD, built=False, headers=False), kernel(NOW))).nothing

    def test_has_nothing_to_load_without_a_gpu(self):
        assert decide(kernels(kernel(NOW)), replace(GPUS, gpus=(), loaded="")).nothing


class TestANextKernelWithoutAModule:
    PICTURE = kernels(kernel(NOW), kernel(NEW, built=False), boots=NEW)

    def test_gets_one_of_the_installed_version_and_the_running_kernel_is_not_touched(self):
        found = decide(self.PICTURE)
        assert found.steps == (
            Step("dkms", NEW, version=VERSION),
            Step("depmod", NEW),
            Step("initramfs", NEW),
        )
        assert found.boot is None  # nothing was tried yet

    def test_makes_a_reboot_unsafe_and_says_why(self):
        found = decide(self.PICTURE)
        assert found.reboot == "unsafe"
        assert found.reasons == (f"kernel {NEW}: no NVIDIA module for kernel {NEW}",)

    def test_gets_its_exact_headers_first(self):
        picture = kernels(kernel(NOW), kernel(NEW, built=False, headers=False), boots=NEW)
        first = decide(picture).steps[0]
        assert (first.kind, first.release) == ("headers", NEW)
        assert f"linux-headers-{NEW}" in first.packages

    def test_that_cannot_have_one_is_kept_from_booting(self):
        failed = kernel(NEW, built=False, dkms_error="nv.c:12: error: implicit declaration")
        picture = kernels(kernel(NOW), failed, boots=NEW)
        found = decide(picture, tried=True)
        assert (found.target, found.boot) == (NOW, NOW)
        assert heal.unhealed(picture, found, settings.Kernel()) == (
            f"unsafe to reboot into kernel {NEW}: no NVIDIA module for kernel {NEW}: the DKMS build"
            f" failed: nv.c:12: error: implicit declaration; GRUB keeps booting {NOW}: set"
            " driver.branch to a branch that builds for it, or boot another kernel"
        )

    def test_is_a_warning_not_to_reboot_where_there_is_no_grub(self):
        picture = replace(self.PICTURE, grub=Grub(False))
        complaint = heal.unhealed(picture, decide(picture, tried=True), settings.Kernel())
        assert "; do not reboot this host: " in complaint

    @pytest.mark.parametrize(
        ("changes", "code"),
        [
            ({"module": module(NEW, "525.85.05")}, "version"),
            ({"module": module(NOW)}, "vermagic"),
        ],
    )
    def test_or_with_one_that_does_not_fit_gets_another(self, changes: Any, code: str):
        found = decide(kernels(kernel(NOW), kernel(NEW, **changes), boots=NEW))
        assert [problem.code for problem in found.kernels[1].problems] == [code]
        assert kinds(found) == [("dkms", NEW), ("depmod", NEW), ("initramfs", NEW)]

    def test_without_its_initrd_gets_only_that(self):
        found = decide(kernels(kernel(NOW), kernel(NEW, initrd_bytes=None), boots=NEW))
        assert kinds(found) == [("initramfs", NEW)]


class TestANextKernelThatWorks:
    PICTURE = kernels(kernel(NOW), kernel(NEW), boots=NEW)

    def test_makes_a_reboot_pending_and_safe(self):
        found = decide(self.PICTURE)
        assert (found.reboot, found.target, found.boot) == ("safe", NEW, None)
        assert found.reasons == (f"reboot pending, safe: kernel {NEW} has a working module",)
        assert found.steps == ()

    def test_is_not_wanted_where_the_pinned_one_shall_come_back(self):
        picture = replace(self.PICTURE, pinned=NOW)
        assert decide(picture, drift="revert").boot == NOW
        assert decide(picture, drift="adopt").boot is None


class TestARunningKernelWithoutAModule:
    def test_gets_headers_and_a_build(self):
        found = decide(kernels(kernel(NOW, built=False, headers=False)), replace(GPUS, loaded=""))
        assert kinds(found) == [
            ("headers", NOW),
            ("dkms", NOW),
            ("depmod", NOW),
            ("initramfs", NOW),
        ]
        assert found.load == "nothing"  # there is nothing to load yet

    GONE = kernels(kernel(OLD), kernel(NOW, built=False, headers=False))

    def test_whose_headers_are_gone_makes_way_for_an_older_one_that_works(self):
        found = decide(self.GONE, replace(GPUS, loaded=""), tried=True)
        assert found.steps == ()
        assert (found.target, found.boot, found.reboot) == (OLD, OLD, "safe")

    def test_is_well_once_the_reboot_is_allowed_and_else_says_what_to_do(self):
        found = decide(self.GONE, replace(GPUS, loaded=""), tried=True)
        assert heal.unhealed(self.GONE, found, settings.Kernel(reboot="when-safe")) == ""
        complaint = heal.unhealed(self.GONE, found, settings.Kernel())
        assert f"kernel {OLD} has a module: reboot into it, or set kernel.reboot" in complaint

    def test_and_without_any_other_asks_for_consent_to_move_on(self):
        picture = kernels(kernel(NOW, built=False, headers=False))
        found = decide(picture, replace(GPUS, loaded=""), tried=True)
        assert (found.target, found.reboot) == (NOW, "unsafe")
        complaint = heal.unhealed(picture, found, settings.Kernel(reboot="when-safe"))
        assert "no headers for kernel" in complaint
        assert complaint.endswith(heal.MOVE_ON)

    def test_makes_way_for_the_next_one_if_that_works(self):
        picture = kernels(kernel(NOW, built=False, headers=False), kernel(NEW), boots=NEW)
        found = decide(picture, replace(GPUS, loaded=""), tried=True)
        assert (found.target, found.boot, found.reboot) == (NEW, None, "safe")


class TestReadyMadeModules:
    CHOICE = replace(CHOICE, prebuilt=True)
    NAME = f"linux-modules-nvidia-535-server-open-{NOW}"

    @pytest.fixture(autouse=True)
    def names(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def kernel_packages(
            choice: Choice, picture: KernelPicture, release: str
        ) -> tuple[str, ...]:
            return (f"linux-headers-{release}", f"linux-modules-nvidia-535-server-open-{release}")

        monkeypatch.setattr(heal, "kernel_packages", kernel_packages)

    def test_come_as_the_package_of_exactly_that_kernel(self):
        found = decide(kernels(kernel(NOW, built=False)), GPUS, self.CHOICE)
        assert found.steps[0] == Step("prebuilt", NOW, (self.NAME,))
        assert "dkms" not in dict(kinds(found))

    def test_are_put_back_where_the_package_is_there_and_the_module_is_not(self):
        here = (package(self.NAME, "6.1", source="linux-restricted-modules"),)
        found = decide(kernels(kernel(NOW, built=False), packages=here), GPUS, self.CHOICE)
        assert found.steps[0] == Step("prebuilt", NOW, (self.NAME,))


class TestTheLoadedModule:
    OTHER = replace(GPUS, loaded="535.230.02")

    def test_is_loaded_again_where_the_device_of_unified_memory_is_missing(self):
        gpus = replace(GPUS, devices=("nvidia0", "nvidiactl"))
        assert decide(kernels(kernel(NOW)), gpus).load == "load"

    def test_is_loaded_where_none_is(self):
        assert decide(kernels(kernel(NOW)), replace(GPUS, loaded="")).load == "load"

    def test_is_exchanged_where_it_is_not_the_one_on_the_disk(self):
        assert decide(kernels(kernel(NOW)), self.OTHER).load == "reload"

    def test_is_exchanged_where_only_what_gpufleet_stops_holds_it(self):
        ours = ("nvidia-persistenced (pid 3)", "python3.11 (pid 4)", "nv-hostengine (pid 5)")
        gpus = replace(self.OTHER, refcount=7, holders=ours)
        assert decide(kernels(kernel(NOW)), gpus).load == "reload"

    def test_needs_a_reboot_where_somebody_else_holds_it_and_says_who(self):
        gpus = replace(self.OTHER, refcount=2, holders=("Xorg (pid 812)",))
        found = decide(kernels(kernel(NOW)), gpus)
        assert (found.load, found.reboot, found.target) == ("reboot", "safe", NOW)
        assert found.reasons == (
            f"module 535.230.02 is loaded, {VERSION} is on the disk, and Xorg (pid 812) keeps it",
        )

    def test_takes_the_place_of_nouveau(self):
        gpus = replace(GPUS, loaded="", nouveau_loaded=True)
        assert decide(kernels(kernel(NOW)), gpus).load == "reload"


class TestRefusals:
    def only(self, decision: Decision) -> str:
        (line,) = decision.refusals
        assert "\n" not in line
        return line

    def test_a_run_file_was_there_first(self):
        line = self.only(decide(kernels(kernel(NOW), runfile=True)))
        assert line == (
            "a .run file installed the driver here and driver.source is distribution: run"
            " nvidia-uninstall on the host, or set driver.source to runfile or present"
        )

    @pytest.mark.parametrize("source", ["runfile", "present"])
    def test_a_run_file_that_is_meant_is_none(self, source: Any):
        choice = replace(CHOICE, source=source)
        assert decide(kernels(kernel(NOW), runfile=True), GPUS, choice).refusals == ()

    def test_packages_of_two_versions(self):
        packages = (package("nvidia-kernel-dkms"), package("libcuda1", "580.65.06-1"))
        line = self.only(decide(kernels(kernel(NOW), packages=packages)))
        assert f"(nvidia-kernel-dkms {VERSION}-1, libcuda1 580.65.06-1)" in line

    def test_what_was_removed_is_of_no_version(self):
        left = package("libcuda1", "470.1-1", status="config-files", want="deinstall")
        packages = (package("nvidia-kernel-dkms"), package("nvidia-smi"), left)
        assert decide(kernels(kernel(NOW), packages=packages)).refusals == ()

    def test_apt_is_broken_and_something_must_be_installed(self):
        broken = "nvidia-smi depends on libcuda1"
        line = self.only(decide(kernels(kernel(NOW), broken=broken, packages=())))
        assert line.startswith(f"apt-get check: {broken}: run apt-get --fix-broken install")
        assert decide(kernels(kernel(NOW), broken=broken)).refusals == ()

    def test_secure_boot_with_a_module_that_nobody_signed(self):
        line = self.only(decide(kernels(kernel(NOW), secure_boot=True)))
        assert "enrol a key at the host's console" in line

    def test_no_room_for_the_initrd(self):
        picture = kernels(kernel(NOW), kernel(NEW, built=False), boots=NEW, boot_free_kib=60 << 10)
        line = self.only(decide(picture))
        assert line.startswith(f"/boot has 60 MiB free and the initrd of {NEW} may need 170 MiB: ")

    def test_a_full_boot_does_not_matter_where_no_initrd_is_made(self):
        assert decide(kernels(kernel(NOW), boot_free_kib=0)).refusals == ()


def test_whoever_holds_apt_is_named_and_waited_for():
    found = decide(kernels(kernel(NOW), apt_lock="unattended-upgr (pid 812)"))
    assert found.nothing
    assert found.notes == (
        "apt is in use by unattended-upgr (pid 812): waiting up to 10 minutes; stop it if it hangs",
    )


class TestSources:
    PICTURE = kernels(kernel(NOW))

    def test_get_the_missing_components_at_the_hosts_own_addresses(self):
        text = (
            "file\t/etc/apt/sources.list\n"
            "+deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] "
            "http://mirror.example/debian bookworm main contrib\n"
            "+deb http://mirror.example/debian-security bookworm-security main\n"
            "+deb http://other.example/apt/ bookworm main\n"
        )
        assert sources.wanted(self.PICTURE, "distribution", text) == (
            "# Written by gpufleet: where the driver's packages are.\n"
            "\n"
            "Types: deb\n"
            "URIs: http://mirror.example/debian\n"
            "Suites: bookworm\n"
            "Components: non-free non-free-firmware\n"
            "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
            "\n"
            "Types: deb\n"
            "URIs: http://mirror.example/debian-security\n"
            "Suites: bookworm-security\n"
            "Components: contrib non-free non-free-firmware\n"
        )

    def test_are_left_alone_where_all_components_are_enabled(self):
        components = "main contrib non-free non-free-firmware"
        text = f"file\t/etc/apt/sources.list\n+deb http://x.example/debian bookworm {components}\n"
        assert sources.wanted(self.PICTURE, "distribution", text) is None

    def test_are_left_alone_once_written(self):
        text = "file\t/etc/apt/sources.list\n+deb http://x.example/debian bookworm main\n"
        written = sources.wanted(self.PICTURE, "distribution", text)
        assert written is not None
        lines = [f"+{line}" for line in written.splitlines()]
        again = "\n".join([text.rstrip("\n"), f"file\t{sources.PATH}", *lines, ""])
        assert sources.wanted(self.PICTURE, "distribution", again) is None

    def test_name_nvidias_repository_or_its_host_in_china(self):
        found = sources.wanted(self.PICTURE, "nvidia-cn", "")
        assert found is not None
        uri = "https://developer.download.nvidia.cn/compute/cuda/repos/debian12/x86_64"
        assert f"URIs: {uri}\nSuites: /\nSigned-By: " in found
        ubuntu = replace(self.PICTURE, os="ubuntu", os_version="24.04")
        assert "/repos/ubuntu2404/x86_64" in (sources.wanted(ubuntu, "nvidia", "") or "")


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("NVIDIA-Linux-x86_64-535.247.01.run", "535.247.01"),
        ("NVIDIA-Linux-x86_64-580.65.06-no-compat32.run", "580.65.06"),
        ("cuda_13.0.run", ""),
    ],
)
def test_a_run_file_says_its_version_in_its_name(name: str, version: str):
    assert runfile_version(name) == version


class TestServices:
    def test_run_once_the_module_is_loaded(self):
        gpus = replace(GPUS, persistenced="inactive", fabricmanager="inactive")
        both = replace(CHOICE, fabric_manager=True)
        names = ("nvidia-persistenced.service", "nvidia-fabricmanager.service")
        assert heal.idle_services(both, gpus) == names
        assert heal.idle_services(CHOICE, gpus) == names[:1]
        assert heal.idle_services(both, replace(gpus, loaded="")) == ()
        assert heal.idle_services(CHOICE, GPUS) == ()

    def test_need_a_fabric_manager_of_exactly_the_drivers_version(self):
        both = replace(CHOICE, fabric_manager=True)
        other = replace(GPUS, fabricmanager="active", fabricmanager_version="535.230.02")
        assert "535.230.02 does not match the driver 535.247.01" in heal.fabric_problem(both, other)
        assert "is not installed" in heal.fabric_problem(both, GPUS)
        assert heal.fabric_problem(CHOICE, other) == ""


class TestTheGateAfterATrialBoot:
    def passed(self, gpus: GpuPicture = GPUS, said: str = "", **changes: Any) -> tuple[str, ...]:
        picture = kernels(kernel(NOW), **changes)
        seen = heal.Sight(settings.Settings(), picture, gpus, CHOICE, decide(picture, gpus))
        return heal.gate(GPUS, seen, NOW, said)

    def test_opens_where_everything_works(self):
        assert self.passed() == ()

    def test_stays_shut_where_the_old_kernel_came_back(self):
        # nvidia-smi works there, which is why the release is asked for
        picture = kernels(kernel(NOW))
        seen = heal.Sight(settings.Settings(), picture, GPUS, CHOICE, decide(picture))
        assert heal.gate(GPUS, seen, NEW, "") == (f"kernel {NOW} runs, not {NEW}",)

    def test_names_everything_that_does_not_work(self):
        gpus = replace(GPUS, gpus=(), smi=Smi(True, error="No devices were found"), loaded="")
        assert self.passed(gpus) == ("0 of 1 GPUs are on the bus",)
        gpus = replace(GPUS, smi=Smi(True, (), VERSION), persistenced="failed")
        assert self.passed(gpus, "minigpt4-demo.service does not run\n") == (
            "nvidia-smi lists 0 of 1 GPUs",
            "nvidia-persistenced does not run",
            "minigpt4-demo.service does not run",
        )


class TestTheFilesOfTheDriver:
    def test_are_compared_without_another_command(self):
        (file,) = files.nouveau()
        assert files.differ([file], GPUS)
        there = replace(GPUS, owned=((file.path, f"644 {file.sha256}"),))
        assert not files.differ([file], there)
        assert files.differ([file], replace(GPUS, owned=((file.path, f"600 {file.sha256}"),)))
        assert files.lie([file], there)
        assert not files.lie(files.guard(), there)

    def test_that_are_looked_at_are_those_that_are_written(self):
        paths = {file.path for file in [*files.nouveau(), *files.guard()]}
        assert paths < set(files.OWNED)
