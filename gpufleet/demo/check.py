"""Asks a running demo about held-out pictures whose answers are known, through its HTTP API."""

from __future__ import annotations

import base64
import io
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpufleet import ROOT
from gpufleet.errors import FleetError

if TYPE_CHECKING:
    from collections.abc import Mapping

#: A demo is good enough from this share of right answers on, over at least MIN_PICTURES.
REQUIRED = 0.95
MIN_PICTURES = 40

#: Seconds that one answer may take: a first question to a cold model on a slow CPU needs a while.
TIMEOUT = 300

#: Any number does, as no held-out scene was trained on; this one makes runs comparable.
SEED = 2023


@dataclass(frozen=True)
class Question:
    """One question: a PNG, the words, the answer expected and what kind of question it is."""

    kind: str
    png: bytes
    text: str
    expected: str


@dataclass(frozen=True)
class Answer:
    """What came back. `seconds` is the whole request; `error` is one line if there is no answer."""

    question: Question
    text: str
    right: bool
    seconds: float
    error: str | None = None


@dataclass(frozen=True)
class Report:
    """All answers of one host; `error` is one line if its demo could not be asked at all."""

    host: str
    answers: tuple[Answer, ...]
    error: str | None = None

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return sum(answer.right for answer in self.answers) / max(len(self.answers), 1)

    @property
    def passed(self) -> bool:
        return len(self.answers) >= MIN_PICTURES and self.accuracy >= REQUIRED

    @property
    def kinds(self) -> dict[str, tuple[int, int]]:
        """Question kind -> (right, asked)."""
        counts: dict[str, tuple[int, int]] = {}
        for answer in self.answers:
            right, asked = counts.get(answer.question.kind, (0, 0))
            counts[answer.question.kind] = (right + answer.right, asked + 1)
        return counts

    def latency(self) -> tuple[float, float]:
        """Median and 95th percentile of the requests, in seconds; 0 if there were none."""
        seconds = sorted(answer.seconds for answer in self.answers) or [0.0]
        return statistics.median(seconds), seconds[-(-95 * len(seconds) // 100) - 1]

    def as_dict(self) -> Mapping[str, Any]:
        """For JSON; times in seconds."""
        median, p95 = self.latency()
        wrong = [
            {
                "question": answer.question.text,
                "expected": answer.question.expected,
                "answer": answer.text,
                "error": answer.error,
            }
            for answer in self.answers
            if not answer.right
        ]
        return {
            "host": self.host,
            "error": self.error,
            "passed": self.passed,
            "asked": len(self.answers),
            "accuracy": round(self.accuracy, 4),
            "kinds": {kind: {"right": r, "asked": n} for kind, (r, n) in self.kinds.items()},
            "latency": {"median": round(median, 4), "p95": round(p95, 4)},
            "wrong": wrong,
        }


def _pictures() -> Any:
    """The module of the demo's application that draws; it needs nothing but Pillow."""
    sys.path.insert(0, str(ROOT / "files" / "demo"))
    try:
        from modeldemo.pico import pictures
    finally:
        sys.path.pop(0)
    return pictures


def questions(count: int) -> list[Question]:
    """`count` questions about distinct held-out pictures, all kinds alike; the same every time."""
    pictures = _pictures()
    made = []
    for example in pictures.held_out_examples(SEED, count):
        png = io.BytesIO()
        pictures.draw(example.scene).save(png, "PNG")
        made.append(Question(example.kind, png.getvalue(), example.question, example.answer))
    return made


def ask(url: str, asked: Sequence[Question], host: str) -> Iterator[Answer]:
    """Put the questions to the demo at `url`, one after the other, at temperature 0.

    Raises FleetError if the demo does not answer at all.
    """
    import requests

    is_right = _pictures().is_right
    with requests.Session() as session:
        # Nothing between us and the demo: a proxy of the environment is for the world outside.
        session.trust_env = False
        model = _model(session, url, host)
        for question in asked:
            started = time.monotonic()
            text, error = "", None
            try:
                reply = session.post(
                    f"{url}/v1/chat/completions", json=_body(model, question), timeout=TIMEOUT
                )
                text, error = _text(reply)
            except requests.RequestException as problem:
                error = f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
            seconds = time.monotonic() - started
            right = error is None and bool(is_right(text, question.expected))
            yield Answer(question, text, right, seconds, error)


def report(
    url: str,
    asked: Sequence[Question],
    host: str,
    progress: Callable[[], None] = lambda: None,
) -> Report:
    """Ask all questions and collect the answers; `progress` is called after each."""
    answers = []
    for answer in ask(url, asked, host):
        answers.append(answer)
        progress()
    return Report(host, tuple(answers))


def _model(session: Any, url: str, host: str) -> str:
    import requests

    try:
        reply = session.get(f"{url}/v1/models", timeout=TIMEOUT)
        reply.raise_for_status()
        return str(reply.json()["data"][0]["id"])
    except (requests.RequestException, ValueError, KeyError, IndexError) as error:
        what = " ".join(str(error).split())[:200]
        raise FleetError(
            f"{host}: the demo does not say what it serves ({what}); see ./fleet logs {host}"
        ) from None


def _body(model: str, question: Question) -> dict[str, Any]:
    picture = "data:image/png;base64," + base64.b64encode(question.png).decode("ascii")
    content = [
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "text", "text": question.text},
    ]
    return {
        "model": model,
        "temperature": 0,
        "max_tokens": 64,
        "messages": [{"role": "user", "content": content}],
    }


def _text(reply: Any) -> tuple[str, str | None]:
    """The answer in a reply, and one line if there is none."""
    try:
        body = reply.json()
        if reply.status_code == 200:
            return str(body["choices"][0]["message"]["content"]), None
        return "", f"HTTP {reply.status_code}: {body['error']['message']}"
    except (ValueError, KeyError, IndexError, TypeError):
        return "", f"HTTP {reply.status_code}: not an answer of the API"
