"""Loads a configured MiniGPT-4: small checks first, then the weights, one file at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.llama.configuration_llama import LlamaConfig

from ..device import choose_device, choose_precision, ran_out
from ..engine import ModelDemoError
from ..precision import Precision
from ..quantised import BITS, prepare
from .checkpoints import (
    check_language,
    load_llama,
    load_projection,
    load_qformer,
    load_vit,
    read_llama_config,
    read_projection,
)
from .model import MiniGPT4
from .settings import Settings
from .tokenizer import Tokenizer

#: What a precision keeps the LLaMA in, or what its quantised layers compute in.
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load(settings: Settings, device: str) -> tuple[MiniGPT4, Tokenizer]:
    """The model on `auto`, `cpu` or `cuda`, and its tokenizer; raises ModelDemoError, one line."""
    place = choose_device(device)
    precision = choose_precision(settings.precision, place)
    config = read_llama_config(settings.llama)
    tokenizer = Tokenizer(settings.llama / "tokenizer.model")
    # Cheap, and the mistakes that are made most often: seen before gigabytes are read.
    read_projection(settings.projection, settings.sizes, config.hidden_size)
    check_language(settings.llama, config, tokenizer.size)
    try:
        model = assemble(settings, config, place, precision)
    except RuntimeError as error:
        if not ran_out(error):
            raise
        raise ModelDemoError(
            f"{settings.llama}: the weights do not fit the GPU's memory in {precision}; set "
            "model.precision to 8bit or 4bit, or take the 7B model"
        ) from error
    return model, tokenizer


def assemble(
    settings: Settings, config: LlamaConfig, device: torch.device, precision: Precision
) -> MiniGPT4:
    """The model with its weights, each of which passes through host memory alone.

    Between the files and the device there is never more than one tensor: host memory holds the
    mapped pages of one file, which the system takes back when it needs them.
    """
    # Without memory at first: each tensor is put in place once, converted on the way.
    with torch.device("meta"):
        model = MiniGPT4(settings.sizes, config)
    dtype = _DTYPES.get(precision, torch.float16 if device.type == "cuda" else torch.float32)
    quantise = None
    if precision in BITS:
        quantise = prepare(model.llama, precision, dtype)
    halves = _halves(model, settings) if device.type == "cuda" and precision != "fp32" else set()

    def place(name: str, value: Tensor) -> Tensor:
        if quantise and name.removeprefix("llama.") in quantise.names:
            return quantise(value.to(dtype), device)
        if name.startswith("llama."):
            kind = dtype
        else:
            kind = torch.float16 if name in halves else torch.float32
        # Converted where it goes, so that host memory holds no second one.
        moved = value.to(device) if device.type == "cuda" else value
        # A copy always: a mapped tensor would change, or crash the process, with its file.
        return moved.to(device=device, dtype=kind, copy=moved is value)

    load_vit(model, settings.vit, place)
    load_qformer(model, settings.qformer, place)
    load_projection(model, settings.projection, place)
    load_llama(model, settings.llama, place)
    return model.requires_grad_(False)


def _halves(model: MiniGPT4, settings: Settings) -> set[str]:
    """The picture half's tensors that are kept in fp16 on a GPU: those of the ViT's Linear layers.

    Upstream halves the patch convolution too, yet runs it under autocast behind fp32 tokens; kept
    in fp32 it gives the same numbers and the residual stream the precision it had upstream.
    """
    if not settings.half_vit:
        return set()
    return {
        f"vision.{name}.{part}"
        for name, module in model.vision.named_modules()
        if isinstance(module, torch.nn.Linear)
        for part in ("weight", "bias")
    }
