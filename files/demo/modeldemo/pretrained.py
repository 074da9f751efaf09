"""Fills a transformers class from a folder in the Hugging Face layout, one tensor at a time.

Nothing is held twice: a file is mapped, and each tensor goes from there to the device, converted
or quantised on the way, so the host's memory holds one tensor beside the mapped pages.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from .device import ran_out
from .engine import ModelDemoError
from .hub_folder import weight_files
from .minigpt4.checkpoints import read
from .precision import Precision
from .quantised import BITS, prepare

C = TypeVar("C", bound=PreTrainedConfig)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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
    dtype = DTYPES.get(precision, torch.float16)
    quantise = prepare(model, precision, dtype) if precision in BITS else None
    wanted = dict(model.named_parameters())  # tied ones once
    missing = set(wanted)
    with _enough_memory(folder):
        for file, name, value in tensors:
            if name in missing:
                _check(file, name, value, wanted[name])
                value = value.to(dtype=dtype, copy=True)
                if quantise and name in quantise.names:
                    _put(model, name, quantise(value, device))
                else:
                    _put(model, name, nn.Parameter(value.to(device), requires_grad=False))
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


def _put(model: nn.Module, name: str, value: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, value)


@contextmanager
def _enough_memory(folder: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error):
            raise
        raise ModelDemoError(
            f"{folder}: the weights do not fit the GPU's memory; set model.precision to 8bit or "
            "4bit, or take a larger GPU"
        ) from error
