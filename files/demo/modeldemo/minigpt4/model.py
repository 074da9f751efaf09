"""MiniGPT-4: EVA ViT, Q-Former, one projection and a LLaMA, of any size."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig, Blip2VisionConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2VisionModel
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from .sizes import Sizes


class MiniGPT4(nn.Module):
    """The whole model; built under `torch.device("meta")` it takes no memory."""

    def __init__(self, sizes: Sizes, llama: LlamaConfig) -> None:
        super().__init__()
        vit, qformer = sizes.vit, sizes.qformer
        self.sizes = sizes
        self.vision = Blip2VisionModel(
            Blip2VisionConfig(
                hidden_size=vit.width,
                intermediate_size=vit.mlp_width,
                num_hidden_layers=vit.depth,
                num_attention_heads=vit.heads,
                image_size=sizes.image_size,
                patch_size=vit.patch_size,
            )
        )
        # EVA's own norms use 1e-6; this one is BLIP-2's ln_vision, a plain torch LayerNorm.
        self.vision.post_layernorm.eps = 1e-5
        self.query_tokens = nn.Parameter(torch.zeros(1, sizes.query_tokens, qformer.hidden_size))
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=qformer.hidden_size,
                num_hidden_layers=qformer.layers,
                num_attention_heads=qformer.heads,
                intermediate_size=qformer.intermediate_size,
                cross_attention_frequency=qformer.cross_attention_frequency,
                encoder_hidden_size=vit.width,
            )
        )
        self.llama_proj = nn.Linear(qformer.hidden_size, llama.hidden_size)
        self.llama = LlamaForCausalLM(llama)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """[B, 3, image_size, image_size] normalised pixels → [B, query_tokens, LLaMA width]."""
        # As upstream: on a GPU the picture's half runs under fp16 autocast, its norms in fp32.
        half = pixels.is_cuda and self.llama.lm_head.weight.dtype != torch.float32
        with torch.autocast(pixels.device.type, torch.float16, enabled=half):
            patches = self.vision(pixels).last_hidden_state
            queries = self.query_tokens.expand(pixels.shape[0], -1, -1)
            read = self.qformer(query_embeds=queries, encoder_hidden_states=patches)
            embeddings: Tensor = self.llama_proj(read.last_hidden_state)
        return embeddings

    def embed(self, ids: Tensor) -> Tensor:
        """[B, T] token ids → [B, T, LLaMA width]."""
        embeddings: Tensor = self.llama.get_input_embeddings()(ids)
        return embeddings
