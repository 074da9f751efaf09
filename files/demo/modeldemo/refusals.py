"""Turns errors into HTTP statuses and OpenAI's error objects."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from modeldemo.engine import BadRequest, OutOfMemory
from modeldemo.images import TooLarge
from modeldemo.questions import TooLong
from modeldemo.runner import TooSlow, Unavailable

_CODES = {
    401: "invalid_api_key",
    404: "not_found",
    408: "request_timeout",
    413: "request_too_large",
}


class UnknownModel(BadRequest):
    """A question to a model that is not served here."""


def described(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and OpenAI error object of an error."""
    status, kind, code = 500, "server_error", None
    if isinstance(error, HTTPException):
        status = error.status_code
        kind = "server_error" if status >= 500 else "invalid_request_error"
        code = _CODES.get(status)
    elif isinstance(error, Unavailable):
        status, code = 503, error.code
    elif isinstance(error, OutOfMemory):
        status, code = 503, "out_of_memory"
    elif isinstance(error, TooSlow):
        status, code = 504, "timeout"
    elif isinstance(error, TooLarge):
        status, kind, code = 413, "invalid_request_error", "request_too_large"
    elif isinstance(error, UnknownModel):
        status, kind, code = 404, "invalid_request_error", "model_not_found"
    elif isinstance(error, TooLong):
        status, kind, code = 400, "invalid_request_error", "context_length_exceeded"
    elif isinstance(error, BadRequest):
        status, kind = 400, "invalid_request_error"
    message = error.detail if isinstance(error, HTTPException) else str(error)
    body = {"message": " ".join(str(message).split()), "type": kind, "param": None, "code": code}
    return status, {"error": body}


def response(error: Exception) -> JSONResponse:
    """The response that says what was wrong; with Retry-After where asking again may help."""
    status, body = described(error)
    headers = dict(getattr(error, "headers", None) or {})
    if isinstance(error, Unavailable):
        headers["Retry-After"] = str(error.retry_after)
    elif isinstance(error, OutOfMemory):
        headers["Retry-After"] = "1"
    return JSONResponse(body, status, headers)
