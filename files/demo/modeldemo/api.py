"""The HTTP interface for programs: OpenAI-compatible chat, health and metrics."""

from __future__ import annotations

import asyncio
import html
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modeldemo.engine import BadRequest, Conversation, ModelDemoError, Sampling, Turn
from modeldemo.images import MAX_BYTES, TooLarge, decode_url
from modeldemo.runner import Answer, Runner, Unavailable

# A picture at its limit in base64, and room for the conversation.
MAX_BODY = MAX_BYTES * 4 // 3 + 4 * 1024 * 1024
MAX_NEW_TOKENS = 2000  # MiniGPT-4's whole context (max_length of its answer())
ROUTES = frozenset({"/healthz", "/metrics", "/v1/models", "/v1/chat/completions"})
# Errors before the first piece get a status code of their own if it comes within this time;
# after it the stream is opened, so that proxies do not give up on a long queue.
PATIENCE = 15.0  # seconds
# Parameters of OpenAI's that would change the answer, with the values that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "stop": ("", []),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "modalities": (["text"],),
}

LOADING = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="2"><title>{title}</title><style>
body {{ font: 16px system-ui, sans-serif; display: grid; place-items: center; min-height: 90vh;
  color: #374151; background: #fff; }}
@media (prefers-color-scheme: dark) {{ body {{ color: #d1d5db; background: #0b0f19; }} }}
</style></head><body><p>{title}: loading the model… · 正在加载模型…</p></body></html>"""


class UnknownModel(BadRequest):
    """A question to a model that is not served here."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _TextPart(_Strict):
    type: Literal["text"]
    text: str


class _ImageUrl(_Strict):
    url: str


class _ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: _ImageUrl


class _ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Annotated[_TextPart | _ImagePart, Field(discriminator="type")]] | None,
        BeforeValidator(lambda v: [_TextPart(type="text", text=v)] if isinstance(v, str) else v),
    ] = None

    @property
    def text(self) -> str:
        parts = self.content or []
        return "\n".join(p.text for p in parts if isinstance(p, _TextPart)).strip()

    @property
    def images(self) -> list[str]:
        return [p.image_url.url for p in self.content or [] if isinstance(p, _ImagePart)]


class ChatRequest(_Strict):
    """The body of POST /v1/chat/completions; unknown fields are allowed and ignored."""

    model: str
    messages: list[_ChatMessage] = Field(min_length=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = None
    # Not OpenAI's: the models' own knobs.
    top_k: int | None = Field(None, ge=0, le=1000)
    num_beams: int | None = Field(None, ge=1, le=10)
    repetition_penalty: float | None = Field(None, ge=1, le=2)

    def sampling(self, defaults: Sampling) -> Sampling:
        """What the request says, over what the model takes by default."""
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "max_new_tokens": self.max_completion_tokens or self.max_tokens,
            "seed": self.seed,
            "num_beams": self.num_beams,
            "repetition_penalty": self.repetition_penalty,
        }
        return replace(defaults, **{k: v for k, v in given.items() if v is not None})


def parse(body: bytes) -> ChatRequest:
    """Validate a request's body; raises BadRequest that names the field."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        raise BadRequest(f"{where or 'body'}: {first['msg']}") from None
    for name, neutral in NEUTRAL.items():
        value = (request.model_extra or {}).get(name)
        if value is not None and value not in neutral:
            raise BadRequest(f"{name}: this server does not support it; leave it out")
    return request


def conversation(messages: list[_ChatMessage], system_prompt: bool) -> Conversation:
    """Turns that take turns: the user's first and last, neighbours of one role joined.

    A model that takes no system prompt has one of its own that it was trained with, so a system
    message goes in front of the first question. Raises BadRequest when there is no question to
    answer, or for a picture that images.decode_url refuses.
    """
    if messages[-1].role != "user":
        raise BadRequest("messages: the last one must be the user's")
    if not messages[-1].text:
        raise BadRequest("messages: the last one has no text; ask a question")
    instructions = [m.text for m in messages if m.role in ("system", "developer") and m.text]
    turns: list[Turn] = []
    for message in messages:
        if message.images and message.role != "user":
            raise BadRequest(f"messages: an {message.role} message cannot hold a picture")
        if message.role == "user" or (message.role == "assistant" and turns):
            role: Literal["user", "assistant"] = message.role
            before = [] if turns or system_prompt else instructions
            images = tuple(decode_url(url) for url in message.images)
            if turns and turns[-1].role == role:
                joined = turns.pop()
                before, images = [joined.text], joined.images + images
            turns.append(Turn(role, "\n".join(t for t in (*before, message.text) if t), images))
    return Conversation(tuple(turns), "\n".join(instructions) if system_prompt else "")


class Gate:
    """Counts every request and cuts bodies off at MAX_BODY while they arrive."""

    def __init__(self, app: ASGIApp, runner: Runner) -> None:
        self.app = app
        self.requests = runner.metrics.requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # A label for every path would let any caller fill the memory.
        route = scope["path"] if scope["path"] in ROUTES else "page"
        received, status = 0, 499

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY:
                raise HTTPException(413, _TOO_LONG)
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if status == 413:  # do not read on to the end of what is not wanted
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        try:
            length = dict(scope["headers"]).get(b"content-length", b"0")
            if length.isdigit() and int(length) > MAX_BODY:
                await _error_response(HTTPException(413, _TOO_LONG))(scope, receive, noted)
            else:
                await self.app(scope, counted, noted)
        except Exception:
            status = 500
            raise
        finally:
            self.requests.labels(route, str(status)).inc()


class Slot:
    """The place of the page in the application: a line that says "loading" until it is there."""

    def __init__(self, model_id: str) -> None:
        self._loading = LOADING.format(title=html.escape(model_id)).encode()
        self._page: FastAPI | None = None
        self._stop = asyncio.Event()
        self._life: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in ROUTES:
            raise HTTPException(405, f"{scope['path']} does not answer {scope['method']}")
        if scope["path"].startswith("/v1/"):
            raise HTTPException(404, f"there is no {scope['path'][:80]}")
        if self._page:
            await self._page(scope, receive, send)
            return
        headers = [(b"content-type", b"text/html; charset=utf-8"), (b"retry-after", b"2")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": self._loading})

    async def fill(self, page: FastAPI) -> None:
        """Start the page and serve it from now on; raises what its start raises."""
        started = asyncio.get_running_loop().create_future()

        async def live() -> None:  # one task enters and leaves the page's lifespan
            try:
                async with page.router.lifespan_context(page):
                    started.set_result(None)
                    await self._stop.wait()
            except Exception as error:
                if started.done():
                    raise
                started.set_exception(error)

        self._life = asyncio.create_task(live())
        await started
        self._page = page

    def stop(self) -> None:
        """Let browsers go and delete their uploads."""
        self._stop.set()
        if self._page:
            self._page.state.let_go()

    async def close(self) -> None:
        """Stop, and wait a second at most for the clean-up."""
        self.stop()
        if self._life:
            await asyncio.wait([self._life], timeout=1)


_TOO_LONG = f"the request is over the limit of {MAX_BODY // 2**20} MiB; send a smaller picture"


def create_app(runner: Runner, page: Slot) -> FastAPI:
    """Build the whole application: the routes below, and `page` for every other path."""
    # The documentation pages would load their scripts from a CDN.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    decoding = asyncio.Semaphore(2)  # a decoded picture can take hundreds of megabytes
    watchers: set[asyncio.Task[None]] = set()

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        body: dict[str, Any] = {
            "status": runner.state,
            "model": runner.model_id,
            "revision": runner.revision,
            "uptime_s": round(runner.uptime, 1),
        }
        if runner.error:
            body["error"] = runner.error
        return JSONResponse(body, 200 if runner.state == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(runner.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    model = {
        "id": runner.model_id,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "modeldemo",
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        runner.require_ready()
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name}")
    async def one_model(name: str) -> dict[str, Any]:
        runner.require_ready()
        _require_model(name, runner)
        return model

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        engine = runner.require_ready()
        runner.require_room()
        body = await request.body()
        asked = await asyncio.to_thread(parse, body)
        del body
        _require_model(asked.model, runner)
        async with decoding:
            said = await asyncio.to_thread(conversation, asked.messages, engine.page.system_prompt)
        answer = runner.ask(said, asked.sampling(engine.defaults))
        watcher = asyncio.create_task(_leave_with_client(request, answer))
        watchers.add(watcher)  # the loop itself holds tasks weakly
        watcher.add_done_callback(watchers.discard)
        if asked.stream:
            await answer.wait_first(PATIENCE)
            return StreamingResponse(
                _events(answer, runner), media_type="text/event-stream", headers=_UNBUFFERED
            )
        text = "".join([piece async for piece in answer.pieces()])
        if answer.left:
            return Response(status_code=499)
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish}
        usage = {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.new_tokens,
            "total_tokens": answer.prompt_tokens + answer.new_tokens,
        }
        head = _head("chat.completion", runner)
        return JSONResponse({**head, "choices": [choice], "usage": usage})

    app.mount("/", page)
    app.add_exception_handler(ModelDemoError, _on_error)
    app.add_exception_handler(StarletteHTTPException, _on_error)
    app.add_middleware(Gate, runner=runner)
    return app


async def _leave_with_client(request: Request, answer: Answer) -> None:
    """Stop the model when the client hangs up; ends with the response at the latest."""
    while (await request.receive())["type"] != "http.disconnect":
        continue
    answer.leave()


async def _events(answer: Answer, runner: Runner) -> AsyncIterator[bytes]:
    """Server-sent events in OpenAI's order: role, pieces, finish reason, [DONE]."""
    head = _head("chat.completion.chunk", runner)

    def event(body: dict[str, Any]) -> bytes:
        return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"

    def chunk(delta: dict[str, str], reason: str | None = None) -> bytes:
        return event({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})

    yield chunk({"role": "assistant", "content": ""})
    try:
        async with aclosing(answer.pieces(PATIENCE)) as pieces:
            async for piece in pieces:
                yield chunk({"content": piece}) if piece else b": waiting\n\n"
        yield chunk({}, answer.finish)
    except ModelDemoError as error:
        yield event(_error_body(error)[1])
    yield b"data: [DONE]\n\n"


_UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would collect


def _head(kind: str, runner: Runner) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": runner.model_id,
    }


def _require_model(name: str, runner: Runner) -> None:
    if name != runner.model_id:
        raise UnknownModel(f"no model {name[:80]!r} here; this server has {runner.model_id!r}")


def _error_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and OpenAI error object of an error."""
    status, kind, code = 500, "server_error", None
    if isinstance(error, StarletteHTTPException):
        status = error.status_code
        kind = "server_error" if status >= 500 else "invalid_request_error"
        code = {404: "not_found", 413: "request_too_large"}.get(status)
    elif isinstance(error, Unavailable):
        status, code = 503, "unavailable"
    elif isinstance(error, TooLarge):
        status, kind, code = 413, "invalid_request_error", "request_too_large"
    elif isinstance(error, UnknownModel):
        status, kind, code = 404, "invalid_request_error", "model_not_found"
    elif isinstance(error, BadRequest):
        status, kind = 400, "invalid_request_error"
    message = error.detail if isinstance(error, StarletteHTTPException) else str(error)
    body = {"message": " ".join(str(message).split()), "type": kind, "param": None, "code": code}
    return status, {"error": body}


def _error_response(error: Exception) -> JSONResponse:
    status, body = _error_body(error)
    headers = dict(getattr(error, "headers", None) or {})
    if isinstance(error, Unavailable):
        headers["Retry-After"] = str(error.retry_after)
    return JSONResponse(body, status, headers)


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    return _error_response(error)
