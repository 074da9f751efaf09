"""Loads a configured MiniGPT-4: small checks first, then the weights, one file at a time."""

from __future__ import annotations

import importlib.util
import logging

import torch
from torch import Tensor
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from ..engine import ModelDemoError
from ..precision import Precision
from .checkpoints import (
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

log = logging.getLogger("modeldemo")


def load(settings: Settings, device: str) -> tuple[MiniGPT4, Tokenizer]:
    """The model on `auto`, `cpu` or `cuda`, and its tokenizer; raises ModelDemoError, one line."""
    place = _device(device)
    config = read_llama_config(settings.llama)
    tokenizer = Tokenizer(settings.llama / "tokenizer.model")
    # Cheap, and the mistake that is made most often: seen before gigabytes are read.
    read_projection(settings.projection, settings.sizes, config.hidden_size)
    if settings.precision in ("8bit", "4bit"):
        _require_quantising(settings.precision, place)
    try:
        model = _load(settings, config, place)
    except torch.OutOfMemoryError as error:
        raise ModelDemoError(
            f"{settings.llama}: the weights do not fit the GPU's memory; set model.precision to "
            "8bit or take the 7B model"
        ) from error
    return model, tokenizer


def _load(settings: Settings, config: LlamaConfig, device: torch.device) -> MiniGPT4:
    # Without memory at first: each tensor is put in place once, converted on the way.
    with torch.device("meta"):
        model = MiniGPT4(settings.sizes, config)
    halves = _halves(model, settings) if device.type == "cuda" else frozenset()
    language = _language_dtype(settings.precision, device)

    def place(name: str, value: Tensor) -> Tensor:
        dtype = torch.float32
        if name in halves:
            dtype = torch.float16
        elif name.startswith("llama."):
            dtype = language
        # A copy always: a mapped tensor would change, or crash the process, with its file.
        return value.to(device=device, dtype=dtype, copy=True)

    load_vit(model, settings.vit, place)
    load_qformer(model, settings.qformer, place)
    load_projection(model, settings.projection, place)
    if settings.precision in ("8bit", "4bit"):
        model.llama = _quantised(settings, config)
    else:
        load_llama(model, settings.llama, place)
    return model.requires_grad_(False)


def _halves(model: MiniGPT4, settings: Settings) -> frozenset[str]:
    """The tensors of the picture's half kept in fp16 on a GPU: the ViT's Linear layers.

    Upstream halves the patch convolution too, yet runs it under autocast behind fp32 tokens; kept
    in fp32 it gives the same numbers and the residual stream the precision it had upstream.
    """
    names = set()
    if settings.half_vit:
        for name, module in model.vision.named_modules():
            if isinstance(module, torch.nn.Linear):
                names |= {f"vision.{name}.{part}" for part in ("weight", "bias")}
    return frozenset(names)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelDemoError(
            "--device cuda: torch sees no GPU; check nvidia-smi and that torch is a CUDA build, "
            "or use --device cpu"
        )
    return torch.device(name)


def _language_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    half = torch.float16 if device.type == "cuda" else torch.float32
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}.get(
        precision, half
    )


def _require_quantising(precision: Precision, device: torch.device) -> None:
    if device.type != "cuda":
        raise ModelDemoError(
            f"model.precision: {precision} weights need a GPU; set precision to auto and "
            "low_resource to False"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelDemoError(
            f"model.precision: {precision} weights need bitsandbytes; install it, or set "
            "precision to auto and low_resource to False"
        )


def _quantised(settings: Settings, config: LlamaConfig) -> LlamaForCausalLM:
    from transformers import BitsAndBytesConfig

    return LlamaForCausalLM.from_pretrained(
        settings.llama,
        config=config,
        dtype=torch.float16,
        quantization_config=BitsAndBytesConfig(
            load_in_8bit=settings.precision == "8bit",
            load_in_4bit=settings.precision == "4bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float16,
        ),
        device_map={"": 0},
        local_files_only=True,
    )
