"""A MiniGPT-4 with random weights, tinier than pico, in the original formats."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from modeldemo.engine import Conversation, Engine, Sampling, Turn
from modeldemo.minigpt4.model import MiniGPT4
from modeldemo.minigpt4.sizes import QFormerSizes, Sizes, VitSizes
from modeldemo.pico import write
from modeldemo.pico.train import make_tokenizer
from PIL import Image
from transformers.models.llama.configuration_llama import LlamaConfig

GREEDY = Sampling(temperature=0, max_new_tokens=40)
SIZES = Sizes(VitSizes(32, 2, 4, 48, 8), QFormerSizes(24, 3, 4, 40, 2), 32, 5)
VOCABULARY = 400


def about(picture: Image.Image, *turns: Turn) -> Conversation:
    """A conversation whose first turn holds the picture."""
    return Conversation((replace(turns[0], images=(picture,)), *turns[1:]))


def pieces(engine: Engine, said: Conversation, sampling: Sampling = GREEDY) -> list[str]:
    """The texts of an answer, those that are empty left out."""
    return [piece.text for piece in engine.stream(said, sampling) if piece.text]


@dataclass(frozen=True)
class Tiny:
    """Where the files are, and the model they were written from."""

    folder: Path
    model: MiniGPT4
    base: dict[str, torch.Tensor]

    @property
    def yamls(self) -> tuple[Path, Path]:
        return self.folder / "minigpt4.yaml", self.folder / "minigpt4_eval.yaml"


def make(folder: Path) -> Tiny:
    """Write every file of a random model, and its two YAML files."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY + 1,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    model = MiniGPT4(SIZES, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
        for block in model.vision.encoder.layers:
            block.self_attn.qkv.bias[32:64] = 0
        for part in (model.vision, model.llama):
            for parameter in part.parameters():
                parameter.copy_(parameter.half().float())
    tuned = {name: value.clone() for name, value in model.llama.state_dict().items()}
    base = {
        name: (value[:VOCABULARY] if len(value) == VOCABULARY + 1 else value) * 0.9
        for name, value in tuned.items()
    }
    config.vocab_size = VOCABULARY
    write.write_picture_half(model, folder)
    piece = make_tokenizer(VOCABULARY, seed=0)
    write.write_language_half(base, tuned, config, piece, folder)
    write_yamls(folder)
    return Tiny(folder, model, base)


def write_yamls(folder: Path, sizes: Sizes = SIZES, **changes: object) -> tuple[Path, Path]:
    """Both YAML files for the pico file names; `changes` override keys of `model`."""
    v, q = sizes.vit, sizes.qformer
    model = {
        "arch": "mini_gpt4",
        "image_size": sizes.image_size,
        "vit_precision": "fp16",
        "num_query_token": sizes.query_tokens,
        "llama_model": str(folder / write.VICUNA),
        "prompt": "",
        "vit_model_path": str(folder / write.VIT),
        "q_former_model": str(folder / write.QFORMER),
        "vit": vars(v),
        "qformer": vars(q),
    } | changes
    first, second = folder / "minigpt4.yaml", folder / "minigpt4_eval.yaml"
    first.write_text(yaml.safe_dump({"model": model}))
    checkpoint = {"ckpt": str(folder / write.PROJECTION), "low_resource": False, "end_sym": "###"}
    second.write_text(yaml.safe_dump({"model": checkpoint, "run": {"task": "x"}}))
    return first, second
