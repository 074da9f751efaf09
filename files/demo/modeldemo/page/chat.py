"""The page of a model that converses: about a picture, about several, or about none."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gradio as gr

from modeldemo.engine import BadRequest, Conversation, Engine, ModelDemoError, Turn
from modeldemo.images import MAX_SIDE, SIDE_OF_SEVERAL
from modeldemo.page import parts
from modeldemo.questions import MAX_PICTURES
from modeldemo.runner import Runner
from modeldemo.texts import Texts


@dataclass(frozen=True)
class Said:
    """A message of a browser's conversation; its pictures stay on the disk."""

    role: Literal["user", "assistant"]
    text: str
    pictures: tuple[str, ...] = ()


def blocks(runner: Runner, examples: Sequence[Path], texts: Texts) -> gr.Blocks:
    """Build the page in one language."""
    assert runner.engine
    engine: Engine = runner.engine
    pictures = engine.page.pictures
    hint = texts.ask if pictures == "none" else texts.picture_first
    alt = texts.picture if pictures == "several" else None
    sessions = parts.Sessions()
    page = parts.page(runner)
    with page:
        parts.heading(runner, hint, texts)
        # Kept here rather than taken from the browser: what was said, and the checked upload.
        said, upload = gr.State([]), gr.State(None)
        with gr.Row():
            with gr.Column(scale=4, min_width=280, elem_id="left"):
                picture = parts.picture(texts, visible=pictures != "none")
                note = gr.Markdown(elem_id="note")
                chosen = parts.offered(examples if pictures != "none" else (), picture, texts)
                with gr.Column(elem_id="settings"):
                    before: list[Any] = []
                    if engine.page.system_prompt:
                        before = [
                            gr.Textbox(
                                label=texts.system_prompt,
                                lines=3,
                                max_lines=8,
                                max_length=8000,
                                elem_id="system",
                            )
                        ]
                    controls = parts.controls(engine, texts)
            with gr.Column(scale=6, min_width=320, elem_id="right"):
                chat = gr.Chatbot(
                    label=texts.conversation,
                    placeholder=f"<center>{hint}</center>",
                    buttons=[],
                    feedback_options=None,
                    latex_delimiters=[],
                    allow_tags=False,
                    elem_id="chat",
                )
                with gr.Row(elem_id="ask"):
                    question = gr.Textbox(
                        placeholder=hint,
                        interactive=pictures == "none",
                        label=texts.ask,
                        show_label=False,
                        container=False,
                        max_lines=4,
                        max_length=20_000,
                        scale=8,
                        elem_id="question",
                    )
                    send = gr.Button(
                        texts.send,
                        variant="primary",
                        interactive=pictures == "none",
                        scale=1,
                        elem_id="send",
                    )
                    stop = gr.Button(texts.stop, visible="hidden", scale=1, elem_id="stop")
                    restart = gr.Button(texts.restart, scale=1, elem_id="restart")
        parts.served(runner, texts)

        def fields(on: bool) -> tuple[Any, ...]:
            """Of the question, and of the buttons that send it and stop its answer."""
            asking = texts.ask if pictures == "none" else texts.ask_picture
            placeholder = asking if on else hint
            question = gr.update(interactive=on, placeholder=placeholder)
            return question, gr.update(interactive=on), gr.update(visible="hidden")

        def leave(request: gr.Request) -> None:
            sessions.leave(request.session_hash)

        async def enough(request: gr.Request) -> None:
            sessions.stop(request.session_hash)

        async def look(
            file: dict[str, Any] | None, messages: list[Said], request: gr.Request
        ) -> list[Any]:
            """Check a new picture; one that cannot be read says why.

            Where the model looks at one picture, a new one starts a new conversation; where it
            looks at several, it goes with the next question.
            """
            path, problem = (file or {}).get("path"), ""
            if path:
                try:
                    await parts.opened(path)
                except ModelDemoError as error:
                    path, problem = None, parts.sentence(error, texts)
            shown = gr.skip() if path else None
            if pictures == "several":
                on = path is not None or any(message.pictures for message in messages)
                waits = sessions.waits(request.session_hash)  # its end opens the question
                asking = (gr.skip(),) * 3 if waits else fields(on)
                return [shown, path, gr.skip(), gr.skip(), problem, *asking]
            sessions.leave(request.session_hash)
            return [shown, path, [], [], problem, *fields(path is not None)]

        async def clear(request: gr.Request) -> list[Any]:
            sessions.leave(request.session_hash)
            text, *buttons = fields(pictures == "none")
            return [None, None, [], [], "", {**text, "value": ""}, *buttons]

        async def forget(path: str | None, request: gr.Request) -> list[Any]:
            """Empty the conversation; the picture stays, for the next question."""
            sessions.leave(request.session_hash)
            return [[], [], *fields(pictures == "none" or path is not None)]

        async def answer(
            path: str | None,
            messages: list[Said],
            asked: str,
            request: gr.Request,
            *values: Any,
        ) -> AsyncIterator[list[Any]]:
            """Stream the answer into the conversation; an error gives the question back."""
            if sessions.waits(request.session_hash):  # a second click, before the first closed it
                yield [gr.skip()] * 5
                return
            asked = asked.strip()
            first = not any(message.pictures for message in messages)
            if not asked or (pictures != "none" and first and not path):
                gr.Warning(hint)
                yield [gr.skip()] * 5
                return
            wish = sessions.begin(request.session_hash)
            # The one picture belongs to the first question, each of several to the next one.
            sent = {picture for message in messages for picture in message.pictures}
            wanted = path and (first or (pictures == "several" and path not in sent))
            new = (path,) if path and wanted else ()
            history = [*messages, Said("user", asked, new)]
            closed = (
                gr.update(value="", interactive=False),
                gr.update(interactive=False),
                gr.update(visible=True),
            )
            opened = fields(on=True)
            text = ""
            try:
                yield [_shown(history, alt, "…"), gr.skip(), *closed]
                system = str(values[0] or "").strip() if before else ""
                conversation = await _conversation(history, system)
                sampling = parts.sampling(engine, values[len(before) :])
                reply = runner.ask(conversation, sampling)
                async with aclosing(reply.pieces(parts.GLANCE)) as pieces:
                    async for piece in pieces:
                        if wish.gone:
                            # gradio repeats the last output at the end, over an emptied page
                            yield [gr.skip()] * 5
                            return
                        if piece:
                            text += piece
                            yield [_shown(history, alt, text), *[gr.skip()] * 4]
                        if wish.enough:
                            break
            except ModelDemoError as error:
                gr.Warning(parts.sentence(error, texts))
                again, *buttons = opened
                yield [_shown(messages, alt), gr.skip(), {**again, "value": asked}, *buttons]
                return
            finally:
                sessions.end(request.session_hash, wish)
            shown = _shown(history, alt, text or texts.no_words)
            yield [shown, [*history, Said("assistant", text)], *opened]

        gr.on(
            [question.submit, send.click],
            answer,
            [upload, said, question, *before, *controls],
            [chat, said, question, send, stop],
            concurrency_limit=None,  # the runner has the queue, for this page and the API alike
            show_progress="hidden",
            api_name="answer",
            api_visibility="undocumented",
        )
        stop.click(
            enough,
            None,
            None,
            show_progress="hidden",
            api_name="stop",
            api_visibility="undocumented",
        )
        everything = [picture, upload, chat, said, note, question, send, stop]
        for trigger in chosen:
            trigger(
                look,
                [picture, said],
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
        chat.clear(
            forget,
            upload,
            # The page empties chat itself, but an answer that comes would fill it again.
            [chat, said, question, send, stop],
            show_progress="hidden",
            api_name="forget",
            api_visibility="undocumented",
        )
        page.unload(leave)
    return page


async def _conversation(history: Sequence[Said], system: str) -> Conversation:
    """What the engine is asked. Raises BadRequest for a picture that is gone or one too many."""
    turns = []
    count = sum(len(one.pictures) for one in history)
    if count > MAX_PICTURES:
        raise BadRequest(f"a conversation has {MAX_PICTURES} pictures at most; start again")
    side = SIDE_OF_SEVERAL if count > 1 else MAX_SIDE
    for one in history:
        images = [await parts.opened(path, side) for path in one.pictures]
        turns.append(Turn(one.role, one.text, tuple(images)))
    return Conversation(tuple(turns), system)


def _shown(
    history: Sequence[Said], alt: str | None, reply: str | None = None
) -> list[dict[str, Any]]:
    """The conversation as the page shows it; with `alt`, pictures stand where they were sent."""
    messages: list[dict[str, Any]] = []
    for one in history:
        if alt is not None:
            for path in one.pictures:
                messages.append({"role": one.role, "content": {"path": path, "alt_text": alt}})
        messages.append({"role": one.role, "content": one.text})
    return [*messages, {"role": "assistant", "content": reply}] if reply else messages
