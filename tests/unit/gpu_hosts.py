"""Pictures of healthy GPU hosts for tests to spoil, and what apt said on real ones.

The texts are `apt-get -s dist-upgrade` of real archives, on hosts that had an older kernel and
driver of the same archive; lines about other packages are left out, and the mirrors' names are
changed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from gpufleet.driver.picture import Gpu, GpuPicture, Smi
from gpufleet.kernel.picture import Grub, Kernel, KernelPicture, Module, NextBoot, Package
from gpufleet.settings import Settings, parse
from gpufleet.upgrade import plan
from gpufleet.upgrade.plan import Upgrade

TEXTS = Path(__file__).parent / "texts"

DEBIAN_OLD, DEBIAN_NEW = "6.1.0-50-amd64", "6.1.0-56-amd64"
UBUNTU_OLD, UBUNTU_NEW = "6.8.0-31-generic", "6.8.0-149-generic"


def text(name: str) -> str:
    return (TEXTS / f"{name}.txt").read_text("utf-8")


def upgrade(name: str, unattended: str | None = None, **changes: Any) -> Upgrade:
    """What the fact makes of apt's words; `unattended` names the host's configuration."""
    system = {
        "debian-12": "ID=debian\nVERSION_CODENAME=bookworm",
        "ubuntu-24.04": "VERSION_CODENAME=noble\nID=ubuntu",
    }
    lines = ["== simulation", *text(f"apt-{name}").splitlines(), "== lists", "3600"]
    if unattended:
        dump, _, policy = text(f"unattended-{unattended}").partition("Package files:")
        lines = ["== system", *system[unattended].splitlines(), *lines]
        lines += ["== unattended", *dump.splitlines(), "timer=enabled"]
        lines += ["== origins", "Package files:", *policy.splitlines()]
    return replace(plan.parse(lines), **changes)


NOTHING = Upgrade(available=True, lists_age_s=3600)


def package(name: str, version: str = "1", want: str = "install", status: str = "installed") -> Any:
    return Package(name, version, "", want, status)


def module(release: str, version: str, **changes: Any) -> Module:
    made = Module("nvidia", version, f"{release} SMP preempt mod_unload modversions ", "NVIDIA", "")
    return replace(made, **changes)


def gpus(version: str, **changes: Any) -> GpuPicture:
    """Two T4s that work."""
    cards = ("0000:17:00.0", "0000:65:00.0")
    answers = tuple((f"0000{card}", "Tesla T4", 15360) for card in cards)
    picture = GpuPicture(
        gpus=tuple(Gpu(card, "1eb8", "nvidia") for card in cards),
        smi=Smi(True, answers, version, ""),
        loaded=version,
        userland=version,
        nouveau_loaded=False,
        refcount=1,
        holders=("nvidia-persiste (pid 600)",),
        nvswitch=False,
        persistenced="active",
        fabricmanager="absent",
        fabricmanager_version="",
        devices=("nvidia-uvm", "nvidia0", "nvidia1", "nvidiactl"),
    )
    return replace(picture, **changes)


def debian(**changes: Any) -> KernelPicture:
    """Debian 12 on an older kernel of its archive, the module built by DKMS."""
    kernel = Kernel(
        DEBIAN_OLD,
        headers=True,
        initrd_bytes=40 * 2**20,
        nouveau_in_initrd=False,
        module=module(DEBIAN_OLD, "535.261.03", name="nvidia-current"),
        dkms=(("nvidia-current/535.261.03", "installed"),),
    )
    names = (
        f"linux-image-{DEBIAN_OLD}",
        f"linux-headers-{DEBIAN_OLD}",
        "linux-image-amd64",
        "linux-headers-amd64",
    )
    driver = ("nvidia-kernel-dkms", "nvidia-smi", "libcuda1", "libnvidia-ml1")
    packages = [package(name, "6.1.176-1") for name in names]
    packages += [package(name, "535.261.03-1") for name in driver]
    return _picture("debian", "12", kernel, tuple(packages), changes)


def ubuntu(dkms: bool = False, **changes: Any) -> KernelPicture:
    """Ubuntu 24.04 on the kernel it was released with, the module prebuilt or by DKMS."""
    made = (("nvidia-srv/535.161.08", "installed"),) if dkms else ()
    signer = "" if dkms else "Canonical Ltd. Kernel Module Signing"
    kernel = Kernel(
        UBUNTU_OLD,
        headers=True,
        initrd_bytes=60 * 2**20,
        nouveau_in_initrd=False,
        module=module(UBUNTU_OLD, "535.161.08", signer=signer),
        dkms=made,
    )
    kernels = ("linux-generic", "linux-image-generic", "linux-headers-generic")
    names = [*kernels, f"linux-image-{UBUNTU_OLD}", f"linux-headers-{UBUNTU_OLD}"]
    driver = ["nvidia-utils-535-server", "libnvidia-compute-535-server"]
    if dkms:
        driver += ["nvidia-dkms-535-server", "nvidia-headless-535-server"]
    else:
        names.append("linux-modules-nvidia-535-server-generic")
        names.append(f"linux-modules-nvidia-535-server-{UBUNTU_OLD}")
        driver.append("nvidia-headless-no-dkms-535-server")
    packages = [package(name, "6.8.0-31.31") for name in names]
    packages += [package(name, "535.161.08-0ubuntu2") for name in driver]
    return _picture("ubuntu", "24.04", kernel, tuple(packages), changes)


def _picture(
    os: str, version: str, kernel: Kernel, packages: tuple[Package, ...], changes: dict[str, Any]
) -> KernelPicture:
    picture = KernelPicture(
        family="debian",
        os=os,
        os_version=version,
        running=kernel.release,
        boot_id="5f3c",
        kernels=(kernel,),
        next_boot=NextBoot(kernel.release, "first entry of grub.cfg"),
        grub=Grub(present=True, default="0", env_writable=True),
        boot_free_kib=800 * 1024,
        secure_boot=False,
        packages=packages,
        holds=frozenset(),
    )
    return replace(picture, **changes)


def held(picture: KernelPicture, *names: str) -> KernelPicture:
    """The same with these packages held, in force where they are installed."""
    packages = tuple(
        replace(each, want="hold") if each.name in names else each for each in picture.packages
    )
    return replace(picture, packages=packages, holds=picture.holds | set(names))


def settings(**values: Any) -> Settings:
    return parse({"accelerator": "cuda", **values}, "gpu1")
