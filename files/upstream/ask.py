"""Asks upstream's page about a picture, through the page's own API, and prints one line of JSON.

    python3 ask.py http://ADDRESS:PORT PICTURE QUESTION SECONDS [USERS]

Prints {"answer": "…"} or {"error": "…"}. With "" for PICTURE it asks whether the page is there.
USERS is a file of USER:PASSWORD lines; the first one logs in. The page's parts are found by what
they are, not by their number: gradio 3.24 to 3.50, which both of upstream's environments have.
Needs nothing but Python.
"""

from __future__ import annotations

import base64
import json
import mimetypes
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

# Nothing between us and the page: a proxy of the environment is for the world outside.
OPENER = urllib.request.build_opener(
    urllib.request.ProxyHandler({}), urllib.request.HTTPCookieProcessor()
)


class Page:
    """Upstream's page at an address, as one visitor has it."""

    def __init__(self, address: str, seconds: float, users: str) -> None:
        self.address = address
        self.until = time.monotonic() + seconds
        if users:
            first = Path(users).read_text("utf-8").splitlines()[0]
            user, _, password = first.partition(":")
            form = urllib.parse.urlencode({"username": user, "password": password})
            OPENER.open(f"{address}/login", form.encode(), timeout=seconds).close()
        self.session = f"ask-{time.time_ns()}"
        config = self._get("/config")
        self.parts = {part["id"]: part for part in config["components"]}
        self.steps = config["dependencies"]

    def _get(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.address + path, data, {"Content-Type": "application/json"}
        )
        left = max(self.until - time.monotonic(), 0.1)
        with OPENER.open(request, timeout=left) as reply:
            return json.load(reply)

    def kinds(self, numbers: list[int]) -> list[str]:
        """What the parts of these numbers are: image, textbox, state, …"""
        return [self.parts[number]["type"] for number in numbers]

    def step(self, takes: set[str], lacks: set[str]) -> int:
        """The number of the step that takes parts of these kinds and none of the others."""
        for number, step in enumerate(self.steps):
            kinds = set(self.kinds(step["inputs"]))
            if takes <= kinds and not lacks & kinds:
                return number
        raise LookupError(f"the page has no step that takes {' and '.join(sorted(takes))}")

    def run(self, number: int, given: dict[str, Any]) -> dict[str, Any]:
        """Run a step, to its end where it is a stream; what it gives, by kind."""
        step = self.steps[number]
        inputs = [
            given.get(kind, self.parts[part]["props"].get("value"))
            for kind, part in zip(self.kinds(step["inputs"]), step["inputs"])  # noqa: B905
        ]
        outputs: dict[str, Any] = {}
        while True:
            body = {"fn_index": number, "data": inputs, "session_hash": self.session}
            reply = self._get("/run/predict", body)
            values = zip(self.kinds(step["outputs"]), reply["data"])  # noqa: B905
            outputs.update((kind, value) for kind, value in values if value is not None)
            if not reply.get("is_generating"):
                return outputs


def ask(address: str, picture: str, question: str, seconds: float, users: str) -> str:
    """The answer to a question about a picture; without one, what the page is."""
    page = Page(address, seconds, users)
    if not picture:
        return f"a page of {len(page.parts)} parts"
    kind = mimetypes.guess_type(picture)[0] or "image/png"
    image = f"data:{kind};base64," + base64.b64encode(Path(picture).read_bytes()).decode()
    page.run(page.step({"image"}, set()), {"image": image})
    asked = page.run(page.step({"textbox", "chatbot"}, set()), {"textbox": question, "chatbot": []})
    answered = page.run(page.step({"chatbot", "slider"}, set()), {"chatbot": asked["chatbot"]})
    return str(answered["chatbot"][-1][1])


def main(address: str, picture: str, question: str, seconds: str, users: str = "") -> None:
    """Print the answer, or why there is none."""
    try:
        said = {"answer": ask(address, picture, question, float(seconds), users)}
    except urllib.error.HTTPError as error:
        why = error.read().decode("utf-8", "replace")
        said = {"error": f"HTTP {error.code}: {' '.join(why.split())[:200]}"}
    except (OSError, ValueError, LookupError, TypeError) as error:
        said = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
    print(json.dumps(said, ensure_ascii=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
