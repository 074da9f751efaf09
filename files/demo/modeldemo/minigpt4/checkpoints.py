"""Reads the original checkpoint files into the model, and says in one line what is wrong."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..engine import ModelDemoError
from . import names
from .files import check_file, shards
from .model import MiniGPT4
from .sizes import Sizes

Place = Callable[[str, Tensor], Tensor]


def read(file: Path) -> dict[str, Any]:
    """The dictionary in a .pth, .bin or .safetensors file; its tensors stay on the disk.

    Only tensors and plain containers are unpickled, so a checkpoint can run no code.
    """
    check_file(file)
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        # Files older than torch 1.6 are plain pickles, which cannot be mapped.
        mapped = zipfile.is_zipfile(file)
        found = torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else "empty"
        raise ModelDemoError(f"{file}: cannot be read ({reason}); fetch the file again") from error
    if not isinstance(found, dict):
        raise ModelDemoError(f"{file}: holds a {type(found).__name__}, not tensors by name")
    return found


def read_model(file: Path) -> dict[str, Any]:
    """As `read`, for the files that keep their tensors under the key `model`."""
    found = read(file)
    if not isinstance(found.get("model"), Mapping):
        raise ModelDemoError(f"{file}: has no key 'model'; is it the right checkpoint?")
    return dict(found["model"])


def _take(source: Mapping[str, Any], file: Path, name: str, shape: torch.Size) -> Tensor:
    """One tensor of the expected shape."""
    value = source.get(name)
    if not isinstance(value, Tensor):
        raise ModelDemoError(f"{file}: {name} is missing; is it the right checkpoint?")
    if value.shape != shape:
        raise ModelDemoError(
            f"{file}: {name} is {_size(value.shape)}, the configuration says {_size(shape)}; "
            "correct the file's path or the sizes in the model's YAML"
        )
    return value


def _size(shape: torch.Size) -> str:
    return "×".join(map(str, shape)) or "a scalar"


def load_vit(model: MiniGPT4, file: Path, place: Place) -> None:
    """eva_vit_g.pth: a flat dictionary, perhaps fp16, whose later blocks and head are not used."""
    source, target = read(file), model.vision.state_dict()
    values = {
        ours: _take(source, file, original, target[ours].shape)
        for original, ours in names.vit(model.sizes.vit).items()
    }
    for q_bias, v_bias, ours in names.vit_biases(model.sizes.vit):
        width = torch.Size([model.sizes.vit.width])
        q, v = (_take(source, file, name, width) for name in (q_bias, v_bias))
        values[ours] = torch.cat((q, torch.zeros_like(q), v))
    _assign(model.vision, values, place, rest=("post_layernorm.weight", "post_layernorm.bias"))


def load_qformer(model: MiniGPT4, file: Path, place: Place) -> None:
    """blip2_pretrained_flant5xxl.pth: query tokens, ln_vision, Q-Former; t5_proj is not used."""
    source, target = read_model(file), model.state_dict()
    wanted = names.qformer(model.sizes.qformer)
    values = {
        ours: _take(source, file, original, target[ours].shape) for original, ours in wanted.items()
    }
    _assign(model, values, place, rest=tuple(set(target) - set(values)))


def load_projection(model: MiniGPT4, file: Path, place: Place) -> None:
    """pretrained_minigpt4.pth: only llama_proj."""
    source = read_projection(file, model.sizes, model.llama.config.hidden_size)
    values = {ours: source[original] for original, ours in names.PROJECTION.items()}
    _assign(model, values, place, rest=tuple(set(model.state_dict()) - set(values)))


def read_projection(file: Path, sizes: Sizes, llama_width: int) -> dict[str, Tensor]:
    """llama_proj's weight and bias; raises when they belong to a LLaMA of another width."""
    source = read_model(file)
    width = sizes.qformer.hidden_size
    weight = source.get("llama_proj.weight")
    if isinstance(weight, Tensor) and weight.shape != (llama_width, width):
        raise ModelDemoError(
            f"{file}: llama_proj is {_size(weight.shape)}, llama_model needs "
            f"{llama_width}×{width}: this 7B/13B pair does not match; take the checkpoint made "
            "for this Vicuna (4096 is 7B, 5120 is 13B)"
        )
    shapes = {
        "llama_proj.weight": torch.Size([llama_width, width]),
        "llama_proj.bias": torch.Size([llama_width]),
    }
    return {name: _take(source, file, name, shape) for name, shape in shapes.items()}


def read_llama_config(directory: Path) -> LlamaConfig:
    """config.json, except the token ids, which decapoda's conversion got wrong."""
    file = directory / "config.json"
    try:
        raw = json.loads(file.read_text())
        wrong = [k for k in _SIZES if not (isinstance(raw.get(k), int) and raw[k] > 0)]
        if wrong:
            raise ValueError(f"{wrong[0]} is {raw.get(wrong[0])!r}")
        raw.setdefault("max_position_embeddings", raw.pop("max_sequence_length", 2048))
        fields = {k: v for k, v in raw.items() if k not in _NOT_READ}
        return LlamaConfig(**fields, bos_token_id=1, eos_token_id=2)
    except OSError as error:
        raise ModelDemoError(f"{file}: cannot be read; copy the whole directory") from error
    except Exception as error:
        # transformers validates each field with an exception type of its own.
        reason = " ".join(str(error).split())[:120]
        raise ModelDemoError(
            f"{file}: not a LLaMA configuration ({reason}); fetch it again"
        ) from error


_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)
_NOT_READ = {
    "architectures",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "model_type",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "_name_or_path",
}


def load_llama(model: MiniGPT4, directory: Path, place: Place) -> None:
    """A LLaMA directory, one shard after another, so that one shard at most is in flight."""
    target = {k: v.shape for k, v in model.llama.state_dict().items()}
    values: dict[str, Tensor] = {}
    for file in shards(directory):
        source = read(file)
        for name in target.keys() & source.keys():
            values[name] = place(f"llama.{name}", _take(source, file, name, target[name]))
    missing = sorted(target.keys() - values.keys())
    if missing:
        raise ModelDemoError(
            f"{directory}: {missing[0]} is in none of its shards "
            f"({len(missing)} of {len(target)} tensors missing); copy the whole directory"
        )
    model.llama.load_state_dict(values, assign=True)
    # The one thing a LLaMA needs that no file holds: it has to be made where the weights are.
    rotary = LlamaRotaryEmbedding(model.llama.config)
    model.llama.model.rotary_emb = rotary.to(model.llama.lm_head.weight.device)


def _assign(
    module: nn.Module, values: dict[str, Tensor], place: Place, rest: tuple[str, ...]
) -> None:
    prefix = "" if isinstance(module, MiniGPT4) else "vision."
    placed = {name: place(prefix + name, value) for name, value in values.items()}
    outcome = module.load_state_dict(placed, strict=False, assign=True)
    assert sorted(outcome.missing_keys) == sorted(rest)
