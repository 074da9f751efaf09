"""What each tensor is called in the original files and in the transformers classes."""

from __future__ import annotations

from .sizes import QFormerSizes, VitSizes

_VIT = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
}
# q_bias and v_bias are not here: they become one qkv.bias = cat(q_bias, 0, v_bias).
_VIT_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_QFORMER_LAYER = {
    "attention.self.query": "attention.attention.query",
    "attention.self.key": "attention.attention.key",
    "attention.self.value": "attention.attention.value",
    "attention.output.dense": "attention.output.dense",
    "attention.output.LayerNorm": "attention.output.LayerNorm",
}
_QFORMER_FEED = ("intermediate_query.dense", "output_query.dense", "output_query.LayerNorm")


def _both(original: str, ours: str) -> dict[str, str]:
    return {f"{original}.{part}": f"{ours}.{part}" for part in ("weight", "bias")}


def vit(sizes: VitSizes) -> dict[str, str]:
    """eva_vit_g.pth → Blip2VisionModel, without q_bias, v_bias and ln_vision."""
    names = dict(_VIT)
    for i in range(sizes.depth):
        block, layer = f"blocks.{i}", f"encoder.layers.{i}"
        names[f"{block}.attn.qkv.weight"] = f"{layer}.self_attn.qkv.weight"
        for original, ours in _VIT_BLOCK.items():
            names |= _both(f"{block}.{original}", f"{layer}.{ours}")
    return names


def vit_biases(sizes: VitSizes) -> list[tuple[str, str, str]]:
    """(q_bias, v_bias, our qkv.bias) of every block."""
    return [
        (
            f"blocks.{i}.attn.q_bias",
            f"blocks.{i}.attn.v_bias",
            f"encoder.layers.{i}.self_attn.qkv.bias",
        )
        for i in range(sizes.depth)
    ]


def qformer(sizes: QFormerSizes) -> dict[str, str]:
    """The BLIP-2 file → MiniGPT4: query_tokens, ln_vision and the Q-Former itself."""
    names = {"query_tokens": "query_tokens"}
    names |= _both("ln_vision", "vision.post_layernorm")
    names |= _both("Qformer.bert.embeddings.LayerNorm", "qformer.layernorm")
    for i in range(sizes.layers):
        original, ours = f"Qformer.bert.encoder.layer.{i}", f"qformer.encoder.layer.{i}"
        for theirs, mine in _QFORMER_LAYER.items():
            names |= _both(f"{original}.{theirs}", f"{ours}.{mine}")
            if i % sizes.cross_attention_frequency == 0:
                names |= _both(f"{original}.cross{theirs}", f"{ours}.cross{mine}")
        for part in _QFORMER_FEED:
            names |= _both(f"{original}.{part}", f"{ours}.{part}")
    return names


# The MiniGPT-4 file holds much more while training; only this is used.
PROJECTION = _both("llama_proj", "llama_proj")
