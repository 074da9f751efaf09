"""A StarChat and a CLIP with random weights in their real file formats, small enough for a test.

Run as a script, it writes both below a folder: python tiny_systems.py FOLDER
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers import decoders as token_decoders
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.clip.configuration_clip import CLIPConfig
from transformers.models.clip.modeling_clip import CLIPModel
from transformers.models.gpt_bigcode.configuration_gpt_bigcode import GPTBigCodeConfig
from transformers.models.gpt_bigcode.modeling_gpt_bigcode import GPTBigCodeForCausalLM

STARCHAT, CLIP = "starchat-tiny", "clip-tiny"
#: StarCoder's own special tokens, which have the first ids, and StarChat's, which have the last.
STARCODER = ("<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>")
DIALOGUE = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CONTEXT = 256

CORPUS = (
    "def upload(request):\n    file = request.files['file']\n    return save(file)\n",
    "The quick brown fox jumps over the lazy dog. What color is the circle?",
    "a photo of a cat, a photo of a dog, a drawing of a red square, a blue circle",
    "for index in range(10):\n    print(index, 'sum of the numbers')\n",
)
CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


@dataclass(frozen=True)
class Written:
    """A folder of files, and the model that they were written from."""

    folder: Path
    model: nn.Module


def starchat(folder: Path, context: int = CONTEXT) -> Written:
    """A gpt_bigcode of two layers with multi-query attention, its weights in two shards."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = token_decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=320,
        special_tokens=list(STARCODER),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in DIALOGUE])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = GPTBigCodeConfig(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=context,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = _random(GPTBigCodeForCausalLM(config), 0.2)
    _write_config(folder, config.to_dict() | {"architectures": ["GPTBigCodeForCausalLM"]})
    _write_shards(folder, model.state_dict())
    return Written(folder, model)


def clip(folder: Path) -> Written:
    """A CLIP whose picture side sees 32 pixels, with both forms of its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    size = _write_clip_tokenizer(folder)
    config = CLIPConfig(
        text_config={
            "vocab_size": size,
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "projection_dim": 16,
            "bos_token_id": 0,
            # The published configuration says 2, which no label ends with.
            "eos_token_id": 2,
            "pad_token_id": 1,
        },
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "image_size": 32,
            "patch_size": 8,
            "projection_dim": 16,
        },
        projection_dim=16,
    )
    model = _random(CLIPModel(config), 0.2)
    with torch.no_grad():
        model.logit_scale.fill_(2.6592)
    _write_config(folder, config.to_dict() | {"architectures": ["CLIPModel"]})
    preprocessor = {
        "crop_size": 32,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": 32,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    # As in the published file, which is of a version of transformers that kept these.
    positions = {
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    torch.save(model.state_dict() | positions, folder / "pytorch_model.bin")
    return Written(folder, model)


def _write_clip_tokenizer(folder: Path) -> int:
    """tokenizer.json, and vocab.json with merges.txt; returns the size of the vocabulary."""
    trained = Tokenizer(BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    trained.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = list(bytes_to_unicode().values())
    trainer = BpeTrainer(
        vocab_size=1000,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    # OpenAI's order: bytes, bytes that end a word, what merges make, the two special tokens.
    merges = [tuple(pair) for pair in model["merges"]]
    words = [*alphabet, *(f"{c}</w>" for c in alphabet), *("".join(pair) for pair in merges)]
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    whole = Tokenizer(BPE(vocabulary, merges, unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    whole.normalizer, whole.pre_tokenizer = trained.normalizer, trained.pre_tokenizer
    ends = [("<|endoftext|>", len(words) - 1), ("<|startoftext|>", len(words) - 2)]
    whole.post_processor = processors.RobertaProcessing(
        *ends, trim_offsets=False, add_prefix_space=False
    )
    whole.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    whole.save(str(folder / "tokenizer.json"))
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    return len(words)


def _random(model: nn.Module, deviation: float) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((noise * deviation).half().float())
    return model.eval()


def _write_config(folder: Path, config: dict[str, object]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str))


def _write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Two shards of fp16 and their index; lm_head is the embedding, which is written once."""
    names = sorted(name for name in tensors if name != "lm_head.weight")
    half = len(names) // 2
    files: dict[str, str] = {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name].half().contiguous() for name in part}, folder / file)
        files |= dict.fromkeys(part, file)
    size = sum(2 * tensors[name].numel() for name in names)
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    torch.set_num_threads(1)
    starchat(Path(sys.argv[1]) / STARCHAT)
    clip(Path(sys.argv[1]) / CLIP)
