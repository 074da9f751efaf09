"""Says of every kernel whether the GPU works on it, with every reason why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gpufleet.driver.picture import GpuPicture
from gpufleet.kernel.picture import KernelPicture

Flavour = Literal["open", "proprietary"]

#: Licence of the module -> its flavour (NVIDIA's kernel-open/nvidia/nv.c and its proprietary twin).
FLAVOURS: dict[str, Flavour] = {"Dual MIT/GPL": "open", "NVIDIA": "proprietary"}

#: What an initrd can grow by when a driver's module and firmware get into it, and what a kernel
#: that comes new takes of /boot beside its initrd's size so far, KiB.
INITRD_GROWTH_KIB = 130 * 1024
NEW_KERNEL_KIB = INITRD_GROWTH_KIB + 30 * 1024


@dataclass(frozen=True)
class Problem:
    """One reason why the GPU would not work: a code for programs, words for people."""

    code: str
    text: str


def problems(
    picture: KernelPicture,
    gpus: GpuPicture,
    release: str,
    allowed: frozenset[Flavour] = frozenset({"open", "proprietary"}),
) -> tuple[Problem, ...]:
    """Every reason why the GPU would not work on this kernel; none means that it would.

    `allowed` are the module flavours that every GPU of the host takes (catalog/drivers.yaml).
    """
    kernel = picture.kernel(release)
    if kernel is None:
        return (Problem("not-installed", f"kernel {release} is not installed"),)
    found: list[Problem] = []
    module = kernel.module
    if module is None:
        why = f": the DKMS build failed: {kernel.dkms_error}" if kernel.dkms_error else ""
        if not kernel.headers:
            found.append(Problem("no-headers", f"no headers for kernel {release}{why}"))
        found.append(Problem("no-module", f"no NVIDIA module for kernel {release}{why}"))
    else:
        if gpus.userland and module.version != gpus.userland:
            text = f"module {module.version} does not match the libraries {gpus.userland}"
            found.append(Problem("version", text))
        if module.vermagic.split(" ", 1)[0] != release:
            text = f"the module was built for kernel {module.vermagic.split(' ', 1)[0]}"
            found.append(Problem("vermagic", text))
        flavour = FLAVOURS.get(module.license)
        if flavour is not None and flavour not in allowed:
            text = f"the {flavour} module does not drive this host's GPUs"
            found.append(Problem("flavour", text))
        if picture.secure_boot and not module.signer:
            found.append(Problem("unsigned", "Secure Boot is on and the module is not signed"))
        elif picture.secure_boot and module.signer not in (
            picture.trusted_signers or (module.signer,)
        ):
            text = f"Secure Boot is on and {module.signer}, who signed the module, is not enrolled"
            found.append(Problem("unsigned", text))
    if not kernel.initrd_bytes:
        found.append(Problem("no-initrd", f"no initrd for kernel {release}"))
    if kernel.nouveau_in_initrd:
        found.append(Problem("nouveau", f"nouveau is in the initrd of kernel {release}"))
    return tuple(found)
