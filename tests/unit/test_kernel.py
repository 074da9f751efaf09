"""The kernel pin: what a host's script tells, what GRUB boots, what is held, and what leaks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

import pytest

from gpufleet.kernel import plan
from gpufleet.kernel import rhel as rhel_family
from gpufleet.kernel.grub import entry_of
from gpufleet.kernel.picture import Grub, Kernel, KernelPicture, NextBoot, Package
from gpufleet.kernel.release import abi, age
from gpufleet.upgrade.plan import begins

NOW, NEW = "6.8.0-147-generic", "6.8.0-149-generic"
U = "5b79ad87-24b0-43a3-923b-58b0d2568ad4"


def package(name: str, source: str = "linux", **changes: Any) -> Package:
    return replace(Package(name, "1", source, "install", "installed"), **changes)


def kernel(release: str) -> Kernel:
    return Kernel(release, True, 40 << 20, False, None)


#: What an Ubuntu 24.04 server with prebuilt modules has installed.
PACKAGES = (
    package("linux-base", "linux-base"),
    package("linux-firmware", "linux-firmware"),
    package("linux-generic", "linux-meta"),
    package("linux-image-generic", "linux-meta"),
    package("linux-headers-generic", "linux-meta"),
    package("linux-modules-nvidia-580-server-generic", "linux-restricted-modules"),
    package(f"linux-image-{NOW}", "linux-signed"),
    package(f"linux-modules-{NOW}"),
    package(f"linux-modules-extra-{NOW}"),
    package(f"linux-headers-{NOW}"),
    package("linux-headers-6.8.0-147"),
    package(f"linux-modules-nvidia-580-server-{NOW}", "linux-restricted-modules"),
    package(f"linux-objects-nvidia-580-server-{NOW}", "linux-restricted-modules"),
    package(f"linux-signatures-nvidia-{NOW}", "linux-restricted-signatures"),
    package(f"linux-image-{NEW}", "linux-signed"),
    package(f"linux-modules-nvidia-580-server-{NEW}", "linux-restricted-modules"),
    package("linux-headers-6.8.0-149"),
    package("nvidia-utils-580-server", "nvidia-graphics-drivers-580-server"),
    package("nvidia-fabricmanager-580", "fabric-manager-580"),
    package("libnvidia-nscq-580", "libnvidia-nscq-580"),
    package("libnvidia-compute-580-server:i386", "nvidia-graphics-drivers-580-server"),
    package("libcuda1", "nvidia-graphics-drivers"),
    package("cuda-drivers-580", "cuda-drivers"),
    package("nvidia-container-toolkit", "nvidia-container-toolkit"),
    package("libnvidia-container1", "libnvidia-container"),
    package("nvidia-dkms-580-server", "nvidia-graphics-drivers-580", status="half-configured"),
    package("unattended-upgrades", "unattended-upgrades"),
)

INTENDED = (
    "linux-generic",
    "linux-image-generic",
    "linux-headers-generic",
    "linux-modules-nvidia-580-server-generic",
    f"linux-image-{NOW}",
    f"linux-modules-{NOW}",
    f"linux-modules-extra-{NOW}",
    f"linux-headers-{NOW}",
    "linux-headers-6.8.0-147",
    f"linux-modules-nvidia-580-server-{NOW}",
    f"linux-objects-nvidia-580-server-{NOW}",
    f"linux-signatures-nvidia-{NOW}",
    "nvidia-utils-580-server",
    "nvidia-fabricmanager-580",
    "libnvidia-nscq-580",
    "libnvidia-compute-580-server:i386",
    "libcuda1",
    "cuda-drivers-580",
)


def host(**changes: Any) -> KernelPicture:
    given = KernelPicture(
        family="debian",
        os="ubuntu",
        os_version="24.04",
        running=NOW,
        boot_id="b",
        kernels=(kernel(NOW), kernel(NEW)),
        next_boot=NextBoot(NEW, "first entry of grub.cfg"),
        grub=grub(NEW, NOW),
        boot_free_kib=1 << 20,
        secure_boot=False,
        packages=PACKAGES,
        holds=frozenset(),
    )
    return replace(given, **changes)


def grub_cfg(*releases: str, default: str = "0") -> list[str]:
    """grub.cfg as Debian's GRUB 2.06 makes it, newest kernel first; the lines that the script
    keeps."""

    def entry(title: str, ident: str, release: str, indent: str = "\t") -> list[str]:
        return [
            f"{indent}menuentry '{title}' --class debian --class gnu-linux --class os "
            f"$menuentry_id_option '{ident}-{U}' {{",
            f"{indent}\tlinux\t/boot/vmlinuz-{release} root=UUID={U} ro console=tty0 ",
            f"{indent}}}",
        ]

    lines = [
        '   set default="${next_entry}"',
        f'   set default="{default}"',
        "function savedefault {",
    ]
    lines += ["}", *entry("Debian GNU/Linux", "gnulinux-simple", releases[0], "")]
    advanced = f"gnulinux-advanced-{U}"
    lines.append(f"submenu 'Advanced options for it\\'' $menuentry_id_option '{advanced}' {{")
    lines[-1] = lines[-1].replace("for it\\'", "for Debian GNU/Linux")
    for each in releases:
        title = f"Debian GNU/Linux, with Linux {each}"
        lines += entry(title, f"gnulinux-{each}-advanced", each)
        lines += entry(f"{title} (recovery mode)", f"gnulinux-{each}-recovery", each)
    return [*lines, "}", "menuentry 'UEFI Firmware Settings' $menuentry_id_option 'uefi' {", "}"]


def script(*releases: str, default: str = "0", settings: str = "0", **env: str) -> KernelPicture:
    lines = ["os\tdebian\t\t12", "running\t6.1.0-9-amd64", "grub"]
    lines += [f"kernel\t{release}\tyes\t4096\tno" for release in releases]
    lines += [f"grub_cfg\t{line}" for line in grub_cfg(*releases, default=default)]
    lines += [f"grub_env\t{name}\t{value}" for name, value in env.items()]
    return plan.parse([*lines, f"grub_default\t{settings}"])


def grub(*releases: str, default: str = "0", settings: str | None = None) -> Grub:
    made = script(*releases, default=default, settings=default if settings is None else settings)
    return made.grub


def path(release: str) -> str:
    return f"gnulinux-advanced-{U}>gnulinux-{release}-advanced-{U}"


D9, D10 = "6.1.0-9-amd64", "6.1.0-10-amd64"


class TestWhatBootsNext:
    @pytest.mark.parametrize(
        ("default", "release"),
        [
            ("0", D10),
            ("", D10),
            ("1", D10),  # the submenu, whose first entry is the newest
            ("1>2", D9),
            ("1>3", D9),  # its recovery entry boots the same kernel
            (path(D9), D9),
            (f"gnulinux-simple-{U}", D10),
            ("Advanced options for Debian GNU/Linux>Debian GNU/Linux, with Linux " + D9, D9),
            (f"gnulinux-advanced-{U}>2", D9),
        ],
    )
    def test_a_default_that_names_an_entry_boots_it(self, default: str, release: str):
        found = script(D10, D9, default=default).next_boot
        assert found.release == release
        assert "names no entry" not in found.reason

    @pytest.mark.parametrize(
        "default",
        [
            path("6.1.0-8-amd64"),
            f"gnulinux-{D9}-advanced-{U}",  # an entry of the submenu, without the submenu
            f"gone>gnulinux-{D9}-advanced-{U}",
            "7",
            "1>9",
            "Debian",
        ],
    )
    def test_a_default_that_names_none_boots_the_first_and_the_reason_says_so(self, default: str):
        found = script(D10, D9, default=default)
        assert found.next_boot.release == found.grub.boots == D10
        assert "names no entry of grub.cfg" in found.next_boot.reason

    def test_a_saved_entry_counts_where_the_default_is_saved(self):
        found = script(D10, D9, default="${saved_entry}", settings="saved", saved_entry=path(D9))
        assert found.next_boot == NextBoot(D9, f"saved_entry {path(D9)}")
        none = script(D10, D9, default="${saved_entry}", settings="saved")
        assert none.next_boot == NextBoot(D10, "no saved_entry: first entry of grub.cfg")

    def test_a_saved_entry_is_nothing_where_it_is_not(self):
        assert script(D10, D9, saved_entry=path(D9)).next_boot.release == D10

    def test_a_trial_comes_once_before_every_default_and_leaves_it_as_it_is(self):
        found = script(D10, D9, default=path(D9), next_entry=path(D10))
        assert found.next_boot == NextBoot(D10, f"grubenv next_entry {path(D10)}")
        assert found.grub.boots == D9

    def test_settings_that_no_update_grub_took_in_boot_nothing(self):
        found = script(D10, D9, default="0", settings=path(D9))
        assert found.next_boot.release == D10
        assert (found.grub.default, found.grub.written) == (path(D9), "0")

    def test_the_first_entry_is_no_entry_of_its_own_for_a_kernel(self):
        found = script(D10, D9)
        assert entry_of(found.grub, D10) == path(D10)
        assert entry_of(found.grub, D9) == path(D9)
        assert entry_of(found.grub, "6.1.0-8-amd64") is None

    def test_entries_leave_recovery_and_what_is_no_kernel_out(self):
        assert [release for _, release in script(D10, D9).grub.entries] == [D10, D10, D9]

    def test_without_a_submenu_an_entry_stands_for_itself(self):
        lines = [f"menuentry 'L' $menuentry_id_option 'gnulinux-{D9}-advanced-{U}' {{"]
        lines += [f"linuxefi /vmlinuz-{D9} ro", "}"]
        found = plan.parse(["os\tdebian", "grub", *(f"grub_cfg\t{line}" for line in lines)])
        assert entry_of(found.grub, D9) == f"gnulinux-{D9}-advanced-{U}"
        assert found.next_boot.release == D9

    def test_without_grub_the_newest_kernel_boots(self):
        lines = ["os\tdebian\t\t12", "kernel\t6.1.0-9-amd64\tyes\t1\tno"]
        lines += ["kernel\t6.1.0-10-amd64\tyes\t1\tno", "kernel\t6.1.0-10-cloud-amd64\tno\t-\tno"]
        found = plan.parse(lines)
        assert found.next_boot.reason == "no GRUB: the newest kernel that is installed"
        assert found.next_boot.release == "6.1.0-10-cloud-amd64"
        assert plan.parse(["os\tdebian"]).next_boot.release is None

    def test_grubby_knows_what_boots_where_it_is(self):
        found = plan.parse(["os\trhel", "grubby\t/boot/vmlinuz-5.14.0-427.el9.x86_64"])
        assert found.next_boot == NextBoot("5.14.0-427.el9.x86_64", "grubby --default-kernel")


def test_kernels_are_sorted_as_dpkg_sorts_versions():
    """In the order of `dpkg --compare-versions`."""
    ordered = [
        "6.1.0-9-amd64",
        "6.1.0-10-amd64",
        "6.1.0-10-cloud-amd64",
        "6.8~rc1-amd64",
        "6.8-amd64",
    ]
    ordered += ["6.8.0-40-generic", "6.12.38+deb13-amd64"]
    assert sorted(set(ordered), key=age) == ordered
    assert all(age(a) < age(b) for a, b in pairwise(ordered))


@pytest.mark.parametrize(
    ("release", "shared"),
    [
        ("6.8.0-40-generic", "6.8.0-40"),
        ("5.15.0-1050-gcp", "5.15.0-1050"),
        ("6.1.0-56-amd64", "6.1.0-56"),
        ("6.1.0-56-cloud-amd64", "6.1.0-56"),
        ("6.1.0-0.deb11.13-rt-amd64", "6.1.0-0.deb11.13"),
        ("6.12.38+deb13-cloud-amd64", "6.12.38+deb13"),
    ],
)
def test_flavours_share_what_comes_before_their_name(release: str, shared: str):
    assert abi(release) == shared


class TestTheScriptsLines:
    def test_become_a_picture(self):
        found = plan.parse(
            [
                "os\tubuntu\tdebian\t22.04",
                "running\t5.15.0-100-generic",
                "boot_id\tabc",
                "boot_free_kib\t900",
                "nouveau_blacklisted",
                "kernel\t5.15.0-100-generic\tyes\t1234\tno",
                "module\t5.15.0-100-generic\tnvidia\t535.1\t5.15.0-100-generic SMP\tNVIDIA\tDB",
                "dkms\t5.15.0-100-generic\tnvidia/535.1\tinstalled",
                "kernel\t5.15.0-101-generic\tno\t-\tyes",
                "dkms\t5.15.0-101-generic\tnvidia/535.1\tadded",
                "dkms_error\t5.15.0-101-generic\tx.c:1:  error: no such thing",
                "secure_boot",
                "trusted\tDB",
                "hold\tlinux-generic",
                "package\tlinux-generic\t5.15\tlinux-meta\thold\tinstalled",
                "audit\tnvidia-dkms-535",
                "broken\t nvidia-dkms-535 : Depends: dkms",
                "preference\t/etc/apt/preferences.d/x\tPackage: nvidia-*",
                "preference\t/etc/apt/preferences.d/x\tPin: version *",
                "unattended\tUnattended-Upgrade::Package-Blacklist::\tlinux-",
                "unattended\tUnattended-Upgrade::Automatic-Reboot\tfalse",
                "apt_lock\tunattended-upgr (pid 812)",
                "runfile",
                "pinned\t5.15.0-100-generic",
                "own_hold\tlinux-generic",
                "file\t/etc/x\t644\troot\troot\tabc",
                "record\t/etc/x\tabc",
            ]
        )
        first, second = found.kernels
        assert found.family == "debian"
        assert (first.headers, first.initrd_bytes, first.nouveau_in_initrd) == (True, 1234, False)
        assert first.module is not None
        assert (first.module.version, first.module.signer) == ("535.1", "DB")
        assert first.dkms == (("nvidia/535.1", "installed"),)
        assert (second.headers, second.initrd_bytes, second.nouveau_in_initrd) == (
            False,
            None,
            True,
        )
        assert second.dkms_error == "x.c:1: error: no such thing"
        assert found.secure_boot
        assert found.trusted_signers == ("DB",)
        assert found.packages[0].held
        assert found.holds == {"linux-generic"}
        assert found.audit == ("nvidia-dkms-535",)
        assert found.broken == "nvidia-dkms-535 : Depends: dkms"
        assert found.preferences == (
            ("/etc/apt/preferences.d/x", "Package: nvidia-*\nPin: version *\n"),
        )
        assert found.unattended[0] == ("Unattended-Upgrade::Package-Blacklist", "linux-")
        assert found.apt_lock == "unattended-upgr (pid 812)"
        assert found.runfile
        assert (found.pinned, found.own_holds) == ("5.15.0-100-generic", ("linux-generic",))
        assert found.nouveau_blacklisted
        assert found.managed.records["/etc/x"].sha256 == "abc"

    def test_of_a_host_that_said_nothing_are_an_empty_picture(self):
        found = plan.parse([])
        assert (found.family, found.kernels, found.grub.present) == ("other", (), False)

    @pytest.mark.parametrize(
        ("os", "family"),
        [
            ("debian\t", "debian"),
            ("ubuntu\tdebian", "debian"),
            ("rocky\trhel centos fedora", "rhel"),
            ("tencentos\t", "rhel"),
            ("arch\t", "other"),
        ],
    )
    def test_tell_the_family(self, os: str, family: str):
        assert plan.parse([f"os\t{os}"]).family == family


class TestTheHoldSet:
    def test_is_every_meta_all_of_the_kernel_and_the_driver_that_is_installed(self):
        assert plan.hold_set(host(), NOW) == INTENDED

    def test_follows_the_kernel(self):
        found = set(plan.hold_set(host(), NEW))
        assert {f"linux-image-{NEW}", "linux-headers-6.8.0-149"} <= found
        assert not found & {f"linux-image-{NOW}", "linux-headers-6.8.0-147"}

    def test_of_debian_has_the_common_headers_and_of_no_other_flavour(self):
        names = [
            "linux-image-amd64",
            "linux-headers-amd64",
            "linux-headers-cloud-amd64",
            "linux-image-6.1.0-56-amd64",
            "linux-headers-6.1.0-56-amd64",
            "linux-headers-6.1.0-56-common",
        ]
        others = ["linux-image-6.1.0-56-cloud-amd64", "linux-headers-6.1.0-5-common"]
        others += ["linux-kbuild-6.1", "linux-libc-dev", "linux-compiler-gcc-12-x86"]
        found = host(os="debian", packages=tuple(package(name) for name in [*names, *others]))
        assert plan.hold_set(found, "6.1.0-56-amd64") == tuple(names)

    @pytest.mark.parametrize(
        "name", ["linux-hwe-6.8-headers-6.8.0-147", "linux-aws-6.8-headers-6.8.0-147"]
    )
    def test_has_the_common_headers_by_their_other_names(self, name: str):
        found = host(packages=(package(name, "linux-hwe-6.8"),))
        assert plan.hold_set(found, NOW) == (name,)

    def test_keeps_other_peoples_holds_theirs(self):
        theirs = tuple(
            replace(each, want="hold") if each.name == "linux-generic" else each
            for each in PACKAGES
        )
        change = plan.holds(host(packages=theirs, holds=frozenset({"linux-generic"})), NOW)
        assert "linux-generic" not in change.add + change.own
        assert set(change.own) == set(INTENDED) - {"linux-generic"}
        assert change.remove == ()

    def test_lets_go_what_was_held_for_another_kernel_and_nothing_else(self):
        old = "linux-image-6.8.0-100-generic"
        found = host(own_holds=(old, "gone"), holds=frozenset({old, "rsync"}))
        assert plan.holds(found, NOW).remove == (old,)

    def test_once_held_changes_nothing(self):
        found = pinned()
        assert plan.holds(found, NOW).nothing


def pinned(**changes: Any) -> KernelPicture:
    """The host once the pin is in force."""
    entry = path(NOW)
    found = host(
        packages=tuple(
            replace(each, want="hold") if each.name in INTENDED else each for each in PACKAGES
        ),
        holds=frozenset(INTENDED),
        own_holds=INTENDED,
        pinned=NOW,
        grub=replace(grub(NEW, NOW, default=entry), dropins=(plan.GRUB,)),
        unattended=(
            *(("Unattended-Upgrade::Package-Blacklist", each) for each in plan.BLACKLIST),
            ("Unattended-Upgrade::Remove-Unused-Kernel-Packages", "false"),
            ("Unattended-Upgrade::Automatic-Reboot", "false"),
        ),
    )
    files = {file.path: file.content for file in plan.pin_files(found, NOW)}
    preferences = ((plan.PREFERENCES, files[plan.PREFERENCES]),)
    return replace(found, **{"preferences": preferences, **changes})


def release(name: str, **changes: Any) -> tuple[Package, ...]:
    """The held packages, one of them changed."""
    return tuple(replace(p, **changes) if p.name == name else p for p in pinned().packages)


class TestTheFiles:
    def test_name_the_kernel_first_and_forbid_all_others_then(self):
        text = next(f for f in plan.pin_files(host(), NOW) if f.path == plan.PREFERENCES).content
        (first, allowed), (second, denied) = plan.stanzas(text)
        assert (allowed, denied) == (990, -1)
        assert {f"linux-image-{NOW}", f"linux-headers-{NOW}", "linux-headers-6.8.0-147"} <= set(
            first
        )
        assert second == ["/^linux-(image|image-unsigned|modules|modules-extra|headers)-[0-9]/"]

    def test_let_the_headers_of_every_kernel_that_is_here_be_installed(self):
        text = next(f for f in plan.pin_files(host(), NOW) if f.path == plan.PREFERENCES).content
        names = next(iter(plan.stanzas(text)))[0]
        assert {f"linux-headers-{NEW}", "linux-headers-6.8.0-149"} <= set(names)
        assert f"linux-image-{NEW}" not in names

    def test_of_debian_name_the_common_headers(self):
        found = host(os="debian", kernels=(kernel("6.1.0-56-rt-amd64"),))
        text = plan.pin_files(found, "6.1.0-56-rt-amd64")[0].content
        for name in ("linux-headers-6.1.0-56-common", "linux-headers-6.1.0-56-common-rt"):
            assert name in text.split()

    def test_boot_the_kernel_by_its_own_entry(self):
        text = next(f for f in plan.pin_files(host(), NOW) if f.path == plan.GRUB).content
        assert f'GRUB_DEFAULT="{path(NOW)}"' in text.splitlines()

    def test_leave_grub_alone_where_there_is_none_or_no_entry(self):
        for other in (Grub(present=False), grub(NEW)):
            files = [f.path for f in plan.pin_files(host(grub=other), NOW)]
            assert files == [plan.PREFERENCES, plan.UNATTENDED]

    def test_are_read_by_apt_and_by_grub_in_the_place_they_have(self):
        assert PurePosixPath(plan.PREFERENCES).suffix == ".pref"
        assert PurePosixPath(plan.UNATTENDED).suffix == ""
        assert PurePosixPath(plan.GRUB).suffix == ".cfg"
        assert plan.GRUB > "/etc/default/grub.d/zy-gpufleet-kernel.cfg"

    @pytest.mark.parametrize(
        ("name", "kept"),
        [
            (f"linux-image-{NEW}", True),
            ("linux-generic", True),
            ("linux-modules-nvidia-580-server-generic", True),
            ("nvidia-utils-580", True),
            ("libnvidia-compute-580", True),
            ("cuda-drivers", True),
            ("linux-libc-dev", False),
            ("linux-firmware", False),
            ("linux-base", False),
            ("nvidia-container-toolkit", False),
            ("openssl", False),
        ],
    )
    def test_keep_unattended_upgrades_from_kernel_and_driver_alone(self, name: str, kept: bool):
        assert any(begins(pattern, name) for pattern in plan.BLACKLIST) is kept


class TestTheAudit:
    def test_of_a_pin_in_force_finds_nothing(self):
        assert plan.leaks(pinned(), NOW) == ()

    def test_of_a_host_without_one_finds_everything(self):
        found = plan.leaks(host(), NOW)
        assert len(found) == len(INTENDED) + 1 + 3 + 2
        assert all("\n" not in line for line in found)

    def test_finds_a_meta_that_leaks(self):
        meta = "linux-modules-nvidia-580-server-generic"
        (line,) = plan.leaks(pinned(packages=release(meta, want="install")), NOW)
        assert line == (
            f"{meta} is not held and brings the next kernel in, without headers: apply again, or "
            f"apt-mark hold {meta}"
        )

    def test_finds_a_hold_that_protects_nothing_and_does_not_call_it_a_leak(self):
        found = pinned(holds=frozenset({*INTENDED, "linux-image-oem", "rsync"}))
        assert plan.idle_holds(found) == ("linux-image-oem",)
        assert plan.leaks(found, NOW) == ()

    def test_finds_that_no_package_of_the_kernel_is_there(self):
        image = f"linux-image-{NOW}"
        found = pinned(packages=release(image, status="config-files"))
        (line,) = plan.leaks(found, NOW)
        assert line.startswith(f"no package of kernel {NOW} is installed")
        assert plan.idle_holds(found) == (image,)

    def test_finds_preferences_that_are_missing_or_of_another_kernel(self):
        (line,) = plan.leaks(pinned(preferences=()), NOW)
        assert line == f"{plan.PREFERENCES} is missing: apply again"
        other = plan.pin_files(host(), NEW)[0].content
        (line,) = plan.leaks(pinned(preferences=((plan.PREFERENCES, other),)), NOW)
        assert line == f"{plan.PREFERENCES} does not pin this kernel: apply again"

    @pytest.mark.parametrize(
        ("file", "names", "priority", "outranks"),
        [
            ("/etc/apt/preferences", "linux-image-*", 500, True),
            ("/etc/apt/preferences", f"linux-image-{NOW}", -1, True),
            ("/etc/apt/preferences", "bash /^linux-/", 1001, True),
            ("/etc/apt/preferences", "/(/", 1001, False),
            ("/etc/apt/preferences", "*", 1001, False),
            ("/etc/apt/preferences", "nvidia-*", 600, False),
            ("/etc/apt/preferences.d/00-a", "linux-image-*", 9, True),
            ("/etc/apt/preferences.d/10-a", "linux-image-*", 9, False),
        ],
    )
    def test_finds_a_file_that_apt_takes_first(
        self, file: str, names: str, priority: int, outranks: bool
    ):
        stanza = f"# why\nPackage: {names}\nPin: release n=x\nPin-Priority: {priority}\n"
        texts = (*pinned().preferences, (file, stanza))
        found = plan.leaks(pinned(preferences=texts), NOW)
        assert [line.startswith(f"{file} gives ") for line in found] == [True] * outranks

    def test_finds_unattended_upgrades_allowed(self):
        (line,) = plan.leaks(pinned(unattended=pinned().unattended[1:]), NOW)
        assert line.startswith(f"unattended-upgrades may upgrade linux-image-{NOW}")
        on = ("Unattended-Upgrade::Automatic-Reboot", "true")
        (line,) = plan.leaks(pinned(unattended=(*pinned().unattended, on)), NOW)
        assert line.startswith("Unattended-Upgrade::Automatic-Reboot is true")

    def test_finds_a_later_drop_in(self):
        later = "/etc/default/grub.d/zzz.cfg"
        made = replace(pinned().grub, dropins=(plan.GRUB, later), default="0")
        (line,) = plan.leaks(pinned(grub=made), NOW)
        assert line == f"{later} sets GRUB_DEFAULT after {plan.GRUB}: remove it there, then apply"

    def test_finds_a_default_that_grub_cfg_does_not_have_yet(self):
        made = replace(grub(NEW, NOW, default="0", settings=path(NOW)), dropins=(plan.GRUB,))
        (line,) = plan.leaks(pinned(grub=made), NOW)
        assert line == (
            f"GRUB boots {NEW} by default, not {NOW} (first entry of grub.cfg): run update-grub"
        )

    def test_finds_an_entry_that_is_gone(self):
        made = replace(grub(NEW, default=path(NOW)), dropins=(plan.GRUB,))
        (line,) = plan.leaks(pinned(grub=made), NOW)
        assert line.startswith(f"grub.cfg has no entry of its own for kernel {NOW}")

    def test_of_a_system_that_nothing_is_known_for_says_so(self):
        (line,) = plan.leaks(host(family="other", os="arch"), NOW)
        assert line == "arch: no pin is known for it: set kernel.pin to False"


class TestWhichKernel:
    @pytest.mark.parametrize(
        ("pinned", "drift", "chosen"),
        [("", "adopt", NOW), ("", "revert", NOW), (NEW, "adopt", NOW), (NEW, "revert", NEW)],
    )
    def test_is_pinned(self, pinned: str, drift: plan.Drift, chosen: str):
        found = host(pinned=pinned)
        assert plan.target(found, drift) == chosen
        assert plan.missing(found, drift) == ""

    def test_must_be_installed(self):
        found = host(pinned="6.8.0-100-generic")
        assert plan.missing(found, "revert").startswith(
            "kernel 6.8.0-100-generic, which was pinned"
        )
        assert plan.missing(found, "adopt") == ""
        assert "is not in /boot" in plan.missing(host(running="6.18.44"), "adopt")


EL9 = "5.14.0-427.13.1.el9_4.x86_64"


def rhel(**changes: Any) -> KernelPicture:
    """A RHEL 9 with the driver of NVIDIA's repository. Made up: no such host was at hand."""
    names = ["kernel", "kernel-core", "kernel-modules", "kernel-modules-core", "kernel-devel"]
    names += ["kernel-devel-matched", "kernel-tools", "kmod-nvidia-open-dkms", "nvidia-driver"]
    names += ["nvidia-driver-cuda", "libnvidia-ml", "nvidia-container-toolkit", "cuda-drivers"]
    given = {
        "family": "rhel",
        "os": "rocky",
        "packages": tuple(package(name, f"{name}.src.rpm") for name in names),
        "kernels": (kernel(EL9), kernel("5.14.0-503.el9.x86_64")),
        "next_boot": NextBoot("5.14.0-503.el9.x86_64", "grubby --default-kernel"),
        "grub": Grub(present=True),
        "running": EL9,
    }
    return host(**{**given, **changes})


class TestTheRhelFamily:
    def test_locks_this_kernel_and_the_driver_and_boots_it(self):
        v = "5.14.0-427.13.1.el9_4"
        assert rhel_family.pin(rhel(), EL9) == (
            f"dnf -q versionlock add kernel-{v} kernel-core-{v} kernel-modules-{v} "
            f"kernel-modules-core-{v} kernel-devel-{v} kernel-devel-matched-{v} "
            "kmod-nvidia-open-dkms nvidia-driver nvidia-driver-cuda libnvidia-ml cuda-drivers",
            f"grubby --set-default /boot/vmlinuz-{EL9}",
        )

    def locked(self) -> frozenset[str]:
        v = "5.14.0-427.13.1.el9_4"
        return frozenset(
            f"{name}-0:{v}.*" if name in rhel_family.KERNEL else f"{name}-3:580.1-1.el9.*"
            for name in rhel_family.locks(rhel())
        )

    def test_is_left_alone_once_it_is_locked(self):
        there = rhel(holds=self.locked(), next_boot=NextBoot(EL9, "grubby --default-kernel"))
        assert rhel_family.pin(there, EL9) == ()
        assert plan.leaks(there, EL9) == ()

    def test_leaks_by_name(self):
        found = plan.leaks(rhel(), EL9)
        assert "kernel-core is not locked: apply again, or dnf versionlock add kernel-core" in found
        assert found[-1].endswith(f"grubby --set-default /boot/vmlinuz-{EL9}")

    def test_warns_of_an_exclude_that_keeps_the_headers_out_and_of_eviction(self):
        dnf = (("exclude", "kernel*"), ("installonly_limit", "2"), ("excludepkgs", "kernel-debug*"))
        one, two = rhel_family.warnings(rhel(dnf=dnf))
        assert one.startswith("dnf.conf has exclude=kernel*, which keeps kernel-devel out")
        assert two.startswith("dnf.conf has installonly_limit=2 and 2 kernels are installed")
        assert rhel_family.warnings(rhel(dnf=(("installonly_limit", "0"),))) == ()

    def test_has_no_files_of_apt(self):
        assert plan.pin_files(rhel(), EL9) == []

    def test_lets_go_its_own_locks_only(self):
        assert rhel_family.unpin(rhel()) == ()
        (command,) = rhel_family.unpin(rhel(own_holds=("kernel-core",)))
        assert command == "dnf -q versionlock delete kernel-core"
