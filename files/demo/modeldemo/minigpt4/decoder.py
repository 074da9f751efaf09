"""Runs a LLaMA over one growing sequence, and keeps what it has computed for the next question."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM

from ..device import ran_out

log = logging.getLogger("modeldemo")

#: A GPU step looks at the cache up to the first of 256, 512, … that holds all positions so far.
_SHORTEST = 256


@dataclass(frozen=True)
class _Parked:
    """Another conversation: what stands at its positions, and a copy of their keys and values."""

    marks: list[int]
    cache: Tensor


class Decoder:
    """The forward pass of a LlamaForCausalLM for one sequence with its keys and values in place.

    Weights and Linear layers, quantised or not, are the model's own. Around them there is one
    buffer for the cache, so that a conversation's next question computes what is new alone, and
    on a GPU a step is a recorded CUDA graph: nothing but the GPU's own work is left of it. That
    needs no compiler on the host, and takes a second at the start.

    A position is known by its mark, a number that says what stands there (a token, or a part of a
    certain picture). Equal marks from the first position on have equal keys and values.
    """

    def __init__(self, llama: LlamaForCausalLM, length: int) -> None:
        """A decoder of up to `length` positions."""
        config = llama.config
        table = llama.get_input_embeddings().weight
        self.length = -(-length // _SHORTEST) * _SHORTEST
        self.device, self.dtype = table.device, table.dtype
        self._llama = llama
        self._layers: list[LlamaDecoderLayer] = list(llama.model.layers)
        self._head_dim: int = self._layers[0].self_attn.head_dim
        self._grouped = config.num_key_value_heads != config.num_attention_heads
        shape = (config.num_key_value_heads, self.length, self._head_dim)
        #: [layers, keys and values, 1, heads, positions, head width]
        self._cache = table.new_zeros(len(self._layers), 2, 1, *shape)
        self._marks: list[int] = []
        self._parked: list[_Parked] = []
        self._positions = torch.arange(self.length, device=self.device)
        cos, sin = llama.model.rotary_emb(table, self._positions[None])
        # Half of the sines negative: rotating is then one roll of the head, without a negation.
        half = self._head_dim // 2
        self._cos, self._sin = cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=1)
        self._token = torch.zeros(1, dtype=torch.long, device=self.device)
        self._at = torch.zeros(1, dtype=torch.long, device=self.device)
        self._graphs: list[tuple[int, torch.cuda.CUDAGraph, Tensor]] = []

    def resume(self, marks: Sequence[int]) -> int:
        """How many of these positions are computed already; the others are now forgotten.

        Never all of them: the last one's logits are wanted.
        """
        here = _common(self._marks, marks)
        best = max(self._parked, key=lambda parked: _common(parked.marks, marks), default=None)
        if best is not None and _common(best.marks, marks) > here:
            self._parked.remove(best)
            self._park()
            self._cache[:, :, :, :, : len(best.marks)] = best.cache
            self._marks, here = list(best.marks), _common(best.marks, marks)
        elif 2 * here < len(self._marks):
            self._park()
        here = min(here, len(marks) - 1)
        del self._marks[here:]
        return here

    def read(self, embeddings: Tensor, marks: Sequence[int]) -> Tensor:
        """[1, T, width] of the positions that follow → float32 [vocabulary] after the last one."""
        start, end = len(self._marks), len(self._marks) + len(marks)
        positions = self._positions[start:end]
        mask = None
        if 0 < start < end - 1:
            mask = positions[:, None] >= self._positions[:end]
        logits = self._forward(embeddings, positions, end, mask, causal=start == 0)
        self._marks += marks
        return logits

    def step(self, token: Tensor) -> Tensor:
        """[1] id of the token that follows → as `read`; valid until the next step.

        What the token is may not be known here yet: `note` says it.
        """
        position = len(self._marks)
        self._marks.append(-1)
        for seen, graph, logits in self._graphs:
            if position < seen:
                self._token.copy_(token)
                self._at.fill_(position)
                graph.replay()
                return logits
        at = self._positions[position : position + 1]
        return self._forward(self.embed(token), at, position + 1, None)

    def note(self, token: int) -> None:
        """Say which token the last step was given."""
        self._marks[-1] = token

    def embed(self, ids: Tensor) -> Tensor:
        """[T] ids → [1, T, width]."""
        embeddings: Tensor = self._llama.get_input_embeddings()(ids)[None]
        return embeddings

    def forget(self) -> None:
        """Forget every conversation, and whatever numbers a failed one has left."""
        self._marks.clear()
        self._parked.clear()
        self._cache.zero_()

    @torch.inference_mode()
    def record(self) -> None:
        """Record the CUDA graphs of a step; without them, steps are slower and no less right.

        bitsandbytes' 8-bit layers ask the GPU whether there are outliers, so there is nothing to
        record of them; its 4-bit ones nobody has recorded yet.
        """
        if any(type(layer.mlp.up_proj) is not nn.Linear for layer in self._layers):
            return
        try:
            pool, side = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            # Where they are recorded, and left again even if that fails: torch's own way out of a
            # recording that broke off would leave this thread on its stream.
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for seen in reversed(self._sizes()):
                    self._recorded(seen)  # libraries set themselves up outside of a recording
                    graph = torch.cuda.CUDAGraph()
                    # What other threads ask of the GPU meanwhile, for metrics, is not part of it.
                    with torch.cuda.graph(
                        graph, pool=pool, stream=side, capture_error_mode="thread_local"
                    ):
                        logits = self._recorded(seen)
                    self._graphs.insert(0, (seen, graph, logits))
            torch.cuda.current_stream().wait_stream(side)
        except RuntimeError as error:
            self._graphs.clear()
            log.warning("CUDA graphs are not used: %s", " ".join(str(error).split())[:200])

    def _sizes(self) -> list[int]:
        sizes = []
        size = _SHORTEST
        while size < self.length:
            sizes.append(size)
            size *= 2
        return [*sizes, self.length]

    def _recorded(self, seen: int) -> Tensor:
        """A step whose token and position are read from the device."""
        mask = self._positions[:seen] <= self._at[:, None]
        return self._forward(self.embed(self._token), self._at, seen, mask)

    def _forward(
        self, x: Tensor, at: Tensor, seen: int, mask: Tensor | None, causal: bool = False
    ) -> Tensor:
        """Write the positions `at` and look at the first `seen`."""
        cos, sin = self._cos[at], self._sin[at]
        turn = self._head_dim // 2

        def heads(y: Tensor) -> Tensor:
            return y.view(1, len(at), -1, self._head_dim).transpose(1, 2)

        def rotated(y: Tensor) -> Tensor:
            return torch.addcmul(y * cos, y.roll(turn, -1), sin)

        for layer, (keys, values) in zip(self._layers, self._cache, strict=True):
            attention = layer.self_attn
            y = _norm(layer.input_layernorm, x)
            keys.index_copy_(2, at, rotated(heads(attention.k_proj(y))))
            values.index_copy_(2, at, heads(attention.v_proj(y)))
            y = scaled_dot_product_attention(
                rotated(heads(attention.q_proj(y))),
                keys[:, :, :seen],
                values[:, :, :seen],
                attn_mask=mask,
                is_causal=causal,
                enable_gqa=self._grouped,
            )
            x = x + attention.o_proj(y.transpose(1, 2).reshape(1, len(at), -1))
            x = x + layer.mlp(_norm(layer.post_attention_layernorm, x))
        last = _norm(self._llama.model.norm, x[:, -1])
        logits: Tensor = self._llama.lm_head(last)[0].float()
        return logits

    def _park(self) -> None:
        """Keep a copy of this conversation beside the others, the oldest of which make room."""
        length = len(self._marks)
        self._parked = [p for p in self._parked if _common(p.marks, self._marks) < len(p.marks)]
        while self._parked and length + sum(len(p.marks) for p in self._parked) > self.length:
            del self._parked[0]
        if not length:
            return
        try:
            copy = self._cache[:, :, :, :, :length].clone()
        except RuntimeError as error:
            if not ran_out(error):
                raise
            self._parked.clear()
            return
        self._parked.append(_Parked(list(self._marks), copy))


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    """LlamaRMSNorm in one kernel."""
    return rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many elements two sequences begin with alike."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))
