"""The shape of a MiniGPT-4, as far as its LLaMA directory does not say it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class VitSizes:
    """EVA ViT; the defaults are ViT-g/14 as BLIP-2 uses it (39 of its 40 blocks)."""

    width: int = 1408
    depth: int = 39
    heads: int = 16
    mlp_width: int = 6144
    patch_size: int = 14


@dataclass(frozen=True)
class QFormerSizes:
    """The Q-Former; the defaults are BERT-base with cross-attention in every second layer."""

    hidden_size: int = 768
    layers: int = 12
    heads: int = 12
    intermediate_size: int = 3072
    cross_attention_frequency: int = 2


@dataclass(frozen=True)
class Sizes:
    """The picture's half of the model; `image_size` in pixels, `query_tokens` a picture."""

    vit: VitSizes = field(default_factory=VitSizes)
    qformer: QFormerSizes = field(default_factory=QFormerSizes)
    image_size: int = 224
    query_tokens: int = 32
