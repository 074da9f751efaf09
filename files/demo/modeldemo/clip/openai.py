"""Reads OpenAI's own CLIP files: a TorchScript archive (.pt), whose code is not run, and words."""

from __future__ import annotations

import gzip
import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.clip.configuration_clip import CLIPConfig
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from ..engine import ModelDemoError

# The archive's dtypes by the names of their storages.
_DTYPES = {
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
}
_HEAD = 64  # width of an attention head in every CLIP that OpenAI published


def read(file: Path) -> dict[str, Tensor]:
    """The archive's tensors by OpenAI's names.

    Only tensors, plain containers and the names of its modules are unpickled. Raises
    ModelDemoError for anything else, and for a damaged file.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            (inner,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            with archive.open(inner) as stream:
                root = _Reader(stream, archive, inner.removesuffix("data.pkl")).load()
    except pickle.UnpicklingError as error:
        raise ModelDemoError(
            f"{file}: damaged, or holds more than tensors, which could run code; fetch the file "
            "again from where it was published"
        ) from error
    except Exception as error:
        # What damage makes of a pickle or an archive can be any error there is.
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ModelDemoError(f"{file}: cannot be read ({reason}); fetch the file again") from error
    found: dict[str, Tensor] = {}
    _flatten(root, "", found)
    first = {f"{side}transformer.resblocks.0.ln_1.weight" for side in ("", "visual.")}
    missing = sorted({*_NAMES, *_TRANSPOSED, *first, "logit_scale"} - found.keys())
    if missing:
        raise ModelDemoError(
            f"{file}: not a CLIP with a vision transformer, it has no {missing[0]}; take "
            "ViT-B-32.pt, ViT-B-16.pt or ViT-L-14.pt"
        )
    return found


class _Module:
    """What stands for a TorchScript module: its attributes."""


class _Reader(pickle.Unpickler):
    """Knows the few names that an archive of tensors needs; every other one is refused."""

    def __init__(self, stream: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(stream)
        self._archive, self._folder = archive, folder
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _tensor
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch.jit._pickle":  # marks lists with the type of what they hold
            return _unmarked
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, _ = pid
        if key not in self._storages:
            data = bytearray(self._archive.read(f"{self._folder}data/{key}"))
            self._storages[key] = torch.frombuffer(data, dtype=dtype)
        return self._storages[key]


def _tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _unmarked(value: object, *_: object) -> object:
    return value


def _flatten(module: object, name: str, into: dict[str, Tensor]) -> None:
    if isinstance(module, Tensor):
        into[name] = module
    elif isinstance(module, _Module):
        for key, value in vars(module).items():
            _flatten(value, f"{name}.{key}" if name else key, into)


def configuration(tensors: Mapping[str, Tensor]) -> CLIPConfig:
    """The sizes, which the tensors' shapes tell."""
    width, _, patch, _ = tensors["visual.conv1.weight"].shape
    patches = tensors["visual.positional_embedding"].shape[0] - 1
    words, text_width = tensors["token_embedding.weight"].shape
    projection = tensors["text_projection"].shape[1]

    def layers(prefix: str) -> int:
        pattern = re.compile(rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\.")
        return 1 + max(int(found[1]) for name in tensors if (found := pattern.match(name)))

    def side(width: int, prefix: str) -> dict[str, int]:
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_attention_heads": width // _HEAD,
            "num_hidden_layers": layers(prefix),
            "projection_dim": projection,
        }

    text = side(text_width, "") | {
        "vocab_size": words,
        "max_position_embeddings": tensors["positional_embedding"].shape[0],
        "bos_token_id": words - 2,
        "eos_token_id": words - 1,
    }
    vision = side(width, "visual.") | {
        "patch_size": patch,
        "image_size": patch * math.isqrt(patches),
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)


def named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors as transformers' CLIPModel has them."""
    found: dict[str, Tensor] = {"logit_scale": tensors["logit_scale"]}
    for original, ours in _NAMES.items():
        found[ours] = tensors[original]
    for original, ours in _TRANSPOSED.items():
        found[ours] = tensors[original].T
    for name, value in tensors.items():
        block = re.fullmatch(_IN_BLOCK, name)
        if not block:
            continue
        side = "vision" if block[1] else "text"
        layer = f"{side}_model.encoder.layers.{block[2]}"
        part, leaf = block[3], block[4]
        if part == "attn.in_proj":
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                found[f"{layer}.self_attn.{letter}_proj.{leaf}"] = third
        elif part in _BLOCK:
            found[f"{layer}.{_BLOCK[part]}.{leaf}"] = value
    return found


_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_TRANSPOSED = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}
_IN_BLOCK = r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)"
_BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def tokenizer(file: Path, size: int) -> CLIPTokenizer:
    """CLIP's tokenizer from bpe_simple_vocab_16e6.txt.gz: a merge a line, the likeliest first.

    The vocabulary, of `size` words, is the bytes, the bytes that end a word, what the merges make,
    and the two special tokens. Raises ModelDemoError for a file that has not as many.
    """
    try:
        with gzip.open(file, "rt", encoding="utf-8") as stream:
            lines = stream.read().splitlines()[1 : size - 2 * 256 - 1]
        merges = [(first, second) for first, second in map(str.split, lines)]
    except (OSError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ModelDemoError(f"{file}: not CLIP's words ({reason}); fetch it again") from error
    letters = list(bytes_to_unicode().values())  # type: ignore[no-untyped-call]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    if len(words) != size:
        raise ModelDemoError(
            f"{file}: makes {len(words)} words, the weights have {size}; fetch it again"
        )
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges)  # type: ignore[arg-type]
