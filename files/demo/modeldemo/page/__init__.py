"""The page for people, in each of its languages, built from what the engine's Page says.

Importing it imports gradio, which takes seconds.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from modeldemo.images import MAX_BYTES
from modeldemo.runner import Runner
from modeldemo.texts import PATHS, TEXTS

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio reads it

import gradio as gr

from modeldemo.page import chat, labels, style
from modeldemo.page.tame import tame

tame()


def build(runner: Runner, examples: Sequence[Path] = ()) -> FastAPI:
    """Build the page for the runner's engine; `examples` are picture files offered on it.

    The application's `state.let_go()` ends the connections that open browsers hold.
    """
    assert runner.engine
    kind = {"chat": chat, "labels": labels}[runner.engine.page.kind]
    without_docs: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = FastAPI(**without_docs)
    for language, path in PATHS.items():
        blocks = kind.blocks(runner, examples, TEXTS[language])
        blocks.queue(api_open=False, default_concurrency_limit=None)
        gr.mount_gradio_app(
            app,
            blocks,
            path,
            app_kwargs=without_docs,
            footer_links=[],
            run_history=False,
            max_file_size=MAX_BYTES,
            allowed_paths=[str(path) for path in examples],
            ssr_mode=False,
            enable_monitoring=False,
            mcp_server=False,
            theme=style.theme(),
            css=style.CSS,
        )
        # Without it gradio takes any path of this host for an upload, and copies the file.
        blocks.has_launched = True
    stops = [route.app.stop_event.set for route in app.routes]  # type: ignore[attr-defined]

    def let_go() -> None:
        for stop in stops:
            stop()

    app.state.let_go = let_go
    return app
