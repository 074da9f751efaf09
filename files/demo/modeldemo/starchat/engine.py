"""Answers a text conversation with a loaded StarChat, token by token."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.models.gpt_bigcode.configuration_gpt_bigcode import GPTBigCodeConfig
from transformers.models.gpt_bigcode.modeling_gpt_bigcode import GPTBigCodeForCausalLM

from ..device import choose_device, choose_precision, ran_out, require_alive
from ..engine import (
    BadRequest,
    Conversation,
    ModelDemoError,
    OutOfMemory,
    Page,
    Piece,
    Sampling,
    Turn,
)
from ..hub_folder import Settings
from ..pretrained import load as load_weights
from ..pretrained import read_config, tensors
from .tokenizer import Text, Tokenizer

log = logging.getLogger("modeldemo")

# Tokens of a prompt that are read at once: between two parts the reader can leave.
PART = 1024


class StarChatEngine:
    """The Engine of StarChat; see modeldemo.engine for what it promises.

    The keys and values of the last conversation are kept: a question that continues it is read
    from where the two differ.
    """

    page = Page(
        kind="chat",
        pictures="none",
        system_prompt=True,
        controls=("temperature", "top_k", "top_p", "max_new_tokens", "repetition_penalty"),
    )
    # Those of StarChat's own demo.
    defaults = Sampling(
        temperature=0.2, top_k=50, top_p=0.95, max_new_tokens=1024, repetition_penalty=1.2
    )
    health = Conversation((Turn("user", "Write a function that adds two numbers."),))

    def __init__(self, model_id: str, model: GPTBigCodeForCausalLM, tokenizer: Tokenizer) -> None:
        self.model_id = model_id
        self._model = model
        self._tokenizer = tokenizer
        self._device = model.transformer.wte.weight.device
        self.context = int(model.config.n_positions)
        self._cache = DynamicCache()
        self._cached: list[int] = []

    @classmethod
    def load(cls, settings: Settings, device: str, model_id: str) -> StarChatEngine:
        """Small checks first, then the weights; raises ModelDemoError, one line."""
        where = choose_device(device)
        precision = choose_precision(settings.precision, where)
        config = read_config(settings.folder, GPTBigCodeConfig)
        tokenizer = Tokenizer(settings.folder / "tokenizer.json")
        if tokenizer.size > config.vocab_size:
            raise ModelDemoError(
                f"{settings.folder}: tokenizer.json has {tokenizer.size} tokens, config.json "
                f"{config.vocab_size}; the two belong to different models: fetch both from one "
                "place"
            )
        with torch.device("meta"):
            model = GPTBigCodeForCausalLM(config)
        load_weights(model, tensors(settings.folder), settings.folder, where, precision)
        log.info("%s: StarChat in %s on %s", model_id, precision, where)
        return cls(model_id, model, tokenizer)

    def stream(self, conversation: Conversation, sampling: Sampling) -> Iterator[Piece]:
        """Yield the answer to the last turn, a piece for every token.

        A conversation that does not fit the context loses its oldest questions and answers; half
        of the context at most is kept free for the answer. Raises BadRequest when the last
        question alone does not fit, or for a value that no answer can be made with.
        """
        _check(sampling)
        if conversation.images:
            raise BadRequest("messages: this model reads no pictures; leave them out")
        return self._stream(self._prompt(conversation, sampling), sampling)

    def _prompt(self, conversation: Conversation, sampling: Sampling) -> list[int]:
        room = self.context - min(sampling.max_new_tokens, self.context // 2)
        system, *turns = self._tokenizer.parts(conversation)
        ids = self._tokenizer.joined([system, *turns])
        while len(ids) > room and len(turns) > 1:
            turns = turns[2:]
            ids = self._tokenizer.joined([system, *turns])
        if len(ids) >= self.context:
            raise BadRequest(
                f"messages: the question and the system prompt have {len(ids)} tokens, and this "
                f"model reads and writes {self.context} in all; shorten them"
            )
        return ids

    @torch.inference_mode()
    def _stream(self, ids: list[int], sampling: Sampling) -> Iterator[Piece]:
        choose = _Choice(sampling, self._device)
        text = Text(self._tokenizer)
        room = min(sampling.max_new_tokens, self.context - len(ids))
        fresh = self._continue(ids)
        try:
            yield Piece(prompt_tokens=len(ids))
            for start in range(0, len(fresh), PART):
                logits = self._read(fresh[start : start + PART])
                yield Piece()
            said = list(ids)
            for made in range(1, room + 1):
                token = choose(torch.tensor([said]), logits)
                if token in self._tokenizer.ends:
                    yield Piece("", 1, finish="stop")
                    return
                if made == room:
                    yield Piece(text.add(token), 1, finish="length")
                    return
                yield Piece(text.add(token), 1)
                said.append(token)
                logits = self._read([token])
        except ModelDemoError:
            raise
        except Exception as error:
            # What the layers hold may differ from layer to layer now.
            self._cache, self._cached = DynamicCache(), []
            require_alive(self._device)
            raise _explained(error) from error

    def _continue(self, ids: list[int]) -> list[int]:
        """Cut the cache to what `ids` begins with; returns the rest, never empty."""
        same = 0
        for kept, new in zip(self._cached, ids[:-1], strict=False):
            if kept != new:
                break
            same += 1
        if same:
            self._cache.crop(same - len(self._cached))
        else:
            self._cache = DynamicCache()
        self._cached = ids[:same]
        return ids[same:]

    def _read(self, ids: list[int]) -> Tensor:
        """Let the model read tokens behind those in the cache; [1, vocabulary] of what follows."""
        found = self._model(
            torch.tensor([ids], device=self._device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cached = self._cached + ids
        logits: Tensor = found.logits[:, -1].float()
        return logits


class _Choice:
    """Chooses the next token as transformers' generate does with the same values."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._device = device
        self._scores = LogitsProcessorList()
        if sampling.repetition_penalty != 1:
            self._scores.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        self._greedy = sampling.temperature == 0
        if self._greedy:
            return
        self._scores.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            self._scores.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._scores.append(TopPLogitsWarper(sampling.top_p))
        # Of its own: no other request, and no library, draws from it in between.
        self._random = torch.Generator(device)
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    def __call__(self, ids: Tensor, logits: Tensor) -> int:
        """The id that follows `ids` [1, T]; ModelDemoError where the logits are no numbers."""
        if not bool(torch.isfinite(logits).all()):
            raise ModelDemoError(
                "the model's output is not a number: check the weights' hashes, or set "
                "model.precision to bf16 or fp32"
            )
        scores = self._scores(cast(torch.LongTensor, ids.to(self._device)), logits)
        if self._greedy:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._random))


def _check(sampling: Sampling) -> None:
    """Raise BadRequest for a value that no answer can be made with."""
    if sampling.num_beams != 1:
        raise BadRequest("num_beams: this model answers with one beam")
    if sampling.max_new_tokens < 1:
        raise BadRequest("max_tokens: must be at least 1")
    if not sampling.temperature >= 0:
        raise BadRequest("temperature: must be at least 0")
    if sampling.top_k < 0:
        raise BadRequest("top_k: must be at least 0, which means all")
    if not 0 <= sampling.top_p <= 1:
        raise BadRequest("top_p: must be 0 to 1")
    if not sampling.repetition_penalty > 0:
        raise BadRequest("repetition_penalty: must be above 0; 1 means none")


def _explained(error: Exception) -> ModelDemoError:
    """What a person can do about a failed generation, in one line."""
    if ran_out(error):
        torch.cuda.empty_cache()
        return OutOfMemory(
            "GPU out of memory: ask with less text or fewer new tokens, or set model.precision "
            "to 8bit or 4bit"
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    return ModelDemoError(f"generation failed: {reason}")
