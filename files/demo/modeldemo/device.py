"""Which device a model runs on, and in which precision it can there."""

from __future__ import annotations

import importlib.util

import torch

from .engine import ModelDemoError
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
