"""Gives the one model to many callers: one answer at a time, a bounded queue, prompt cancelling."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Literal, TypeVar, cast

from modeldemo.engine import (
    BadRequest,
    Conversation,
    DeviceLost,
    Engine,
    ModelDemoError,
    Piece,
    Sampling,
)
from modeldemo.limits import Limits
from modeldemo.metrics import Metrics
from modeldemo.stops import Stops

log = logging.getLogger("modeldemo")
T = TypeVar("T")


class Unavailable(ModelDemoError):
    """The service cannot take a question now; `retry_after` (seconds) says when it may."""

    def __init__(self, message: str, retry_after: int, code: str = "unavailable") -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.code = code


class TooSlow(ModelDemoError):
    """A question that was not answered within its time."""


class Answer:
    """The pieces of one answer as the model produces them; leaving it early stops the model.

    Made and read on the event loop, filled by the model's thread.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | ModelDemoError | None] = asyncio.Queue()
        self._left = threading.Event()
        self._future: Future[None] | None = None
        self._ahead: list[str | None] = []  # what wait_first took
        self._alarm: asyncio.TimerHandle | None = None
        self.late = False
        self.asked = time.monotonic()
        # Whole once the last piece has come.
        self.prompt_tokens = 0
        self.new_tokens = 0
        self.finish: Literal["stop", "length"] = "stop"

    @property
    def left(self) -> bool:
        """Whether nobody reads on."""
        return self._left.is_set()

    def leave(self) -> None:
        """Stop the model at its next piece, or take the question out of the queue."""
        self._left.set()
        if self._future and self._future.cancel():
            self._pieces.put_nowait(None)

    def expire_after(self, seconds: float) -> None:
        """Give up, and tell the reader, unless the answer ends within that time from now."""
        self._alarm = self._loop.call_later(seconds, self._expire, seconds)

    def _expire(self, seconds: float) -> None:
        self.late = True
        error = TooSlow(
            f"the answer took longer than {seconds:g} seconds, waiting included; "
            "ask for fewer tokens or beams, or ask again later"
        )
        self._pieces.put_nowait(error)
        self.leave()

    def _ended(self) -> None:
        """Called in any thread when the model is done with the question."""
        self._loop.call_soon_threadsafe(lambda: self._alarm and self._alarm.cancel())

    async def wait_first(self, timeout: float) -> None:
        """Wait up to `timeout` seconds for the first piece; raises what the model raised."""
        try:
            self._ahead.append(await asyncio.wait_for(self._next(), timeout))
        except asyncio.TimeoutError:
            return

    async def pieces(self, patience: float | None = None) -> AsyncGenerator[str, None]:
        """Yield the pieces; an empty one after every `patience` seconds without any."""
        try:
            while True:
                try:
                    if self._ahead:
                        piece = self._ahead.pop()
                    else:
                        piece = await asyncio.wait_for(self._next(), patience)
                except asyncio.TimeoutError:
                    yield ""
                    continue
                if piece is None:
                    return
                yield piece
        except BaseException:  # closed or cancelled: the reader is gone
            self.leave()
            raise

    async def _next(self) -> str | None:
        piece = await self._pieces.get()
        if isinstance(piece, ModelDemoError):
            raise piece
        return piece

    def _put(self, piece: str | ModelDemoError | None) -> None:
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)


class Runner:
    """Owns the engine, the one thread that may touch it, and the queue in front of it."""

    def __init__(
        self,
        model_id: str,
        metrics: Metrics,
        *,
        limits: Limits,
        revision: str = "",
        weights: str = "",
    ) -> None:
        self.model_id = model_id
        self.revision = revision
        self.weights = weights
        self.metrics = metrics
        self.limits = limits
        self.state: Literal["loading", "ok", "failed", "stopping"] = "loading"
        self.error: str | None = None
        self.engine: Engine | None = None
        self._started = time.monotonic()
        self._thread = ThreadPoolExecutor(1, "model")
        self._jobs: dict[Future[None], Answer] = {}
        self._last_seconds = 1.0
        metrics.watch_queue(lambda: self.waiting, lambda: self.busy)

    @property
    def uptime(self) -> float:
        """Seconds since the process began to serve."""
        return time.monotonic() - self._started

    @property
    def waiting(self) -> int:
        """Questions behind the one that is being answered."""
        return max(0, len(self._jobs) - 1)

    @property
    def busy(self) -> bool:
        return bool(self._jobs)

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Run in the model's thread, so that one thread loads, sets up and uses the model."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def open(self) -> None:
        """Take questions."""
        if self.state == "loading":
            self.state = "ok"
            self.metrics.ready.set(1)

    def fail(self, error: ModelDemoError) -> None:
        """Say from now on why there will be no answers."""
        self.state, self.error = "failed", str(error)
        self.metrics.ready.set(0)

    def require_ready(self) -> Engine:
        """Return the engine; raises Unavailable while loading, after a failure or when stopping."""
        if self.state == "ok" and self.engine:
            return self.engine
        if self.state == "failed":
            raise Unavailable(f"the model could not be loaded: {self.error}", 60)
        if self.state == "stopping":
            raise _stopping()
        raise Unavailable("the model is loading; ask again in a moment", 5)

    def require_room(self) -> None:
        """Raise Unavailable when the queue is full."""
        if len(self._jobs) > self.limits.waiting:
            raise Unavailable(
                f"{self.waiting} questions are waiting already; ask again later",
                max(1, math.ceil(self._last_seconds)),
                "queue_full",
            )

    def ask(
        self, conversation: Conversation, sampling: Sampling, stop: Sequence[str] = ()
    ) -> Answer:
        """Queue a question; the answer ends before the first of the `stop` strings.

        Raises Unavailable (not ready, queue full) or BadRequest. The answer raises TooSlow when
        it was not complete within `limits.seconds`.
        """
        engine = self.require_ready()
        pictures = engine.page.pictures
        if pictures != "none" and not conversation.images:
            raise BadRequest(
                f"the model {self.model_id} answers about a picture; "
                "add one as an image_url part of a user message"
            )
        if conversation.images and pictures == "none":
            raise BadRequest(f"the model {self.model_id} reads no pictures; leave image_url out")
        self.require_room()
        answer = self._submit(engine, conversation, sampling, stop)
        answer.expire_after(self.limits.seconds)
        return answer

    async def prove(self) -> None:
        """Answer one short question, as a proof that the model works; raises ModelDemoError."""
        assert self.engine
        short = replace(self.engine.defaults, temperature=0, max_new_tokens=8)
        answer = self._submit(self.engine, self.engine.health, short)
        async for _ in answer.pieces():
            pass

    def close(self) -> None:
        """Refuse new questions and drop the waiting ones; the running one goes on."""
        self.state = "stopping"
        self.metrics.ready.set(0)
        for future, answer in list(self._jobs.items()):
            if future.cancel():
                answer._put(_stopping())
        self._thread.shutdown(wait=False)

    def abort(self) -> None:
        """Stop the running answer too, and tell its reader."""
        for answer in self._jobs.values():
            answer._left.set()
            answer._put(_stopping())

    def _submit(
        self,
        engine: Engine,
        conversation: Conversation,
        sampling: Sampling,
        stop: Sequence[str] = (),
    ) -> Answer:
        answer = Answer()
        future = self._thread.submit(self._answer, engine, answer, conversation, sampling, stop)
        answer._future = future
        self._jobs[future] = answer

        def ended(done: Future[None]) -> None:
            self._jobs.pop(done, None)
            answer._ended()

        future.add_done_callback(ended)
        return answer

    def _answer(
        self,
        engine: Engine,
        answer: Answer,
        conversation: Conversation,
        sampling: Sampling,
        stop: Sequence[str],
    ) -> None:
        started = time.monotonic()
        first: float | None = None
        outcome = "complete"
        cut = Stops(stop)
        try:
            # Leaving the block closes the iterator, which stops the model.
            stream = cast("Generator[Piece, None, None]", engine.stream(conversation, sampling))
            with closing(stream) as pieces:
                for piece in pieces:
                    answer.prompt_tokens += piece.prompt_tokens
                    answer.new_tokens += piece.new_tokens
                    self.metrics.prompt_tokens.inc(piece.prompt_tokens)
                    self.metrics.completion_tokens.inc(piece.new_tokens)
                    self.metrics.pictures_encoded.inc(piece.pictures_encoded)
                    self.metrics.pictures_reused.inc(piece.pictures_reused)
                    answer.finish = piece.finish or answer.finish
                    if answer.left:
                        outcome = "late" if answer.late else "cancelled"
                        break
                    if first is None and (piece.text or piece.new_tokens):
                        first = time.monotonic()
                        self.metrics.first_token_seconds.observe(first - answer.asked)
                    if text := cut.add(piece.text):
                        answer._put(text)
                    if cut.met:
                        answer.finish = "stop"
                        break
            if outcome == "complete" and (rest := cut.finish()):
                answer._put(rest)
        except BadRequest as error:
            outcome = "refused"
            answer._put(error)
        except DeviceLost as error:
            outcome = "failed"
            self.fail(error)
            log.error("%s", error)
            answer._put(Unavailable(str(error), 30))
        except Exception as error:
            outcome = "failed"
            answer._put(failure(error))
        finally:
            ended = time.monotonic()
            if outcome == "complete":
                self._last_seconds = ended - started
                self.metrics.answer_seconds.observe(ended - started)
                if first is not None and answer.new_tokens > 1 and ended > first:
                    self.metrics.tokens_per_second.observe(
                        (answer.new_tokens - 1) / (ended - first)
                    )
            self.metrics.answers.labels(outcome).inc()
            answer._put(None)


def _stopping() -> Unavailable:
    return Unavailable("the service is stopping; ask again when it is back", 10)


def failure(error: Exception, what: str = "the model failed") -> ModelDemoError:
    """One line for an error of the model, logged; the stack only at log level DEBUG."""
    if not isinstance(error, ModelDemoError):
        text = " ".join(str(error).split())
        error = ModelDemoError(f"{what}: {type(error).__name__}: {text[:300]}")
    log.error("%s", " ".join(str(error).split()))
    log.debug("where it failed", exc_info=error.__context__ or error)
    return error
