"""The HTTP interface for programs: OpenAI-compatible chat, health and metrics."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from modeldemo import refusals
from modeldemo.auth import Users
from modeldemo.engine import ModelDemoError
from modeldemo.gate import Gate
from modeldemo.questions import ChatRequest, conversation, parse
from modeldemo.refusals import UnknownModel
from modeldemo.runner import Answer, Runner, Unavailable
from modeldemo.slot import Slot

# Errors before the first piece get a status code of their own if it comes within this time;
# after it the stream is opened, so that proxies do not give up on a long queue.
PATIENCE = 15.0  # seconds
_READ = ["GET", "HEAD"]
MAX_HELD = 256 * 1024 * 1024  # bytes of all bodies that are being read


def create_app(runner: Runner, page: Slot, users: Users | None = None) -> FastAPI:
    """Build the whole application: the routes below, and `page` for every other path.

    With `users`, all of it but /healthz asks for a password.
    """
    # The documentation pages would load their scripts from a CDN.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    decoding = asyncio.Semaphore(2)  # a decoded picture can take hundreds of megabytes
    bodies = _Bodies()
    watchers: set[asyncio.Task[None]] = set()

    @app.api_route("/healthz", methods=_READ)
    async def healthz() -> JSONResponse:
        body: dict[str, Any] = {
            "status": runner.state,
            "model": runner.model_id,
            "weights": runner.weights,
            "revision": runner.revision,
            "uptime_s": round(runner.uptime, 1),
        }
        if runner.error:
            body["error"] = runner.error
        return JSONResponse(body, 200 if runner.state == "ok" else 503)

    @app.api_route("/metrics", methods=_READ)
    async def metrics() -> Response:
        return Response(runner.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    model = {
        "id": runner.model_id,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "modeldemo",
    }

    @app.api_route("/v1/models", methods=_READ)
    async def models() -> dict[str, Any]:
        runner.require_ready()
        return {"object": "list", "data": [model]}

    @app.api_route("/v1/models/{name}", methods=_READ)
    async def one_model(name: str) -> dict[str, Any]:
        runner.require_ready()
        _require_model(name, runner)
        return model

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        _require_json(request)
        engine = runner.require_ready()
        runner.require_room()
        async with bodies.read(request) as body, decoding:
            asked = await asyncio.to_thread(parse, body)
            _require_model(asked.model, runner)
            sampling = asked.sampling(engine.defaults, engine.page)
            said = await asyncio.to_thread(conversation, asked.messages, engine.page)
        answer = runner.ask(said, sampling, asked.stops)
        watcher = asyncio.create_task(_leave_with_client(request, answer))
        watchers.add(watcher)  # the loop itself holds tasks weakly
        watcher.add_done_callback(watchers.discard)
        if asked.stream:
            await answer.wait_first(PATIENCE)
            return StreamingResponse(
                _events(answer, asked, runner), media_type="text/event-stream", headers=_UNBUFFERED
            )
        text = "".join([piece async for piece in answer.pieces()])
        if answer.left:
            return Response(status_code=499)
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish}
        head = _head("chat.completion", runner)
        return JSONResponse({**head, "choices": [choice], "usage": _usage(answer)})

    app.mount("/", page)
    app.add_exception_handler(ModelDemoError, _on_error)
    app.add_exception_handler(HTTPException, _on_error)
    app.add_middleware(Gate, metrics=runner.metrics, limits=runner.limits, users=users)
    return app


class _Bodies:
    """The bodies in memory, which together stay within a limit whatever the number of clients."""

    def __init__(self) -> None:
        self._held = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Read a whole body, which is held until the block ends. Raises Unavailable."""
        body = bytearray()
        try:
            async for part in request.stream():
                body += part
                self._held += len(part)
                if self._held > MAX_HELD:
                    raise Unavailable("too many large requests at once; ask again later", 5, "busy")
            yield bytes(body)
        finally:
            self._held -= len(body)


async def _leave_with_client(request: Request, answer: Answer) -> None:
    """Stop the model when the client hangs up; ends with the response at the latest."""
    while (await request.receive())["type"] != "http.disconnect":
        continue
    answer.leave()


async def _events(answer: Answer, asked: ChatRequest, runner: Runner) -> AsyncIterator[bytes]:
    """Server-sent events in OpenAI's order: role, pieces, finish reason, usage, [DONE]."""
    head = _head("chat.completion.chunk", runner)
    no_usage = {"usage": None} if asked.wants_usage else {}

    def event(body: dict[str, Any]) -> bytes:
        return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"

    def chunk(delta: dict[str, str], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return event({**head, "choices": [choice], **no_usage})

    yield chunk({"role": "assistant", "content": ""})
    try:
        async with aclosing(answer.pieces(PATIENCE)) as pieces:
            async for piece in pieces:
                yield chunk({"content": piece}) if piece else b": waiting\n\n"
        yield chunk({}, answer.finish)
        if asked.wants_usage:
            yield event({**head, "choices": [], "usage": _usage(answer)})
    except ModelDemoError as error:
        yield event(refusals.described(error)[1])
    yield b"data: [DONE]\n\n"


_UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would collect


def _head(kind: str, runner: Runner) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": runner.model_id,
    }


def _usage(answer: Answer) -> dict[str, int]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.new_tokens,
        "total_tokens": answer.prompt_tokens + answer.new_tokens,
    }


def _require_json(request: Request) -> None:
    """Raise 415 for what a page of another site can make a browser send, with its password."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind.lower() != "application/json":
        given = f"is {kind[:80]}" if kind else "is missing"
        raise HTTPException(415, f"Content-Type {given}; it must be application/json")


def _require_model(name: str, runner: Runner) -> None:
    if name != runner.model_id:
        raise UnknownModel(f"no model {name[:80]!r} here; this server has {runner.model_id!r}")


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    return refusals.response(error)
