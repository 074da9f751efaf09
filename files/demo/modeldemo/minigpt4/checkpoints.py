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
    except pickle.UnpicklingError as error:
        raise ModelDemoError(
            f"{file}: damaged, or holds more than tensors, which could run code; fetch the file "
            "again from where it was published"
        ) from error
    except Exception as error:
        # What damage makes of a pickle or a header can be any error there is.
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else "empty"
        raise ModelDemoError(f"{file}: cannot be read ({reason}); fetch the file again") from error
    if not isinstance(found, Mapping):
        raise ModelDemoError(f"{file}: holds a {type(found).__name__}, not tensors by name")
    return dict(found)


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
    _assign(
        model.vision, values, file, place, rest=("post_layernorm.weight", "post_layernorm.bias")
    )


def load_qformer(model: MiniGPT4, file: Path, place: Place) -> None:
    """blip2_pretrained_flant5xxl.pth: query tokens, ln_vision, Q-Former; t5_proj is not used."""
    source, target = read_model(file), model.state_dict()
    wanted = names.qformer(model.sizes.qformer)
    values = {
        ours: _take(source, file, original, target[ours].shape) for original, ours in wanted.items()
    }
    _assign(model, values, file, place, rest=tuple(set(target) - set(values)))


def load_projection(model: MiniGPT4, file: Path, place: Place) -> None:
    """pretrained_minigpt4.pth: only llama_proj."""
    source = read_projection(file, model.sizes, model.llama.config.hidden_size)
    values = {ours: source[original] for original, ours in names.PROJECTION.items()}
    _assign(model, values, file, place, rest=tuple(set(model.state_dict()) - set(values)))


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


def check_language(directory: Path, config: LlamaConfig, pieces: int) -> None:
    """Raise ModelDemoError for weights that are a delta, or of another Vicuna than v0.

    A tokenizer of `pieces` pieces is read with them. Old files without a zip's directory are read
    whole for it, the others' headers alone.
    """
    if pieces > config.vocab_size:
        raise ModelDemoError(
            f"{directory}: tokenizer.model has {pieces} pieces, config.json a vocab_size of "
            f"{config.vocab_size}: they are of two models; copy both from the same one"
        )
    rows = torch.Size([config.vocab_size, config.hidden_size])
    for file in reversed(shards(directory)):
        source = read(file)
        words = source.get("model.embed_tokens.weight")
        if isinstance(words, Tensor) and words.shape != rows and words.shape[1:] == rows[1:]:
            raise ModelDemoError(
                f"{file}: model.embed_tokens.weight is {_size(words.shape)}, the configuration "
                f"says {_size(rows)}: merged with the wrong FastChat, or a file of another model "
                "(32001 rows is Vicuna v0; 32000 is LLaMA and Vicuna v1.1); merge it again with "
                "fleet weights merge"
            )
        norm = source.get("model.norm.weight")
        if isinstance(norm, Tensor) and norm.float().abs().mean() < _DELTA:
            raise ModelDemoError(
                f"{directory}: a delta, not a model (its norms are close to 0); merge it with "
                "its LLaMA by fleet weights merge"
            )
        del source, words, norm  # or two files would be in memory while the next is read
    if config.vocab_size == 32000:
        raise ModelDemoError(
            f"{directory}: a vocabulary of 32000 rows is LLaMA's or Vicuna v1.1's; MiniGPT-4 was "
            "trained with Vicuna v0, which has 32001: with another its answers would be garbage; "
            "take the merged v0"
        )


#: A trained model's last norm has weights about 1; fine-tuning moves them by thousandths.
_DELTA = 0.05


def load_llama(model: MiniGPT4, directory: Path, place: Place) -> None:
    """A LLaMA directory, one shard after another, so that one shard at most is in flight."""
    target = {k: v.shape for k, v in model.llama.state_dict().items()}
    missing = set(target)
    for file in shards(directory):
        source = read(file)
        for name in sorted(missing & source.keys()):
            value = _take(source, file, name, target[name])
            parent, _, leaf = name.rpartition(".")
            placed = _sound(place(f"llama.{name}", value), file, name)
            if not isinstance(placed, nn.Parameter):
                placed = nn.Parameter(placed, requires_grad=False)
            setattr(model.llama.get_submodule(parent), leaf, placed)
            missing.remove(name)
        del source  # or two files would be in memory while the next is read
    if missing:
        raise ModelDemoError(
            f"{directory}: {min(missing)} is in none of its shards "
            f"({len(missing)} of {len(target)} tensors missing); copy the whole directory"
        )
    # The one thing a LLaMA needs that no file holds: it has to be made where the weights are.
    rotary = LlamaRotaryEmbedding(model.llama.config)
    model.llama.model.rotary_emb = rotary.to(model.llama.lm_head.weight.device)


def _sound(value: Tensor, file: Path, name: str) -> Tensor:
    """A tensor of numbers; damaged bytes are infinities sooner than anything else."""
    if value.is_floating_point() and not value.is_meta and not value.isfinite().all():
        raise ModelDemoError(
            f"{file}: {name} holds values that are not numbers: the file is damaged; fetch it again"
        )
    return value


def _assign(
    module: nn.Module, values: dict[str, Tensor], file: Path, place: Place, rest: tuple[str, ...]
) -> None:
    prefix = "" if isinstance(module, MiniGPT4) else "vision."
    placed = {
        name: _sound(place(prefix + name, value), file, prefix + name)
        for name, value in values.items()
    }
    outcome = module.load_state_dict(placed, strict=False, assign=True)
    assert sorted(outcome.missing_keys) == sorted(rest)
