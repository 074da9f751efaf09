"""Fills a transformers class from a folder in the Hugging Face layout, one tensor at a time.

Nothing is held twice: a file is mapped, and each tensor goes from there to the device, converted
or quantised on the way, so the host's memory holds one tensor beside the mapped pages.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from .engine import ModelDemoError
from .hub_folder import weight_files
from .minigpt4.checkpoints import read
from .precision import Precision

C = TypeVar("C", bound=PreTrainedConfig)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
QUANTISED = ("8bit", "4bit")


def read_config(folder: Path, kind: type[C]) -> C:
    """config.json as a configuration of this class; raises ModelDemoError for another model's."""
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if raw["model_type"] != kind.model_type:
            raise ValueError(f"model_type is {raw['model_type']!r}, not {kind.model_type!r}")
        fields = {key: value for key, value in raw.items() if key not in _NOT_READ}
        return kind(**fields)
    except OSError as error:
        raise ModelDemoError(f"{file}: cannot be read; copy the whole folder") from error
    except Exception as error:
        # transformers validates each field with an exception type of its own.
        reason = " ".join(str(error).split())[:120]
        raise ModelDemoError(f"{file}: not the configuration ({reason}); fetch it again") from error


_NOT_READ = {"architectures", "auto_map", "dtype", "model_type", "torch_dtype"}


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device; raises ModelDemoError where torch sees no GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelDemoError(
            "--device cuda: torch sees no GPU; check nvidia-smi and that torch is a CUDA build, "
            "or use --device cpu"
        )
    return torch.device(name)


def choose_precision(asked: Precision, device: torch.device) -> Precision:
    """What `auto` means on this device; raises ModelDemoError where the device cannot."""
    if asked == "auto":
        return "fp16" if device.type == "cuda" else "fp32"
    if asked in QUANTISED:
        if device.type != "cuda":
            raise ModelDemoError(f"model.precision: {asked} needs a GPU; set it to auto")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ModelDemoError(
                f"model.precision: {asked} needs bitsandbytes; install it or set it to auto"
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


def load(
    model: nn.Module,
    tensors: Iterable[tuple[Path, str, Tensor]],
    folder: Path,
    device: torch.device,
    precision: Precision,
) -> None:
    """Give a model that was built on the meta device its weights, in evaluation mode.

    `tensors` are those of the folder's files, each with its file. Those that the model does not
    have are left out. Raises ModelDemoError, one line, for a missing or misshapen tensor and a
    device that is too small.
    """
    if precision in QUANTISED:
        _quantise(model, precision)
    wanted = dict(model.named_parameters())  # tied ones once
    missing = set(wanted)
    dtype = DTYPES.get(precision, torch.float16)
    with _enough_memory(folder):
        for file, name, value in tensors:
            if name in missing:
                _check(file, name, value, wanted[name])
                _put(model, name, value.to(dtype=dtype, copy=True), device)
                missing.remove(name)
    if missing:
        raise ModelDemoError(
            f"{folder}: {min(missing)} is in none of its files ({len(missing)} of "
            f"{len(wanted)} tensors missing); copy the whole folder"
        )
    model.tie_weights()  # type: ignore[operator]
    model.requires_grad_(False).eval()


def tensors(folder: Path) -> Iterator[tuple[Path, str, Tensor]]:
    """Every tensor of the folder's weights with its file and name, mapped, one at a time.

    Raises ModelDemoError for a file that cannot be read.
    """
    for file in weight_files(folder):
        if file.suffix != ".safetensors":
            yield from ((file, k, v) for k, v in read(file).items() if isinstance(v, Tensor))
            continue
        try:
            with safe_open(file, framework="pt") as source:
                for name in source.keys():  # noqa: SIM118  # it is no dictionary
                    yield file, name, source.get_tensor(name)
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:120]
            raise ModelDemoError(
                f"{file}: cannot be read ({reason}); fetch the file again"
            ) from error


def _check(file: Path, name: str, value: Tensor, wanted: Tensor) -> None:
    if value.shape != wanted.shape:
        sizes = ["×".join(map(str, shape)) or "a scalar" for shape in (value.shape, wanted.shape)]
        raise ModelDemoError(
            f"{file}: {name} is {sizes[0]}, config.json says {sizes[1]}; the two belong to "
            "different models: fetch both from one place"
        )


def _put(model: nn.Module, name: str, value: Tensor, device: torch.device) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, leaf)
    if type(old) is nn.Parameter:
        setattr(module, leaf, nn.Parameter(value.to(device), requires_grad=False))
        return
    # One of bitsandbytes' own classes, which quantises on its way to the GPU.
    settings = {key: kept for key, kept in vars(old).items() if key != "SCB"}
    setattr(module, leaf, type(old)(value, requires_grad=False, **settings).to(device))


def _quantise(model: nn.Module, precision: Precision) -> None:
    """Replace the Linear layers, but for the head, by those of bitsandbytes, still without data."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.utils.quantization_config import BitsAndBytesConfig

    how: dict[str, Any] = {"load_in_8bit": True}
    if precision == "4bit":
        how = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": torch.float16,
        }
    chosen = BitsAndBytesConfig(**how)  # type: ignore[no-untyped-call]
    replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=chosen)


@contextmanager
def _enough_memory(folder: Path) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelDemoError(
            f"{folder}: the weights do not fit the GPU's memory; set model.precision to 8bit or "
            "4bit, or take a larger GPU"
        ) from error
