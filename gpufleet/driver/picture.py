"""What a host's GPUs and their driver are, as far as the running system shows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA display controller (vendor 10de, class 0x03*) on the PCI bus."""

    address: str
    """Such as 0000:17:00.0."""
    device: str
    """PCI device id, four hex digits in lower case, such as 20b5."""
    driver: str
    """The kernel driver that is bound: nvidia, nouveau, vfio-pci, or empty."""


@dataclass(frozen=True)
class Smi:
    """What nvidia-smi says."""

    installed: bool
    gpus: tuple[tuple[str, str, int], ...] = ()
    """(PCI address, name, memory in MiB) of every GPU it lists."""
    driver: str = ""
    error: str = ""
    """Its complaint where it fails, such as `Failed to initialize NVML: Driver/library version
    mismatch`; empty where it answered."""


@dataclass(frozen=True)
class Offer:
    """A driver package that the host's apt would install."""

    package: str
    version: str
    moved_to: str = ""
    """The other branch that it stands for today: nvidia-headless-no-dkms-535-server depends on
    580's, and who asks for it gets that. Empty for a package that is what it says."""


@dataclass(frozen=True)
class GpuPicture:
    """Everything about a host's GPUs and driver, read by one script in one round trip."""

    gpus: tuple[Gpu, ...]
    smi: Smi
    loaded: str
    """Version of the module that is loaded (/sys/module/nvidia/version), empty if none is."""
    userland: str
    """Version of the driver's libraries (libnvidia-ml.so.*), empty if none is installed."""
    nouveau_loaded: bool
    refcount: int
    """How often the loaded modules are in use; 0 lets them be unloaded."""
    holders: tuple[str, ...]
    """Processes that have /dev/nvidia* open, as `NAME (pid N)`."""
    nvswitch: bool
    """NVSwitches that need the fabric manager: /proc/driver/nvidia-nvswitch/devices, or PCI
    bridges of NVIDIA's (class 0x0680), or SW_MNG in an InfiniBand VPD for NVLink 5."""
    persistenced: str
    """ActiveState of nvidia-persistenced.service, `absent` without the unit."""
    fabricmanager: str
    """ActiveState of nvidia-fabricmanager.service, `absent` without the unit."""
    fabricmanager_version: str
    devices: tuple[str, ...]
    """Names of /dev/nvidia*."""
    owned: tuple[tuple[str, str], ...] = ()
    """(path, `MODE SHA256`) of the files of `files.OWNED` that are on the host."""
    lost: tuple[str, ...] = ()
    """PCI addresses of GPUs that fell off the bus: their configuration space answers only ones, or
    the module still has them and the bus does not."""
    offers: tuple[Offer, ...] = ()
    """What the host's package sources have of the driver; asked only where there is a GPU."""
