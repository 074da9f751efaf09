"""Which device a model runs on, and in which precision it can there."""

from __future__ import annotations

import importlib.util

import torch

from .engine import DeviceLost, ModelDemoError
from .precision import Precision
from .quantised import BITS

_OTHERWISE = "set precision to auto and low_resource to False"


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device; raises ModelDemoError where torch sees no GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelDemoError(
            "--device cuda: torch sees no GPU; check nvidia-smi and that torch is a CUDA build, "
            "or use --device cpu"
        )
    # The first that the process sees, and never another.
    return torch.device("cuda:0" if name == "cuda" else name)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that the GPU had no memory: CUDA's libraries have their own words."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


_NO_MEMORY = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DEVICE_ALLOCATION_FAILED",
)


def require_alive(device: torch.device) -> None:
    """Raise DeviceLost where an error has ended the process's use of its GPU.

    After an illegal access, a fault of the memory or a GPU that fell off the bus, CUDA answers
    every call of the process with that error, for as long as it lives.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise DeviceLost(
            f"the GPU has failed ({reason}) and the service starts again; if it comes back, look "
            "for Xid in dmesg on the host"
        ) from error


def choose_precision(asked: Precision, device: torch.device) -> Precision:
    """What `auto` means on this device; raises ModelDemoError where the device cannot."""
    if asked == "auto":
        return "fp16" if device.type == "cuda" else "fp32"
    if asked in BITS:
        if device.type != "cuda":
            raise ModelDemoError(f"model.precision: {asked} weights need a GPU; {_OTHERWISE}")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ModelDemoError(
                f"model.precision: {asked} weights need bitsandbytes; install it, or {_OTHERWISE}"
            )
    if asked == "fp16" and device.type != "cuda":
        raise ModelDemoError(
            "model.precision: fp16 needs a GPU; on a CPU set it to auto, fp32 or bf16"
        )
    if asked == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise ModelDemoError(
            "model.precision: this GPU has no bf16, which came with Ampere; set it to fp16"
        )
    return asked
