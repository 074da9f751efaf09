"""The place of the page in the application: says "loading" until the page is there."""

from __future__ import annotations

import asyncio
import html
import re

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from modeldemo.gate import ROUTES
from modeldemo.texts import PATHS, TEXTS, chosen

LOADING = """<!doctype html><html lang="{language}"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="2"><title>{title}</title><style>
body {{ font: 16px system-ui, sans-serif; display: grid; place-items: center; min-height: 90vh;
  color: #374151; background: #fff; }}
@media (prefers-color-scheme: dark) {{ body {{ color: #d1d5db; background: #0b0f19; }} }}
</style></head><body><p>{title}: {text}</p></body></html>"""

# These give the language that is asked for; all other paths are of one language's page.
FRONTS = ("/", "/zh", "/zh/")


class Slot:
    """The place of the page in the application: a line that says "loading" until it is there."""

    def __init__(self, model_id: str) -> None:
        self._title = html.escape(model_id)
        self._page: FastAPI | None = None
        self._stop = asyncio.Event()
        self._life: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        one_model = re.fullmatch("/v1/models/[^/]+", path)
        if allowed := ROUTES.get("/v1/models" if one_model else path):
            raise HTTPException(405, f"{path[:80]} does not answer {method}", {"Allow": allowed})
        if path.startswith("/v1/"):
            raise HTTPException(404, f"there is no {path[:80]}")
        if self._page:
            if scope["path"] in FRONTS and scope["method"] in ("GET", "HEAD"):
                front = PATHS[chosen(scope)].rstrip("/") + "/"
                scope = {**scope, "path": front, "raw_path": front.encode()}
            await self._page(scope, receive, send)
            return
        language = chosen(scope)
        text = LOADING.format(title=self._title, language=language, text=TEXTS[language].loading)
        headers = [(b"content-type", b"text/html; charset=utf-8"), (b"retry-after", b"2")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode()})

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
