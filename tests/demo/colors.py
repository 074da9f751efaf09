"""A real engine without weights, which names a picture's dominant color, and its service."""

from __future__ import annotations

import argparse
import atexit
import base64
import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

DEMO = Path(__file__).resolve().parents[2] / "files" / "demo"
COLORS = {"red": (214, 38, 44), "green": (44, 160, 62), "blue": (42, 84, 216), "white": (255,) * 3}


class ColorEngine:
    """Answers word by word; "slowly" in the question makes each word take a tenth of a second.

    "one after the other" lists every color up to max_new_tokens words, "compare" the color of
    every picture, "fail" raises, "too much" has no memory for it, "lost" ends its device. On a
    labels page, each line that names the picture's color gets its share.
    """

    model_id = "colors"

    def __init__(self, **page: Any) -> None:
        from modeldemo.engine import Conversation, Page, Sampling, Turn

        page = {"pictures": "one", "controls": ("num_beams", "temperature")} | page
        self.page = Page(**page)
        self.defaults = Sampling()
        self.health = Conversation((Turn("user", "?", (Image.new("RGB", (9, 9), "white"),)),))

    def stream(self, conversation: Any, sampling: Any) -> Iterator[Any]:
        from modeldemo.clip import labels
        from modeldemo.clip.labels import Score
        from modeldemo.engine import DeviceLost, OutOfMemory, Piece

        turns = conversation.turns
        question = turns[-1].text
        colors = [dominant(image) for image in conversation.images] or ["grey"]
        if self.page.kind == "labels":
            yield Piece(prompt_tokens=1)
            found = [Score(line, float(line in colors), 0) for line in labels.read(question)]
            total = sum(score.cosine for score in found) or 1
            write = labels.write_json if sampling.json else labels.write
            yield Piece(write([Score(s.label, s.cosine, s.cosine / total) for s in found]))
            yield Piece(finish="stop")
            return
        if "fail" in question:
            raise RuntimeError("the color\nsensor broke")
        if "too much" in question:
            raise OutOfMemory("the GPU has no memory left for this question; use one beam")
        if "lost" in question:
            raise DeviceLost("the GPU has failed (Xid 79) and the service starts again")
        words = f"It is mostly {colors[-1]} after {len(turns)} turns.".split()
        if "compare" in question:
            words = ["They", "are", *colors]
        if "system" in question:
            words = conversation.system.split()
        if "one after the other" in question:
            words = [sorted(COLORS)[i % len(COLORS)] for i in range(sampling.max_new_tokens)]
        yield Piece(
            prompt_tokens=len(question.split()), pictures_encoded=1, pictures_reused=len(colors) - 1
        )
        for i, word in enumerate(words):
            if "slowly" in question:
                time.sleep(0.1)
            yield Piece(word if i == 0 else f" {word}", new_tokens=1)
        yield Piece(finish="length" if len(words) == sampling.max_new_tokens else "stop")


def dominant(image: Image.Image) -> str:
    red, green, blue = image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))

    def distance(name: str) -> int:
        r, g, b = COLORS[name]
        return (red - r) ** 2 + (green - g) ** 2 + (blue - b) ** 2

    return min(COLORS, key=distance)


def picture(color: str = "red", kind: str = "PNG", size: tuple[int, int] = (64, 48)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, COLORS[color]).save(file, kind)
    return file.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def user(text: str, *pictures: bytes) -> dict[str, Any]:
    """A user message of OpenAI's chat format."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(p)}} for p in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


class Service:
    """`python -m modeldemo`'s own start, stop and server around ColorEngine, in a process.

    The process ends with pytest at the latest.
    """

    def __init__(self, *options: str, wait: bool = True, **environment: str) -> None:
        number, name = tempfile.mkstemp(suffix=".log")
        self._log = Path(name)
        self.process = subprocess.Popen(
            [sys.executable, __file__, *options],
            stderr=number,
            stdout=number,
            env=_environment() | environment,
        )
        os.close(number)
        atexit.register(self._end)
        if wait:
            self.wait_until(lambda: self._answers() == 200)

    @property
    def stderr(self) -> str:
        return self._log.read_text()

    @property
    def url(self) -> str:
        found = re.search(r"listening on (http://\S+:\d+)", self.stderr)
        assert found, self.stderr
        return found[1]

    @property
    def address(self) -> tuple[str, int]:
        url = httpx.URL(self.url)
        assert url.port
        return url.host, url.port

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, trust_env=False, timeout=30, **options)

    def ask(self, *messages: dict[str, Any], **options: Any) -> httpx.Response:
        body = {"model": "colors", "messages": list(messages), **options}
        with self.client() as client:
            return client.post("/v1/chat/completions", json=body)

    def metric(self, name: str) -> float:
        """The sample of that name (labels included), 0 when it was never counted."""
        with self.client() as client:
            lines = client.get("/metrics").text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), 0)

    def wait_until(self, true: Any, seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"not within {seconds} s; {self.stderr}"
            assert self.process.poll() is None, f"it exited: {self.stderr}"
            time.sleep(0.05)

    def exit_status(self, seconds: float = 20) -> int:
        return self.process.wait(seconds)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.exit_status()

    def _end(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        self._log.unlink()

    def _answers(self) -> int:
        if "listening on" not in self.stderr:
            return 0
        with self.client() as client:
            return client.get("/healthz").status_code


@functools.cache
def _environment() -> dict[str, str]:
    """What every service runs in; compiled modules are kept, because gradio has two thousand."""
    compiled = tempfile.mkdtemp(prefix="modeldemo-compiled-")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**inherited, "PYTHONPATH": str(DEMO), "PYTHONPYCACHEPREFIX": compiled}


@functools.cache
def shared() -> Service:
    """One service for all tests that leave it as they found it."""
    return Service()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--share-port", action="store_true")
    parser.add_argument("--late", action="store_true")
    parser.add_argument("--limits", type=json.loads, default={}, help="fields of Limits, as JSON")
    parser.add_argument("--auth-file", type=Path)
    parser.add_argument("--weights", default="")
    parser.add_argument("--load-seconds", type=float, default=0)
    parser.add_argument("--load-error")
    parser.add_argument("--page", type=json.loads, default={}, help="fields of Page, as JSON")
    parser.add_argument("--examples", type=Path, nargs="*", default=[])
    args = parser.parse_args()

    from modeldemo import serve
    from modeldemo.engine import ModelDemoError
    from modeldemo.limits import Limits

    def load() -> ColorEngine:
        time.sleep(args.load_seconds)
        if args.load_error == "known":
            raise ModelDemoError("/weights/x.pth: no such file; bring it with fleet weights push")
        if args.load_error:
            raise RuntimeError("CUDA driver\nis too old")
        return ColorEngine(**args.page)

    serve.run(
        load,
        model_id="colors",
        revision=os.environ.get("MODELDEMO_REVISION", ""),
        host=args.host,
        port=args.port,
        share_port=args.share_port,
        late=args.late,
        weights=args.weights,
        limits=Limits(**args.limits),
        auth_file=args.auth_file,
        examples=args.examples,
    )


if __name__ == "__main__":
    main()
