"""Answers questions about pictures with a loaded MiniGPT-4, piece by piece."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from ..device import ran_out, require_alive
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
from .context import Part, Picture, layout
from .conversation import segments
from .decoder import Decoder
from .load import load
from .model import MiniGPT4
from .preprocess import normalize, resize
from .sampler import Sampler
from .settings import Settings
from .tokenizer import Tokenizer

# Tokens of question and answer together, as upstream's demo limits them.
MAX_LENGTH = 2000
#: Pictures whose embeddings are kept, a quarter of a megabyte each for 7B.
PICTURES_KEPT = 64


class MiniGPT4Engine:
    """The Engine of MiniGPT-4; see modeldemo.engine for what it promises."""

    page = Page(
        pictures="several",
        controls=("num_beams", "temperature", "top_p", "max_new_tokens", "seed"),
    )
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
        self.context = min(MAX_LENGTH, model.llama.config.max_position_embeddings)
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._device = model.query_tokens.device
        self._decoder = Decoder(model.llama, self.context)
        if self._device.type == "cuda":
            self._decoder.record()
        self._pictures: OrderedDict[bytes, tuple[Picture, Tensor]] = OrderedDict()
        self._encoded = 0

    def stream(self, conversation: Conversation, sampling: Sampling) -> Iterator[Piece]:
        """Yield the answer to the last turn; with beams its text comes as one piece."""
        if not conversation.images:
            raise BadRequest("messages: this model talks about a picture; attach one")
        if not 0 < sampling.max_new_tokens < self.context:
            raise BadRequest(f"max_tokens: must be 1 to {self.context - 1}")
        return self._stream(conversation, sampling)

    def _stream(self, conversation: Conversation, sampling: Sampling) -> Iterator[Piece]:
        with self._explained():
            before = self._encoded
            parts, embeddings = self._context(conversation, sampling.max_new_tokens)
            encoded = self._encoded - before
            reused = len(conversation.images) - encoded
            length = sum(len(p) if isinstance(p, list) else p.width for p in parts)
            yield Piece("", 0, length, pictures_encoded=encoded, pictures_reused=reused)
            if sampling.num_beams > 1:
                yield from self._search(self._embedded(parts, embeddings), sampling)
            else:
                yield from self._generate(parts, embeddings, sampling)

    def _generate(
        self, parts: list[Part], pictures: dict[Picture, Tensor], sampling: Sampling
    ) -> Iterator[Piece]:
        """Token after token; what the last conversations have in common is not computed again."""
        decoder, answer = self._decoder, Answer(self._tokenizer)
        sampler = Sampler(sampling, self._device)
        ahead = self._device.type == "cuda"
        chosen = torch.empty(2, dtype=torch.long, pin_memory=ahead)
        with torch.inference_mode():
            marks = [m for part in parts for m in (part if isinstance(part, list) else part.marks)]
            known = decoder.resume(marks)
            logits = decoder.read(self._embedded(parts, pictures)[:, known:], marks[known:])
        for left in reversed(range(sampling.max_new_tokens)):
            with torch.inference_mode():
                choice = sampler.choose(logits)
                chosen.copy_(choice, non_blocking=True)
                if ahead:
                    # The GPU goes on to the next step while this one's token is looked at.
                    copied = torch.cuda.Event()
                    copied.record()
                    logits = decoder.step(choice[:1])
                    copied.synchronize()
                token, sound = chosen.tolist()
                if not sound:
                    raise _not_numbers()
                if ahead:
                    decoder.note(token)
            if token == self._tokenizer.eos:
                yield Piece(answer.finish(), 1, finish="stop")
                return
            text = answer.add([token])
            if answer.ended:
                yield Piece(text + answer.finish(), 1, finish="stop")
                return
            if not left:
                yield Piece(text + answer.finish(), 1, finish="length")
                return
            yield Piece(text, 1)
            if not ahead:
                with torch.inference_mode():
                    logits = decoder.step(choice[:1])
                    decoder.note(token)

    def _search(self, context: Tensor, sampling: Sampling) -> Iterator[Piece]:
        """Beams, by transformers: nothing of an answer is certain before its end."""
        job = _Job(self._model, self._tokenizer, context, sampling)
        job.start()
        try:
            for ids in job.steps():
                if ids is None:
                    yield Piece()
                    continue
                answer = Answer(self._tokenizer)
                text = answer.add(ids)
                whole = answer.ended or self._tokenizer.eos in ids
                cut = len(ids) >= sampling.max_new_tokens and not whole
                yield Piece(text + answer.finish(), len(ids), finish="length" if cut else "stop")
        finally:
            job.stop()

    @torch.inference_mode()
    def _context(
        self, conversation: Conversation, max_new_tokens: int
    ) -> tuple[list[Part], dict[Picture, Tensor]]:
        """The parts of the context, and its pictures' embeddings."""
        turns = conversation.turns
        if conversation.system and turns:
            # MiniGPT-4 was trained with a system prompt of its own, which has to stay.
            first = replace(turns[0], text=f"{conversation.system}\n{turns[0].text}")
            turns = (first, *turns[1:])
        found = segments(turns)
        pictures = [self._picture(image) for image in conversation.images]
        room = self.context - max_new_tokens
        parts = layout(found, [picture for picture, _ in pictures], self._tokenizer, room)
        return parts, dict(pictures)

    def _picture(self, image: Image.Image) -> tuple[Picture, Tensor]:
        """A picture and its [1, query tokens, LLaMA width], computed once for equal pixels."""
        sizes = self._model.sizes
        pixels = resize(image, sizes.image_size)
        key = hashlib.sha256(pixels.numpy().tobytes()).digest()
        if key in self._pictures:
            self._pictures.move_to_end(key)
            return self._pictures[key]
        encoded = self._model.encode_image(normalize(pixels.to(self._device))[None])
        picture = Picture(self._encoded, sizes.query_tokens)
        self._encoded += 1
        self._pictures[key] = picture, encoded.to(self._decoder.dtype)
        if len(self._pictures) > PICTURES_KEPT:
            self._pictures.popitem(last=False)
        return self._pictures[key]

    @torch.inference_mode()
    def _embedded(self, parts: list[Part], pictures: dict[Picture, Tensor]) -> Tensor:
        """[1, T, LLaMA width] of all parts."""
        return torch.cat(
            [
                self._decoder.embed(torch.tensor(part, device=self._device))
                if isinstance(part, list)
                else pictures[part]
                for part in parts
            ],
            dim=1,
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what goes wrong into one line, after which the next question can be answered."""
        try:
            yield
        except BadRequest:
            raise
        except Exception as error:
            require_alive(self._device)
            out = _out_of_memory(error)
            self._decoder.forget()
            if out:
                self._pictures.clear()
                torch.cuda.empty_cache()
                raise out from None
            if isinstance(error, ModelDemoError):
                raise
            if "probability tensor contains" in str(error):
                raise _not_numbers() from error
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise ModelDemoError(f"generation failed: {reason}") from error


class _Job(StoppingCriteria):
    """One beam search in a thread of its own, which shows its steps and can be stopped."""

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

    def steps(self) -> Iterator[list[int] | None]:
        """None for every step, at last the ids; raises what the search raised."""
        while True:
            got = self._queue.get()
            if isinstance(got, BaseException):
                raise got
            yield got
            if got is not None:
                return

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """StoppingCriteria: which rows end with the separator; all of them once stopped."""
        self._queue.put(None)
        done = torch.full(input_ids.shape[:1], self._stopped.is_set(), device=input_ids.device)
        for end in self._ends:
            if input_ids.shape[1] >= len(end):
                done |= (input_ids[:, -len(end) :] == end).all(dim=1)
        return done

    @torch.inference_mode()
    def _run(self) -> None:
        sampling = self._sampling
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
                **options,
            )
            self._queue.put(ids[0].tolist())
        except Exception as error:
            self._queue.put(error)


def _out_of_memory(error: Exception) -> OutOfMemory | None:
    """The line for a request that there was no memory for; None for any other error."""
    if ran_out(error):
        return OutOfMemory(
            "GPU out of memory: use fewer beams, set model.precision to 8bit or 4bit, or take "
            "the 7B model"
        )
    if isinstance(error, RuntimeError) and "not enough memory" in str(error):
        return OutOfMemory("not enough memory on this host: use fewer beams")
    return None


def _not_numbers() -> ModelDemoError:
    return ModelDemoError(
        "the model's output is not a number: raise the temperature, or check that the weights are "
        "the merged ones"
    )
