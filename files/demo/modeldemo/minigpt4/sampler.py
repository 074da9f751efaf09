"""Chooses the next token on the device, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine import Sampling


class Sampler:
    """One answer's choices: greedy at temperature 0, else drawn by its seed."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._sampling = sampling
        self._random = torch.Generator(device)
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)
        self._made = torch.empty(0, dtype=torch.long, device=device)

    def choose(self, logits: Tensor) -> Tensor:
        """float32 [vocabulary] → int64 [2]: the token, and 1 if the logits were numbers."""
        sound = logits.isfinite().all()
        if self._sampling.repetition_penalty != 1:
            logits = self._penalised(logits)
        if self._sampling.temperature > 0:
            ids, weights = self.candidates(logits)
            # The largest of weight / exponential noise is a draw by weight. Unlike multinomial it
            # needs no answer from the GPU, and no weights that are not numbers can crash it.
            noise = torch.empty_like(weights).exponential_(generator=self._random)
            # One index in a list: by a number of its own torch would ask the GPU for it.
            token = ids[(weights / noise).argmax(0, keepdim=True)]
        else:
            token = logits.argmax(0, keepdim=True)
        if self._sampling.repetition_penalty != 1:
            self._made = torch.cat((self._made, token))
        return torch.cat((token, sound.long()[None]))

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens that top_k and top_p leave, likeliest first, and their weights (0: left out)."""
        count = min(self._sampling.top_k or len(logits), len(logits))
        scores, ids = (logits / self._sampling.temperature).topk(count)
        weights = scores.softmax(0)
        before = weights.cumsum(0) - weights
        return ids, weights.where(before < self._sampling.top_p, 0)

    def _penalised(self, logits: Tensor) -> Tensor:
        """As transformers: the answer's own tokens, each once, are made less likely."""
        penalty = self._sampling.repetition_penalty
        scores = logits[self._made]
        scores = torch.where(scores < 0, scores * penalty, scores / penalty)
        return logits.scatter(0, self._made, scores)
