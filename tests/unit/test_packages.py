"""Package names: what is held, foretold and looked at goes by one list."""

from __future__ import annotations

import pytest

from gpufleet.kernel.packages import concerns_gpu, is_dkms, is_driver, is_library, is_meta

METAS = [
    "linux-generic",
    "linux-image-generic-hwe-24.04",
    "linux-image-generic-hwe-22.04-edge",
    "linux-headers-cloud-amd64",
    "linux-modules-nvidia-535-server-generic",
    "linux-modules-nvidia-535-generic-hwe-22.04-edge",
    "linux-image-6.12-amd64",
]
OF_A_KERNEL = [
    "linux-image-6.1.0-50-amd64",
    "linux-headers-6.8.0-31",
    "linux-modules-nvidia-535-6.8.0-40-generic",
]
OF_THE_DRIVER = [
    "nvidia-driver",
    "nvidia-kernel-dkms",
    "libnvidia-ml1",
    "libnvidia-compute-535-server",
    "libcuda1",
    "cuda-drivers-580",
    "firmware-nvidia-gsp",
    "kmod-nvidia-open-dkms",
    "xserver-xorg-video-nvidia",
]
NEITHER = [
    "linux-libc-dev",
    "linux-base",
    "linux-firmware",
    "nvidia-container-toolkit",
    "libnvidia-container1",
    "nvidia-docker2",
    "nvidia-cuda-toolkit",
    "nvidia-settings",
    "nvidia-vaapi-driver",
    "nvidia-visual-profiler",
    "rsync",
]


@pytest.mark.parametrize("name", [*METAS, *OF_A_KERNEL, *OF_THE_DRIVER, *NEITHER])
def test_a_name_is_of_one_kind(name: str):
    assert is_meta(name) is (name in METAS)
    assert is_driver(name) is (name in OF_THE_DRIVER)
    assert concerns_gpu(name) is (name not in NEITHER)


def test_a_source_tells_where_a_name_does_not():
    assert is_meta("linux-tools-generic", "linux-meta-hwe-6.8")
    assert not is_meta("linux-tools-6.8.0-40", "linux-meta")
    assert is_driver("libegl-nvidia0", "nvidia-graphics-drivers")
    assert not is_driver("libegl-nvidia0")
    assert is_driver("nvidia-fabricmanager-535", "fabric-manager-535")


def test_an_architecture_is_not_part_of_a_name():
    assert is_meta("linux-image-generic:amd64")


@pytest.mark.parametrize(
    ("name", "library", "dkms"),
    [
        ("libnvidia-ml1", True, False),
        ("libnvidia-tesla-470-ml1", True, False),
        ("libnvidia-compute-535-server", True, False),
        ("libnvidia-encode1", False, False),
        ("nvidia-kernel-dkms", False, True),
        ("nvidia-dkms-535-server-open", False, True),
        ("nvidia-kernel-common-no-dkms", False, False),
    ],
)
def test_libraries_and_sources_of_the_module(name: str, library: bool, dkms: bool):
    assert (is_library(name), is_dkms(name)) == (library, dkms)
