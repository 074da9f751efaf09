"""Corrects the small files of a merged model, where LLaMA's and Vicuna's mislead today's readers.

LLaMA's first conversions say bos 0, eos 1, pad −1, empty special tokens and the class
LLaMATokenizer, which no release of transformers has; the tokenizer's own ids are 1, 2 and 0
(https://github.com/Vision-CAIR/MiniGPT-4/issues/339).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def config(base: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """config.json of the merged model: the base's, with the right class, ids and vocabulary."""
    right = {"architectures": ["LlamaForCausalLM"], "vocab_size": rows, **_IDS}
    # Newer transformers write `dtype`, older ones read `torch_dtype`.
    right |= {key: "float16" for key in ("dtype", "torch_dtype") if key in base}
    if "dtype" not in base:
        right["torch_dtype"] = "float16"
    return {**base, **right}


def generation_config(base: Mapping[str, Any] | None) -> dict[str, Any]:
    """generation_config.json: the base's, if it has one, with the right ids."""
    return {**(base or {"_from_model_config": True}), **_IDS}


def tokenizer_config(delta: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json: the delta's, with a class that exists, and a first token <s>."""
    right = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    return {**delta, **right, **special_tokens(delta)}


def special_tokens(given: Mapping[str, Any]) -> dict[str, Any]:
    """The three tokens of LLaMA, where they are spelt otherwise; entries with more are kept."""
    right: dict[str, Any] = {}
    for key, token in _TOKENS.items():
        found = given.get(key)
        if isinstance(found, Mapping):
            right[key] = {**found, "content": token}
        else:
            right[key] = token
    return right


def special_tokens_map(delta: Mapping[str, Any]) -> dict[str, Any]:
    """special_tokens_map.json: the delta's, with the three tokens."""
    return {**delta, **special_tokens(delta)}
