"""The page of a model that compares a picture with labels."""

from __future__ import annotations

import html
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import gradio as gr

from modeldemo.clip.labels import parse
from modeldemo.engine import Conversation, ModelDemoError, Turn
from modeldemo.page import parts
from modeldemo.runner import Runner
from modeldemo.texts import Texts


def blocks(runner: Runner, examples: Sequence[Path], texts: Texts) -> gr.Blocks:
    """Build the page in one language."""
    assert runner.engine
    engine = runner.engine
    sessions = parts.Sessions()
    page = parts.page(runner)
    with page:
        parts.heading(runner, texts.labels_hint, texts)
        upload = gr.State(None)
        with gr.Row():
            with gr.Column(scale=5, min_width=280, elem_id="left"):
                picture = parts.picture(texts)
                note = gr.Markdown(elem_id="note")
                chosen = parts.offered(examples, picture, texts)
                controls = parts.controls(engine, texts)
            with gr.Column(scale=5, min_width=280, elem_id="right"):
                question = gr.Textbox(
                    label=texts.labels,
                    placeholder=texts.labels_example,
                    lines=5,
                    max_lines=12,
                    max_length=20_000,
                    elem_id="question",
                )
                with gr.Row(elem_id="ask"):
                    send = gr.Button(
                        texts.compare, variant="primary", interactive=False, elem_id="send"
                    )
                    restart = gr.Button(texts.restart, elem_id="restart")
                shares = gr.HTML(elem_id="shares", padding=False)
        parts.served(runner, texts)

        def leave(request: gr.Request) -> None:
            sessions.leave(request.session_hash)

        async def look(file: dict[str, Any] | None, request: gr.Request) -> list[Any]:
            sessions.leave(request.session_hash)
            path, problem = (file or {}).get("path"), ""
            if path:
                try:
                    await parts.opened(path)
                except ModelDemoError as error:
                    path, problem = None, parts.sentence(error, texts)
            shown = gr.skip() if path else None
            return [shown, path, problem, "", gr.update(interactive=path is not None)]

        async def clear(request: gr.Request) -> list[Any]:
            sessions.leave(request.session_hash)
            return [None, None, "", "", gr.update(interactive=False), ""]

        async def compare(
            path: str | None, labels: str, request: gr.Request, *values: Any
        ) -> AsyncIterator[list[Any]]:
            if not path or not labels.strip():
                gr.Warning(texts.labels_hint)
                yield [gr.skip()] * 2
                return
            wish = sessions.begin(request.session_hash)
            yield [gr.skip(), gr.update(interactive=False)]
            text = ""
            try:
                image = await parts.opened(path)
                conversation = Conversation((Turn("user", labels.strip(), (image,)),))
                reply = runner.ask(conversation, parts.sampling(engine, values))
                async with aclosing(reply.pieces(parts.GLANCE)) as pieces:
                    async for piece in pieces:
                        text += piece
                        if wish.gone:
                            yield [gr.skip()] * 2
                            return
            except ModelDemoError as error:
                gr.Warning(parts.sentence(error, texts))
                yield [gr.skip(), gr.update(interactive=True)]
                return
            yield [bars(text, texts), gr.update(interactive=True)]

        send.click(
            compare,
            [upload, question, *controls],
            [shares, send],
            concurrency_limit=None,
            show_progress="hidden",
            api_name="compare",
            api_visibility="undocumented",
        )
        for trigger in chosen:
            trigger(
                look,
                [picture],
                [picture, upload, note, shares, send],
                preprocess=False,
                concurrency_limit=2,
                concurrency_id="look",
                show_progress="hidden",
                api_name="look",
                api_visibility="undocumented",
            )
        restart.click(
            clear,
            None,
            [picture, upload, note, shares, send, question],
            show_progress="hidden",
            api_name="restart",
            api_visibility="undocumented",
        )
        page.unload(leave)
    return page


def bars(answer: str, texts: Texts) -> str:
    """HTML of an answer: a bar for each label; one without others has no share to show."""
    items = []
    scores = parse(answer)
    for score in scores:
        share = ""
        if score.share is not None:
            share = f'<b>{score.share:.2%}</b><i style="width: {score.share:.2%}"></i>'
        cosine = f"<small>cosine {score.cosine:.4f}</small>"
        items.append(f"<li><span>{html.escape(score.label)}</span>{share}{cosine}</li>")
    alone = any(score.share is None for score in scores)
    hint = f"<p>{html.escape(texts.one_label)}</p>" if alone else ""
    return f"<h2>{html.escape(texts.result)}</h2><ol>{''.join(items)}</ol>{hint}"
