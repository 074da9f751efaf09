"""One request for a file: reads an answer into the partial file, as far as it can be trusted."""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from gpufleet.weights.fetch.plan import Answer, Policy, Take, Turn, impostor, judge

if TYPE_CHECKING:
    import requests

    from gpufleet.weights.fetch.partial import Partial

#: Bytes that are read at most at once; what has come is written at once.
_PIECE = 1 << 18


def attempt(
    session: requests.Session,
    url: str,
    headers: Mapping[str, str],
    partial: Partial,
    policy: Policy,
    told: Callable[[int, int | None], None],
) -> Turn | None:
    """Ask once for what the partial file lacks; None if the whole file has come.

    `told` hears how many bytes are there, of how many, and may raise to end it. Raises OSError
    where the file cannot be written.
    """
    import requests
    from urllib3.exceptions import HTTPError

    content = partial.content
    start = partial.hashed
    wanted = {**headers, "Accept-Encoding": "identity"}
    if start:
        wanted["Range"] = f"bytes={start}-"
    try:
        answer = session.get(
            url, headers=wanted, stream=True, timeout=(policy.connect, policy.silence)
        )
    except requests.RequestException as error:
        return Turn("never" if untrusted(error) else "later", broken(error))
    with answer:
        there = {name.lower(): value for name, value in answer.headers.items()}
        said = Answer(answer.status_code, there, bool(answer.history))
        verdict = judge(said, start, content, time.time())
        try:
            if isinstance(verdict, Turn):
                what = impostor(answer.raw.read(512)) if answer.ok else None
                return replace(verdict, why=f"gives {what}") if what else verdict
            return _read(answer, verdict, partial, told)
        except (HTTPError, requests.RequestException, http.client.HTTPException) as error:
            return Turn("later", broken(error))
        except (ConnectionError, TimeoutError, ssl.SSLError) as error:
            return Turn("later", broken(error))


def _read(
    answer: requests.Response,
    take: Take,
    partial: Partial,
    told: Callable[[int, int | None], None],
) -> Turn | None:
    expected = partial.content.bytes
    total = expected if expected is not None else take.total
    # Where the server ignored the range, what comes is written over what was there, which stays.
    at = take.start
    while expected is None or at < expected:
        most = _PIECE if expected is None else min(_PIECE, expected - at)
        piece = answer.raw.read1(most)
        if not piece:
            break
        if at == 0 and expected != take.total and (what := impostor(piece)):
            return Turn("strike", f"gives {what}")
        partial.write(at, piece)
        at += len(piece)
        told(at, total)
    if total is not None and at < total:
        return Turn("later", f"ends after {at} of {total} bytes")
    partial.cut(at)
    return None


def untrusted(error: BaseException) -> bool:
    """Whether a certificate is at fault, which no patience mends."""
    return any(isinstance(one, ssl.SSLCertVerificationError) for one in _causes(error))


def broken(error: BaseException) -> str:
    """What a failed connection means, without the addresses and objects of its message."""
    for one in _causes(error):
        if isinstance(one, ssl.SSLCertVerificationError):
            return f"its certificate is wrong: {one.verify_message}"
        if isinstance(one, socket.gaierror):
            return "its name cannot be resolved"
        if isinstance(one, ConnectionRefusedError):
            return "refuses connections"
        if isinstance(one, ConnectionError | http.client.IncompleteRead):
            return "cuts the connection"
    names = {type(one).__name__ for one in _causes(error)}
    if any("Timeout" in name for name in names):
        return "gives no answer in time"
    if any("IncompleteRead" in name or "Protocol" in name for name in names):
        return "cuts the connection"
    return f"cannot be reached ({type(error).__name__})"


def _causes(error: BaseException) -> list[BaseException]:
    """An error with all that it came from, the innermost first."""
    found: list[BaseException] = []
    todo: list[object] = [error]
    while todo:
        one = todo.pop()
        if isinstance(one, BaseException) and one not in found:
            found.append(one)
            reason = getattr(one, "reason", None)
            todo += [one.__cause__, one.__context__, reason, *one.args]
    return found[::-1]
