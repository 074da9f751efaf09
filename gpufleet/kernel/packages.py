"""Which packages make up kernels and the NVIDIA driver, by their names and source packages."""

from __future__ import annotations

import re

#: A kernel by its release, on Debian (signed or not) and Ubuntu.
IMAGE = re.compile(r"linux-image-(?:unsigned-)?(?P<release>\d+\.\d+\.\d+\S*?)(?:-unsigned|-dbg)?$")
HEADERS = re.compile(r"linux-headers-(?P<release>\d+\.\d+\.\d+\S*)$")
#: Ubuntu's modules, built for one kernel by the archive.
PREBUILT = re.compile(
    r"linux-modules-nvidia-(?P<branch>\d+)(?P<kind>(?:-server)?(?:-open)?)"
    r"-(?P<release>\d+\.\d+\.\d+\S*)$"
)
#: Ubuntu's modules, of one kernel or of whatever kernel is newest.
_MODULES = re.compile(r"linux-(?:modules|objects|signatures)-nvidia-")
#: Sources of the module that DKMS builds: nvidia-kernel-dkms, nvidia-dkms-535-server …
_DKMS = re.compile(r"nvidia-(?!\S*no-dkms)\S*dkms\S*$")
#: The libraries whose version the module must have: Debian's and NVIDIA's libnvidia-ml1, Ubuntu's
#: libnvidia-compute-BRANCH.
_LIBRARY = re.compile(
    r"libnvidia-(?:tesla-(?:\d+-)?)?ml1$|libnvidia-compute(?:-\d+(?:-server)?(?:-open)?)?$"
)
#: What has the name and is not of the driver: containers' tools, CUDA's own, desktop programs.
_BESIDE = re.compile(
    r"(?:lib)?nvidia-(?:container|docker|cuda-|cudnn|cg-|visual|nsight|settings|vaapi)"
)
#: dnf has the module as kmod-nvidia-… or, from a modularity stream, as mod-nvidia-….
_DRIVER = re.compile(
    r"(?:lib)?nvidia-|k?mod-nvidia-|libcuda1|cuda-drivers|firmware-nvidia-|xserver-xorg-video-nvidia"
)
_DRIVER_SOURCE = re.compile(r"nvidia-(?:graphics-drivers|open-gpu|persistenced|modprobe)|fabric-")
_KERNEL = re.compile(
    r"linux-(?:image|headers|modules|modules-extra|generic|virtual|lowlatency|aws|azure|gcp|gke"
    r"|oracle|kvm|nvidia|oem|ibm)(?:-|$)"
)
_RELEASE = re.compile(r"\d+\.\d+\.\d+")


def bare(name: str) -> str:
    """A package's name without its architecture: libnvidia-ml1:i386 is libnvidia-ml1."""
    return name.partition(":")[0]


def is_meta(name: str, source: str = "") -> bool:
    """Whether a package follows whatever kernel is newest: the leaks of a pin."""
    named = bare(name)
    if _RELEASE.search(named):
        return False
    return bool(source.startswith("linux-meta") or _KERNEL.match(named) or _MODULES.match(named))


def is_modules(name: str) -> bool:
    """Whether a package holds modules that Ubuntu's archive built, or leads to such."""
    return bool(_MODULES.match(name))


def is_driver(name: str, source: str = "") -> bool:
    """Whether a package is part of the driver, kernel modules that the archive built excepted."""
    if _BESIDE.match(name):
        return False
    return bool(_DRIVER.match(name) or _DRIVER_SOURCE.match(source))


def is_library(name: str) -> bool:
    """Whether a package holds the libraries whose version the module must have."""
    return bool(_LIBRARY.match(name))


def is_dkms(name: str) -> bool:
    """Whether a package holds the source of the module that DKMS builds."""
    return bool(_DKMS.match(name))


def concerns_gpu(name: str) -> bool:
    """Whether a package is of a kernel or of the driver."""
    return bool(_KERNEL.match(name) or _MODULES.match(name)) or is_driver(name)
