"""The page for people: a picture, a conversation about it, and two sliders.

Importing it imports gradio, which takes seconds.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from jinja2 import ChoiceLoader, DictLoader
from PIL import Image

from modeldemo.engine import BadRequest, Conversation, ModelDemoError, Turn
from modeldemo.images import MAX_BYTES, decode
from modeldemo.runner import Runner

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio reads it

import gradio as gr
from gradio import processing_utils, queueing, routes

log = logging.getLogger("modeldemo")

UPLOAD_LIFE = 3600  # seconds after which an upload is deleted from the disk
GLANCE = 0.2  # seconds between looks at whether somebody still waits for the answer

WITH_PICTURE = "Upload a picture, then ask about it · 先上传图片，再就图片提问"
WITHOUT = "Ask a question · 请提问"
ASK = "Ask about the picture · 请就图片提问"
FIRST = "A picture first, please · 请先上传图片"

FONTS = (
    "-apple-system BlinkMacSystemFont Segoe_UI Roboto PingFang_SC Microsoft_YaHei "
    "Noto_Sans_CJK_SC Noto_Sans sans-serif"
)
MONO = "ui-monospace SFMono-Regular Menlo Consolas monospace"
CSS = """
.gradio-container { width: 100% !important; max-width: 1160px !important; margin: 0 auto; }
#head h1 { font-size: 1.5rem; letter-spacing: -.015em; margin: 0; }
#head p { color: var(--body-text-color-subdued); margin: .1rem 0 0; }
#note:not(:has(p)) { display: none; }
#note p { color: var(--error-text-color); margin: 0; }
#chat { height: max(320px, calc(100vh - 215px)) !important; }
#ask { align-items: stretch; }
#question textarea { font-size: 1rem; }
#send, #restart { min-width: 6.5rem; white-space: nowrap; }
@media (max-width: 640px) {
  #picture, #picture .image-container { height: 220px !important; }
  #chat { height: 44vh !important; }
  #left, #right { display: contents; }
  #settings { order: 1; } /* below the conversation */
}
"""


def _tame() -> None:
    """Keep gradio from fetching, and from naming in its page, what lies on other hosts."""

    async def refuse(url: str, cache_dir: str) -> str:
        reason = "this server fetches no addresses; upload the picture itself"
        raise gr.Error(reason, print_exception=False)

    def print_exc() -> None:
        error = sys.exc_info()[1]
        log.warning("page: %s: %s", type(error).__name__, " ".join(str(error).split())[:300])
        log.debug("where it failed", exc_info=error)

    # It prints the stack of every call that fails, those of crafted requests too.
    for module in (queueing, routes):
        vars(module)["traceback"] = SimpleNamespace(print_exc=print_exc)
    # A crafted request may hold an address in place of an upload.
    processing_utils.async_ssrf_protected_download = refuse
    templates = routes.templates.env
    assert templates.loader
    index, _, _ = templates.loader.get_source(templates, "frontend/index.html")
    index = re.sub(r'<meta\s+(property|name)="(og|twitter):[^>]*>', "", index)
    templates.loader = ChoiceLoader([DictLoader({"frontend/index.html": index}), templates.loader])


_tame()


def build(runner: Runner, examples: Sequence[Path] = ()) -> FastAPI:
    """Build the page for the runner's engine; `examples` are picture files offered on it.

    The application's `state.let_go()` ends the connections that open browsers hold.
    """
    blocks = _blocks(runner, examples)
    blocks.queue(api_open=False, default_concurrency_limit=None)
    without_docs: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = FastAPI(**without_docs)
    gr.mount_gradio_app(
        app,
        blocks,
        "/",
        app_kwargs=without_docs,
        footer_links=[],
        run_history=False,
        max_file_size=MAX_BYTES,
        allowed_paths=[str(path) for path in examples],
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        theme=gr.themes.Soft(
            primary_hue="indigo",
            neutral_hue="slate",
            font=[gr.themes.Font(name.replace("_", " ")) for name in FONTS.split()],
            font_mono=[gr.themes.Font(name) for name in MONO.split()],
        ).set(
            block_label_background_fill="*block_background_fill",
            block_label_text_color="*body_text_color_subdued",
            block_title_background_fill="transparent",
            block_title_text_color="*body_text_color_subdued",
            block_title_padding="0",
            body_background_fill="*neutral_50",
            body_background_fill_dark="*neutral_950",
            block_border_width="1px",
            block_border_width_dark="1px",
            block_label_border_width="0",
            block_label_border_width_dark="0",
            block_shadow="none",
            input_border_width="1px",
            button_primary_background_fill="*primary_600",
            button_primary_background_fill_hover="*primary_700",
        ),
        css=CSS,
    )
    # Without it gradio takes any path of this host for an upload, and copies the file.
    blocks.has_launched = True
    app.state.let_go = app.routes[-1].app.stop_event.set  # type: ignore[attr-defined]
    return app


def _blocks(runner: Runner, examples: Sequence[Path]) -> gr.Blocks:
    assert runner.engine
    with_picture = runner.engine.page.pictures != "none"
    hint = WITH_PICTURE if with_picture else WITHOUT
    default = runner.engine.defaults
    title = f"{runner.model_id} · modeldemo"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, UPLOAD_LIFE)) as blocks:
        gr.Markdown(f"# {runner.model_id}\n{hint}", elem_id="head")
        # Kept here rather than taken from the browser: what was said, and the checked upload.
        turns, upload = gr.State([]), gr.State(None)
        with gr.Row():
            with gr.Column(scale=4, min_width=280, elem_id="left"):
                picture = gr.Image(
                    label="Picture · 图片",
                    type="filepath",
                    sources=["upload", "clipboard"],
                    placeholder="Drop a picture here, or click\n拖放图片到此处，或点击上传",
                    buttons=[],
                    height=290,
                    visible=with_picture,
                    elem_id="picture",
                )
                # Gradio's example lies on another host, and its name would go to every browser.
                vars(picture).update(example_payload=lambda: None, example_value=lambda: None)
                note = gr.Markdown(elem_id="note")
                chosen = [picture.input]
                if examples and with_picture:
                    files = [[str(path)] for path in examples]
                    offered = gr.Examples(files, picture, label="Examples · 示例")
                    chosen.append(offered.load_input_event.then)
                with gr.Column(elem_id="settings"):
                    beams = gr.Slider(
                        1, 10, default.num_beams, step=1, label="Beams · 束宽", elem_id="beams"
                    )
                    temperature = gr.Slider(
                        0,
                        2,
                        default.temperature,
                        step=0.1,
                        label="Temperature · 温度",
                        elem_id="temperature",
                    )
            with gr.Column(scale=6, min_width=320, elem_id="right"):
                chat = gr.Chatbot(
                    label="Conversation · 对话",
                    placeholder=f"<center>{hint.replace(' · ', '<br>')}</center>",
                    buttons=[],
                    feedback_options=None,
                    latex_delimiters=[],
                    allow_tags=False,
                    elem_id="chat",
                )
                with gr.Row(elem_id="ask"):
                    question = gr.Textbox(
                        placeholder=FIRST if with_picture else WITHOUT,
                        interactive=not with_picture,
                        show_label=False,
                        container=False,
                        max_lines=4,
                        max_length=4000,
                        scale=8,
                        elem_id="question",
                    )
                    send = gr.Button(
                        "Send 发送",
                        variant="primary",
                        interactive=not with_picture,
                        scale=1,
                        elem_id="send",
                    )
                    restart = gr.Button("Restart 重来", scale=1, elem_id="restart")

        # Set when a browser's conversation ends before its answer does.
        running: dict[str | None, asyncio.Event] = {}

        def leave(request: gr.Request) -> None:
            if request.session_hash in running:
                running[request.session_hash].set()

        def fields(path: str | None) -> tuple[Any, Any]:
            on = bool(path) or not with_picture
            text = (ASK if with_picture else WITHOUT) if on else FIRST
            return gr.update(interactive=on, placeholder=text), gr.update(interactive=on)

        async def look(file: dict[str, Any] | None, request: gr.Request) -> list[Any]:
            """A new picture starts a new conversation; one that cannot be read says why."""
            leave(request)
            path, problem = (file or {}).get("path"), ""
            if path:
                try:
                    await asyncio.to_thread(_open, path)
                except ModelDemoError as error:
                    path, problem = None, _sentence(error)
            return [gr.skip() if path else None, path, [], [], problem, *fields(path)]

        async def clear(request: gr.Request) -> list[Any]:
            leave(request)
            text, button = fields(None)
            return [None, None, [], [], "", {**text, "value": ""}, button]

        async def forget(request: gr.Request) -> list[Turn]:
            leave(request)
            return []

        async def answer(
            path: str | None,
            said: list[Turn],
            asked: str,
            num_beams: int,
            heat: float,
            request: gr.Request,
        ) -> AsyncIterator[list[Any]]:
            """Stream the answer into the conversation; an error gives the question back."""
            asked = asked.strip()
            if not asked or (with_picture and not path):
                gr.Warning(hint)
                yield [gr.skip()] * 4
                return
            gone = running[request.session_hash] = asyncio.Event()
            history = [*said, Turn("user", asked)]
            closed = gr.update(value="", interactive=False), gr.update(interactive=False)
            yield [_messages(history, "…"), gr.skip(), *closed]
            text = ""
            try:
                image = await asyncio.to_thread(_open, path) if path else None
                first = replace(history[0], images=(image,) if image else ())
                sampling = replace(default, temperature=heat, num_beams=int(num_beams))
                reply = runner.ask(Conversation((first, *history[1:])), sampling)
                async with aclosing(reply.pieces(GLANCE)) as pieces:
                    async for piece in pieces:
                        if gone.is_set():
                            # gradio repeats the last output at the end, over an emptied page
                            yield [gr.skip()] * 4
                            return
                        if piece:
                            text += piece
                            yield [_messages(history, text), *[gr.skip()] * 3]
            except ModelDemoError as error:
                gr.Warning(_sentence(error))
                again = gr.update(value=asked, interactive=True), gr.update(interactive=True)
                yield [_messages(said), gr.skip(), *again]
                return
            opened = gr.update(interactive=True), gr.update(interactive=True)
            shown = _messages(history, text or "(no words · 没有文字)")
            yield [shown, [*history, Turn("assistant", text)], *opened]

        gr.on(
            [question.submit, send.click],
            answer,
            [upload, turns, question, beams, temperature],
            [chat, turns, question, send],
            concurrency_limit=None,  # the runner has the queue, for this page and the API alike
            show_progress="hidden",
            api_name="answer",
            api_visibility="undocumented",
        )
        everything = [picture, upload, chat, turns, note, question, send]
        for trigger in chosen:
            trigger(
                look,
                [picture],
                everything,
                preprocess=False,  # gradio's own way of opening a broken picture fails loudly
                concurrency_limit=2,  # a decoded picture can take hundreds of megabytes
                concurrency_id="look",
                show_progress="hidden",
                api_name="look",
                api_visibility="undocumented",
            )
        restart.click(
            clear,
            None,
            everything,
            show_progress="hidden",
            api_name="restart",
            api_visibility="undocumented",
        )
        chat.clear(forget, None, turns, show_progress="hidden", api_visibility="private")
        blocks.unload(leave)
    return blocks


def _open(path: str) -> Image.Image:
    try:
        return decode(Path(path).read_bytes())
    except OSError:
        raise BadRequest("the picture is no longer here; upload it again") from None


def _messages(turns: Sequence[Turn], reply: str | None = None) -> list[dict[str, str]]:
    shown = [{"role": turn.role, "content": turn.text} for turn in turns]
    return [*shown, {"role": "assistant", "content": reply}] if reply else shown


def _sentence(error: ModelDemoError) -> str:
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}."
