"""Puts bitsandbytes' 8-bit and 4-bit layers into a model that has no weights yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .precision import Precision

BITS = ("8bit", "4bit")


@dataclass(frozen=True)
class Quantiser:
    """Which tensors are quantised, and how one of them becomes a parameter on the device."""

    names: frozenset[str]
    parameter: Callable[[Tensor], Any]

    def __call__(self, value: Tensor, device: torch.device) -> nn.Parameter:
        """bitsandbytes quantises while it moves a parameter to its device."""
        quantised: nn.Parameter = self.parameter(value).to(device)
        return quantised


def prepare(model: nn.Module, precision: Precision, dtype: torch.dtype) -> Quantiser:
    """Exchange every Linear of a language model, as transformers does; lm_head stays as it is.

    The names are those of its state_dict. 8bit is LLM.int8() with outliers above 6.0 kept apart;
    4bit is nf4 that computes in `dtype`.
    """
    import bitsandbytes as bnb

    names = set()
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        size = (module.in_features, module.out_features, module.bias is not None)
        new: nn.Module
        if precision == "8bit":
            new = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False, threshold=6.0, device="meta")
        else:
            new = bnb.nn.Linear4bit(*size, compute_dtype=dtype, quant_type="nf4", device="meta")
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
        names.add(f"{name}.weight")
    if precision == "8bit":
        return Quantiser(
            frozenset(names),
            lambda value: bnb.nn.Int8Params(value, requires_grad=False, has_fp16_weights=False),
        )
    return Quantiser(
        frozenset(names),
        lambda value: bnb.nn.Params4bit(value, requires_grad=False, quant_type="nf4"),
    )
