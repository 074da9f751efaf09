"""Answers questions about a picture with a loaded MiniGPT-4, piece by piece."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

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
from .answer import Answer
from .conversation import around_image, prompt
from .load import load
from .model import MiniGPT4
from .preprocess import preprocess
from .settings import Settings
from .tokenizer import Tokenizer

# Tokens of question and answer together, as upstream's demo limits them.
MAX_LENGTH = 2000


class MiniGPT4Engine:
    """The Engine of MiniGPT-4; see modeldemo.engine for what it promises."""

    page = Page(pictures="one", controls=("num_beams", "temperature"))
    defaults = Sampling()
    health = Conversation(
        (
            Turn(
                "user",
                "Describe this image in detail.",
                (Image.new("RGB", (224, 224), "white"),),
            ),
        )
    )

    @classmethod
    def load(cls, settings: Settings, device: str, model_id: str) -> MiniGPT4Engine:
        """Load a configured model; see modeldemo.engine."""
        return cls(model_id, *load(settings, device))

    def __init__(self, model_id: str, model: MiniGPT4, tokenizer: Tokenizer) -> None:
        self.model_id = model_id
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._device = model.query_tokens.device
        self._limit = min(MAX_LENGTH, model.llama.config.max_position_embeddings)

    def stream(self, conversation: Conversation, sampling: Sampling) -> Iterator[Piece]:
        """Yield the answer to the last turn; with beams its text comes as one piece."""
        if not conversation.images:
            raise BadRequest("messages: this model talks about a picture; attach one")
        if not 0 < sampling.max_new_tokens < self._limit:
            raise BadRequest(f"max_tokens: must be 1 to {self._limit - 1}")
        text = prompt(conversation.turns)
        return self._stream(conversation.images[-1], text, sampling)

    def _stream(self, image: Image.Image, text: str, sampling: Sampling) -> Iterator[Piece]:
        context = self._context(image, text, sampling.max_new_tokens)
        yield Piece(prompt_tokens=context.shape[1])
        job = _Job(self._model, self._tokenizer, context, sampling)
        job.start()
        try:
            answer = Answer(self._tokenizer)
            held, made = "", 0
            for ids in job.tokens():
                made += len(ids)
                text = answer.add(ids)
                if sampling.num_beams > 1:
                    held, text = held + text, ""
                yield Piece(text, len(ids))
                if answer.ended:
                    break
            cut = made >= sampling.max_new_tokens and not answer.ended
            yield Piece(held + answer.finish(), finish="length" if cut else "stop")
        finally:
            job.stop()

    @torch.inference_mode()
    def _context(self, image: Image.Image, text: str, max_new_tokens: int) -> Tensor:
        """[1, T, LLaMA width]: text, picture, text; its beginning is cut when it is too long."""
        pixels = preprocess(image, self._model.sizes.image_size).to(self._device)
        before, after = around_image(text)
        first = [self._tokenizer.bos, *self._tokenizer.encode(before)]
        parts = [
            self._embed(first),
            self._model.encode_image(pixels),
            self._embed(self._tokenizer.encode(after)),
        ]
        dtype = parts[0].dtype
        whole = torch.cat([part.to(dtype) for part in parts], dim=1)
        return whole[:, max(0, whole.shape[1] + max_new_tokens - self._limit) :]

    def _embed(self, ids: list[int]) -> Tensor:
        return self._model.embed(torch.tensor([ids], device=self._device))


class _Job(BaseStreamer, StoppingCriteria):
    """One generation in a thread of its own, which hands over ids and can be stopped."""

    def __init__(
        self, model: MiniGPT4, tokenizer: Tokenizer, context: Tensor, sampling: Sampling
    ) -> None:
        self._model, self._context, self._sampling = model, context, sampling
        self._ends = [torch.tensor(ids, device=context.device) for ids in tokenizer.separators]
        self._eos = tokenizer.eos
        self._stopped = threading.Event()
        self._queue: queue.SimpleQueue[list[int] | BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="generate")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End within one token and wait for it."""
        self._stopped.set()
        self._thread.join()

    def tokens(self) -> Iterator[list[int]]:
        """New ids, as they are chosen; raises what the generation raised."""
        while True:
            got = self._queue.get()
            if got is None:
                return
            if isinstance(got, BaseException):
                raise _explained(got) from got
            yield got

    def put(self, value: Tensor) -> None:
        """BaseStreamer: the ids chosen in one step."""
        self._queue.put(value.flatten().tolist())

    def end(self) -> None:
        """BaseStreamer: nothing to do, `_run` marks the end."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """StoppingCriteria: which rows end with the separator; all of them once stopped."""
        if self._sampling.num_beams > 1:
            self._queue.put([])  # no ids are certain yet
        done = torch.full(input_ids.shape[:1], self._stopped.is_set(), device=input_ids.device)
        for end in self._ends:
            if input_ids.shape[1] >= len(end):
                done |= (input_ids[:, -len(end) :] == end).all(dim=1)
        return done

    @torch.inference_mode()
    def _run(self) -> None:
        sampling = self._sampling
        beams = sampling.num_beams > 1
        options: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            options = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
            }
        try:
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
            ids = self._model.llama.generate(
                inputs_embeds=self._context,
                attention_mask=torch.ones(self._context.shape[:2], device=self._context.device),
                max_new_tokens=sampling.max_new_tokens,
                min_length=1,
                num_beams=sampling.num_beams,
                repetition_penalty=sampling.repetition_penalty,
                length_penalty=1.0,
                pad_token_id=self._eos,
                stopping_criteria=StoppingCriteriaList([self]),
                streamer=None if beams else self,
                **options,
            )
            if beams:
                self._queue.put(ids[0].tolist())
            self._queue.put(None)
        except Exception as error:
            self._queue.put(error)


def _explained(error: BaseException) -> ModelDemoError:
    """What a person can do about a failed generation, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return OutOfMemory(
            "GPU out of memory: use one beam, set model.precision to 8bit, or take the 7B model"
        )
    if "probability tensor contains" in str(error):
        return ModelDemoError(
            "the model's output is not a number: raise the temperature, or check that the weights "
            "are the merged ones"
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    return ModelDemoError(f"generation failed: {reason}")
