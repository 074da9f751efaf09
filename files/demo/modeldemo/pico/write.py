"""Writes a trained model as the files that MiniGPT-4 is distributed in, and splits off a delta."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.configuration_llama import LlamaConfig

from ..minigpt4 import names
from ..minigpt4.model import MiniGPT4

VIT = "eva_vit_pico.pth"
QFORMER = "blip2_pico_qformer.pth"
PROJECTION = "pretrained_minigpt4_pico.pth"
VICUNA, BASE, DELTA = "vicuna-pico", "llama-pico-base", "vicuna-pico-delta"

Tensors = dict[str, Tensor]
_BY_WORD = ("model.embed_tokens.weight", "lm_head.weight")


def write_all(model: MiniGPT4, base: Tensors, pieces: bytes, folder: Path) -> None:
    """Every file of a trained model; `base` is the language model it was tuned from."""
    write_picture_half(model, folder)
    tuned = model.llama.state_dict()
    write_language_half(base, tuned, model.llama.config, pieces, folder)


def write_picture_half(model: MiniGPT4, folder: Path) -> None:
    """The ViT in fp16, as eva_vit_g.pth; the Q-Former and the projection in fp32, as upstream."""
    vision = {name: value.half() for name, value in model.vision.state_dict().items()}
    vit = {theirs: vision[ours] for theirs, ours in names.vit(model.sizes.vit).items()}
    for q_bias, v_bias, ours in names.vit_biases(model.sizes.vit):
        # The middle third is the key's bias, which the original does not have: it adds the same
        # to every score of a query, so softmax never sees it.
        q, _, v = vision[ours].chunk(3)
        vit |= {q_bias: q.clone(), v_bias: v.clone()}
    _save(vit, folder / VIT)
    ours = model.state_dict()
    qformer = {t: ours[o].clone() for t, o in names.qformer(model.sizes.qformer).items()}
    _save({"model": qformer}, folder / QFORMER)
    projection = {t: ours[o].clone() for t, o in names.PROJECTION.items()}
    _save({"model": projection}, folder / PROJECTION)


def write_language_half(
    base: Tensors, tuned: Tensors, config: LlamaConfig, pieces: bytes, folder: Path
) -> None:
    """Base, delta and merged model, in the manner of Vicuna v0.

    `base` has the rows of the tokenizer's vocabulary, as `config` says; the delta and the merged
    model have one more, [PAD]. All three are fp16, and the merged model is exactly base + delta,
    so that a merge of the two can be checked bit by bit.
    """
    base = {name: value.half() for name, value in base.items()}
    delta: Tensors = {}
    merged: Tensors = {}
    for name, value in tuned.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight") and len(value) == len(
            base[name]
        ):
            # What no text ever trains: as FastChat made it, the mean of the others.
            value = torch.cat((value, value.mean(0, keepdim=True)))
        start = zero_padded(base[name], len(value))
        delta[name] = (value - start.float()).half()
        merged[name] = start + delta[name]
    rows = config.vocab_size
    write_llama(folder / BASE, base, _config(config, rows, _DECAPODA), pieces, _DECAPODA, 2)
    write_llama(folder / DELTA, delta, _config(config, rows + 1, _VICUNA), pieces, _VICUNA, 2)
    write_llama(folder / VICUNA, merged, _config(config, rows + 1, _VICUNA), pieces, _VICUNA, 3)


def zero_padded(value: Tensor, rows: int) -> Tensor:
    """A tensor with rows of zero added at its end."""
    return torch.cat((value, value.new_zeros(rows - len(value), *value.shape[1:])))


@dataclass(frozen=True)
class _Manner:
    """How a publisher fills the small files, which is where readers trip."""

    architecture: str
    tokenizer: dict[str, Any]
    bos: int
    eos: int
    pad: int


_DECAPODA = _Manner(
    "LLaMAForCausalLM",
    {
        "bos_token": "",
        "eos_token": "",
        "model_max_length": 2048,
        "tokenizer_class": "LLaMATokenizer",
        "unk_token": "",
    },
    bos=0,
    eos=1,
    pad=-1,
)
_VICUNA = _Manner(
    "LlamaForCausalLM",
    {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 2048,
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    },
    bos=1,
    eos=2,
    pad=0,
)


def write_llama(
    directory: Path,
    tensors: Tensors,
    config: dict[str, Any],
    pieces: bytes,
    manner: _Manner,
    shards: int,
) -> None:
    """A LLaMA directory with `shards` .bin files of about the same size, and their index."""
    directory.mkdir(parents=True, exist_ok=True)
    total = sum(value.nbytes for value in tensors.values())
    parts: list[Tensors] = [{} for _ in range(shards)]
    done = 0
    for name, value in tensors.items():
        parts[min(shards - 1, done * shards // total)][name] = value
        done += value.nbytes
    where: dict[str, str] = {}
    for i, part in enumerate(parts):
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        # Clones: a view would take its whole storage into the file.
        _save({name: value.clone() for name, value in part.items()}, directory / file)
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    _json(directory / "pytorch_model.bin.index.json", index)
    _json(directory / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _json(directory / "generation_config.json", {"_from_model_config": True} | ids)
    _json(directory / "tokenizer_config.json", manner.tokenizer)
    special = ("bos_token", "eos_token", "unk_token")
    _json(
        directory / "special_tokens_map.json",
        {key: manner.tokenizer[key] for key in special if manner.tokenizer[key]},
    )
    (directory / "tokenizer.model").write_bytes(pieces)


def _config(config: LlamaConfig, rows: int, manner: _Manner) -> dict[str, Any]:
    return {
        "architectures": [manner.architecture],
        "bos_token_id": manner.bos,
        "eos_token_id": manner.eos,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "llama",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "pad_token_id": manner.pad,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": rows,
    }


def _save(value: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, file)


def _json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
