"""The kernel script, really run: by this machine's shell, on a tree that looks like a host's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from gpufleet.kernel.facts import KernelFacts
from gpufleet.kernel.operations import _HOLD, _NOTE
from gpufleet.kernel.picture import KernelPicture
from gpufleet.kernel.plan import GRUB, HOLDS, PIN
from gpufleet.shell import script

OLD, NOW, NEW = "6.1.0-9-amd64", "6.1.0-10-amd64", "6.1.0-11-amd64"

pytestmark = pytest.mark.skipif(not shutil.which("dpkg-query"), reason="this machine has no dpkg")

STATUS = """\
Package: linux-image-{k}
Status: hold ok installed
Architecture: {a}
Multi-Arch: same
Source: linux-signed ({v})
Version: {v}
Maintainer: x
Description: x

Package: libnvidia-ml1
Status: install ok half-configured
Architecture: i386
Multi-Arch: same
Source: nvidia-graphics-drivers
Version: 535.1
Maintainer: x
Description: x

Package: linux-image-oem
Status: hold ok not-installed
Architecture: {a}
Version: 1

Package: rsync
Status: install ok installed
Architecture: {a}
Version: 1
Maintainer: x
Description: x

"""


class Host:
    """A tree with what the script reads, and programs that answer for the host's."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bin = root / "bin"
        self.put("bin/uname", f"#!/bin/sh\necho {NOW}\n").chmod(0o755)
        self.put("etc/os-release", "ID=debian\nVERSION_ID=12\n")
        architecture = subprocess.run(
            ["dpkg", "--print-architecture"], capture_output=True, text=True, check=True
        ).stdout.strip()
        self.put("var/lib/dpkg/status", STATUS.format(k=NOW, a=architecture, v="6.1.1-1"))
        self.put("var/lib/dpkg/available", "")
        (root / "var/lib/dpkg/info").mkdir()
        (root / "var/lib/dpkg/updates").mkdir()

    def put(self, path: str, text: str = "") -> Path:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def kernel(self, release: str, initrd: str | None = "cpio", nouveau: bool = False) -> None:
        self.put(f"boot/vmlinuz-{release}")
        module = "kernel/drivers/gpu/drm/nouveau/nouveau.ko: kernel/x.ko\n" if nouveau else ""
        self.put(f"lib/modules/{release}/modules.dep", f"kernel/fs/ext4/ext4.ko:\n{module}")
        if initrd is not None:
            self.put(f"boot/initrd.img-{release}", initrd)

    def program(self, name: str, body: str) -> None:
        self.put(f"bin/{name}", f"#!/bin/sh\n{body}\n").chmod(0o755)

    def shell(self, command: str) -> subprocess.CompletedProcess[str]:
        """The command on this tree: its absolute paths lead there."""
        roots = "etc/|boot|var/|run/modprobe|usr/lib/modprobe|lib/mod"
        command = re.sub(rf"(?<![\w.$}}*/-])/(?={roots})", f"{self.root}/", command)
        library = str(self.root / "var/lib/dpkg")
        return subprocess.run(
            ["sh", "-c", command],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env={"PATH": f"{self.bin}:{os.environ['PATH']}", "DPKG_ADMINDIR": library},
        )

    def picture(self) -> KernelPicture:
        done = self.shell(str(KernelFacts().command()))
        assert (done.returncode, done.stderr) == (0, "")
        return KernelFacts().process(done.stdout.splitlines())


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_kernels_are_what_boot_has(host: Host):
    host.kernel(OLD, initrd=None)
    host.kernel(NOW)
    host.kernel(NEW, initrd="")
    host.put(f"lib/modules/{NOW}/build/include/x.h")
    for junk in ("boot/vmlinuz-0-rescue-abc", f"boot/vmlinuz-{NOW}.dpkg-new", "boot/config-1"):
        host.put(junk)
    found = host.picture()
    assert [kernel.release for kernel in found.kernels] == [OLD, NOW, NEW]
    assert [kernel.initrd_bytes for kernel in found.kernels] == [None, 4, 0]
    assert [kernel.headers for kernel in found.kernels] == [False, True, False]
    assert (found.os, found.os_version, found.running) == ("debian", "12", NOW)
    assert not found.grub.present
    assert found.next_boot.release == NEW
    assert found.boot_free_kib > 0


def test_packages_are_those_of_kernel_and_driver_and_holds_are_all(host: Host):
    found = host.picture()
    assert [(p.name, p.version, p.source, p.held) for p in found.packages] == [
        ("libnvidia-ml1:i386", "535.1", "nvidia-graphics-drivers", False),
        (f"linux-image-{NOW}", "6.1.1-1", "linux-signed", True),
    ]
    assert found.holds == {f"linux-image-{NOW}", "linux-image-oem"}
    assert "libnvidia-ml1" in {name.partition(":")[0] for name in found.audit}


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("updates/dkms/nvidia.ko.zst", "nvidia"),
        ("updates/dkms/nvidia-current.ko", "nvidia-current"),
        ("updates/dkms/nvidia-current-open.ko", "nvidia-current-open"),
        ("updates/dkms/nvidia-tesla-470.ko", "nvidia-tesla-470"),
        ("updates/dkms/nvidia-current-uvm.ko", None),
        ("kernel/drivers/video/fbdev/nvidia/nvidiafb.ko", None),
    ],
)
def test_the_module_is_what_modinfo_says_of_it(host: Host, file: str, name: str | None):
    host.kernel(NOW)
    host.put(f"lib/modules/{NOW}/modules.dep", f"{file}: kernel/x.ko\n")
    host.program(
        "modinfo",
        f'[ "$1 $2 $3" = "-k {NOW} {name}" ] || exit 1\n'
        "cat <<'X'\nfilename:       /x.ko\nversion:        535.247.01\n"
        "license:        Dual MIT/GPL\n"
        f"signer:         DKMS: key\nvermagic:       {NOW} SMP\nlicense:        other\nX",
    )
    module = host.picture().kernels[0].module
    if name is None:
        assert module is None
    else:
        assert module is not None
        assert (module.name, module.version, module.license) == (name, "535.247.01", "Dual MIT/GPL")
        assert (module.vermagic, module.signer) == (f"{NOW} SMP", "DKMS: key")


class TestDkms:
    @pytest.fixture(autouse=True)
    def tree(self, host: Host) -> Path:
        for release in (NOW, NEW):
            host.kernel(release)
        version = host.root / "var/lib/dkms/nvidia-current/535.1"
        version.mkdir(parents=True)
        (version / "source").symlink_to("/usr/src/nvidia-current-535.1")
        return version

    def test_added_is_not_built(self, host: Host):
        states = [kernel.dkms for kernel in host.picture().kernels]
        assert states == [(("nvidia-current/535.1", "added"),)] * 2

    def test_installed_is_built_and_linked(self, host: Host, tree: Path):
        for release in (NOW, NEW):
            (tree / release / "x86_64" / "module").mkdir(parents=True)
        (tree.parent / f"kernel-{NOW}-x86_64").symlink_to(f"535.1/{NOW}/x86_64")
        states = [kernel.dkms[0][1] for kernel in host.picture().kernels]
        assert states == ["installed", "built"]

    def test_a_failed_build_is_told_for_its_kernel_by_its_first_error(self, host: Host, tree: Path):
        log = f"DKMS make.log for nvidia-current-535.1 for kernel {NEW} (x86_64)\nThu\n"
        log += "cc -Werror=x\n  nv.c:12:3: error: too few arguments\nmake: *** [x] Error 2\n"
        (tree / "build").mkdir()
        (tree / "build/make.log").write_text(log)
        now, new = host.picture().kernels
        assert now.dkms_error == ""
        assert new.dkms_error == "nv.c:12:3: error: too few arguments"


class TestNouveau:
    def listing(self, host: Host) -> None:
        host.program("lsinitramfs", f'echo "$1" >> {host.root}/listed; cat "$1"')

    def listed(self, host: Host) -> bool:
        return (host.root / "listed").exists()

    def test_is_looked_for_in_the_initrd_where_nothing_keeps_it_out(self, host: Host):
        self.listing(host)
        host.kernel(NOW, initrd="usr/lib/modules/x/nouveau/nouveau.ko\n", nouveau=True)
        host.kernel(NEW, initrd="usr/lib/modules/x/ext4.ko\n", nouveau=True)
        found = host.picture()
        assert [kernel.nouveau_in_initrd for kernel in found.kernels] == [True, False]
        assert not found.nouveau_blacklisted

    def test_stays_out_of_an_initrd_that_was_made_after_the_file_that_keeps_it_out(
        self, host: Host
    ):
        """update-initramfs copies modprobe.d; the module may well be in there."""
        self.listing(host)
        host.put("etc/modprobe.d/x.conf", "# nouveau\nblacklist nouveau\n")
        time.sleep(1.1)
        host.kernel(NOW, initrd="nouveau/nouveau.ko\n", nouveau=True)
        found = host.picture()
        assert found.nouveau_blacklisted
        assert not found.kernels[0].nouveau_in_initrd
        assert not self.listed(host)

    def test_is_looked_for_in_an_initrd_that_is_older(self, host: Host):
        self.listing(host)
        host.kernel(NOW, initrd="nouveau/nouveau.ko\n", nouveau=True)
        os.utime(host.root / f"boot/initrd.img-{NOW}", (1, 1))
        host.put("etc/modprobe.d/x.conf", "blacklist nouveau\n")
        assert host.picture().kernels[0].nouveau_in_initrd

    def test_is_not_looked_for_where_the_kernel_has_none(self, host: Host):
        self.listing(host)
        host.kernel(NOW)
        assert not host.picture().kernels[0].nouveau_in_initrd
        assert not self.listed(host)


def test_grub_is_its_settings_and_what_was_made_of_them(host: Host):
    host.kernel(NOW)
    host.put(
        "boot/grub/grub.cfg",
        'if [ "${next_entry}" ] ; then\n   set default="${next_entry}"\nelse\n'
        '   set default="${saved_entry}"\nfi\n'
        "menuentry 'D' --class os $menuentry_id_option 'gnulinux-simple-u' {\n"
        f"\tif [ x = y ]; then insmod z; fi\n\tlinux\t/vmlinuz-{NEW} ro\n\tinitrd /x\n}}\n"
        "submenu 'A' $menuentry_id_option 'adv' {\n"
        f"\tmenuentry 'L' $menuentry_id_option 'gnulinux-{NOW}-advanced-u' {{\n"
        f"\t\tlinux\t/vmlinuz-{NOW} ro\n\t}}\n}}\n",
    )
    entry = f"adv>gnulinux-{NOW}-advanced-u"
    host.put("boot/grub/grubenv", f"# GRUB Environment Block\nsaved_entry={entry}\n####")
    host.put("etc/default/grub", "GRUB_DEFAULT=0\nGRUB_DISTRIBUTOR=`echo noise; echo more >&2`\n")
    host.put("etc/default/grub.d/a.cfg", "GRUB_TIMEOUT=0\n")
    host.put("etc/default/grub.d/b.cfg", "V=saved\nGRUB_DEFAULT=$V\n")
    found = host.picture()
    assert (found.grub.present, found.grub.default) == (True, "saved")
    assert found.grub.dropins == (f"{host.root}/etc/default/grub.d/b.cfg",)
    assert found.grub.entries == (("gnulinux-simple-u", NEW), (entry, NOW))
    assert found.next_boot.release == NOW
    assert found.next_boot.reason == f"saved_entry {entry}"


def test_the_pins_own_files_records_and_notes_are_told(host: Host):
    host.put(GRUB, "x")
    host.put(f"var/lib/gpufleet/written{host.root}{GRUB}", "abc\n")
    host.put(PIN, f"{NOW}\n")
    host.put(HOLDS, "linux-generic\nlinux-image-generic\n")
    found = host.picture()
    assert found.pinned == NOW
    assert found.own_holds == ("linux-generic", "linux-image-generic")
    assert found.managed.present[f"{host.root}{GRUB}"].mode == "644"
    assert found.managed.records[f"{host.root}{GRUB}"].sha256 == "abc"


def test_preferences_are_those_that_apt_reads_and_that_name_kernel_or_driver(host: Host):
    host.put("etc/apt/preferences", "Package: linux-*\nPin: version *\nPin-Priority: 5")
    host.put("etc/apt/preferences.d/a", "Package: bash\nPin: version *\nPin-Priority: 5\n")
    host.put("etc/apt/preferences.d/b.pref", "Package: nvidia-smi\n\tbash\nPin-Priority: 5\n")
    host.put("etc/apt/preferences.d/c.bak", "Package: linux-*\n")
    host.put("etc/apt/preferences.d/d~", "Package: linux-*\n")
    found = [(Path(path).name, text) for path, text in host.picture().preferences]
    assert [name for name, _ in found] == ["preferences", "b.pref"]
    assert found[1][1].startswith("Package: nvidia-smi\n\tbash\nPin-Priority: 5\n")


class TestHolding:
    @pytest.fixture(autouse=True)
    def apt_mark(self, host: Host) -> None:
        """Holds in a file a name; `dpkg-query` knows of those that are installed."""
        host.program(
            "apt-mark",
            f'cd {host.root}; echo "$*" >> marked\n'
            "if [ -s busy ]; then cp busy left; sed 1d left > busy\n"
            'echo "E: lock" >&2; exit 100; fi\n'
            'how=$1; shift; for n; do if [ $how = hold ]; then : > "held-$n"; '
            'else rm -f "held-$n"; fi; done',
        )
        host.program(
            "dpkg-query",
            f'for n; do :; done; s=installed; [ "$n" = gone ] && s=not-installed\n'
            f'if [ -e "{host.root}/held-$n" ]; then printf "hold $s"; else printf "install $s"; fi',
        )
        host.program("sleep", "exit 0")

    def held(self, host: Host) -> set[str]:
        return {path.name.removeprefix("held-") for path in host.root.glob("held-*")}

    def test_holds_lets_go_and_notes_what_is_its_own(self, host: Host):
        host.put("held-old")
        host.put("held-rsync")
        done = host.shell(str(script(_HOLD, "old", "a b", "a b c")))
        assert (done.returncode, done.stderr) == (0, "")
        assert self.held(host) == {"a", "b", "rsync"}
        assert (host.root / HOLDS[1:]).read_text() == "a\nb\nc\n"

    def test_waits_for_dpkg(self, host: Host):
        host.put("busy", "1\n2\n3\n")
        assert host.shell(str(script(_HOLD, "", "a", "a"))).returncode == 0
        assert (host.root / "marked").read_text() == "hold a\n" * 4

    def test_fails_in_one_line_where_a_hold_is_not_in_force(self, host: Host):
        done = host.shell(str(script(_HOLD, "", "a gone b", "a gone b")))
        assert done.returncode == 1
        assert done.stderr == (
            "gone reads 'hold not-installed', not 'hold installed': run apt-mark hold gone, see "
            "what it says\n"
        )

    def test_leaves_nothing_noted_when_nothing_is_its_own(self, host: Host):
        host.put(HOLDS, "old\n")
        assert host.shell(str(script(_HOLD, "old", "", ""))).returncode == 0
        assert not (host.root / HOLDS[1:]).exists()

    def test_the_pin_is_noted(self, host: Host):
        assert host.shell(str(script(_NOTE, NOW))).returncode == 0
        assert (host.root / PIN[1:]).read_text() == f"{NOW}\n"
