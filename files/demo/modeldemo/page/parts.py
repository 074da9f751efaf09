"""What the pages of all systems have in common: heading, picture, sliders, and their words."""

from __future__ import annotations

import asyncio
import html
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from modeldemo.engine import BadRequest, Engine, ModelDemoError, Sampling
from modeldemo.images import MAX_SIDE, decode
from modeldemo.runner import Runner
from modeldemo.texts import Texts, translated

UPLOAD_LIFE = 3600  # seconds after which an upload is deleted from the disk
GLANCE = 0.2  # seconds between looks at whether somebody still waits for the answer

# Field of Sampling: lowest, highest, step.
RANGES: dict[str, tuple[float, float, float]] = {
    "temperature": (0, 2, 0.1),
    "top_p": (0.05, 1, 0.05),
    "top_k": (0, 100, 1),
    "num_beams": (1, 10, 1),
    "max_new_tokens": (4, 2000, 4),
    "repetition_penalty": (1, 2, 0.05),
}
# Field of Sampling: the id of its part, where it is not the field's name.
IDS = {"num_beams": "beams"}
WHOLE = {field.name for field in fields(Sampling) if field.type in ("int", "int | None")}


@dataclass
class Wish:
    """What a person wants of the answer that comes."""

    gone: bool = False
    """Its conversation has ended: nobody wants any of it."""
    enough: bool = False
    """No more of it: what has come is the answer."""


class Sessions:
    """Which browsers wait for an answer, and which of them no longer want it."""

    def __init__(self) -> None:
        self._running: dict[str | None, Wish] = {}

    def begin(self, session: str | None) -> Wish:
        """What this browser's person will want of the answer that begins."""
        self._running[session] = wish = Wish()
        return wish

    def end(self, session: str | None, wish: Wish) -> None:
        """The answer is whole, or failed."""
        if self._running.get(session) is wish:
            del self._running[session]

    def waits(self, session: str | None) -> bool:
        """Whether an answer comes to this browser."""
        return session in self._running

    def leave(self, session: str | None) -> None:
        """The conversation ends."""
        if wish := self._running.pop(session, None):
            wish.gone = True

    def stop(self, session: str | None) -> None:
        """The answer ends where it is."""
        if wish := self._running.get(session):
            wish.enough = True


def page(runner: Runner) -> gr.Blocks:
    """The frame that the parts below are put into."""
    title = f"{runner.model_id} · modeldemo"
    return gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, UPLOAD_LIFE))


def heading(runner: Runner, hint: str, texts: Texts) -> None:
    """The model's name, what to do, and the way to the other language."""
    other = "zh" if texts.tag == "en" else "en"
    tag = "zh-CN" if other == "zh" else "en"
    link = f'<a href="?lang={other}" lang="{tag}" hreflang="{tag}">{texts.other}</a>'
    with gr.Row(elem_id="head"):
        gr.Markdown(f"# {runner.model_id}\n{hint}", elem_id="title")
        gr.HTML(link, elem_id="language", padding=False)


def served(runner: Runner, texts: Texts) -> None:
    """Which model answers, with which weights, in which revision of the deploy."""
    known = [(texts.weights, runner.weights), (texts.revision, runner.revision)]
    words = [runner.model_id, *(f"{name} {value}" for name, value in known if value)]
    gr.HTML(f"<p>{html.escape(' · '.join(words))}</p>", elem_id="served", padding=False)


def picture(texts: Texts, visible: bool = True) -> gr.Image:
    image = gr.Image(
        label=texts.picture,
        type="filepath",
        sources=["upload", "clipboard"],
        placeholder=texts.drop,
        buttons=[],
        height=290,
        visible=visible,
        elem_id="picture",
    )
    # Gradio's example lies on another host, and its name would go to every browser.
    vars(image).update(example_payload=lambda: None, example_value=lambda: None)
    return image


def offered(examples: Sequence[Path], image: gr.Image, texts: Texts) -> list[Any]:
    """The examples under the picture, and all the ways of choosing one."""
    chosen: list[Any] = [image.input]
    if examples:
        files = [[str(path)] for path in examples]
        shown = gr.Examples(files, image, label=texts.examples)
        chosen.append(shown.load_input_event.then)
    return chosen


def controls(engine: Engine, texts: Texts) -> list[Any]:
    """A part for each field of Sampling that the engine's page names, in its order."""
    return [_control(name, getattr(engine.defaults, name), texts) for name in engine.page.controls]


def _control(name: str, default: Any, texts: Texts) -> Any:
    label, info = texts.controls[name]
    part = IDS.get(name, name)
    if name == "seed":
        return gr.Number(default, label=label, info=info, precision=0, elem_id=part)
    low, high, step = RANGES[name]
    low, high = min(low, default), max(high, default)
    return gr.Slider(low, high, default, step=step, label=label, info=info, elem_id=part)


def sampling(engine: Engine, values: Sequence[Any]) -> Sampling:
    """What the parts of `controls` say, over the engine's defaults."""
    given = {
        name: int(value) if name in WHOLE else value
        for name, value in zip(engine.page.controls, values, strict=True)
        if value is not None
    }
    return replace(engine.defaults, **given)


async def opened(path: str, side: int = MAX_SIDE) -> Image.Image:
    """Decode an upload; raises BadRequest."""
    try:
        data = await asyncio.to_thread(Path(path).read_bytes)
    except OSError:
        raise BadRequest("the picture is no longer here; upload it again") from None
    return await asyncio.to_thread(decode, data, side)


def sentence(error: ModelDemoError, texts: Texts) -> str:
    """An error in the page's language, as a sentence."""
    text = translated(str(error), texts)
    stop = "。" if texts.tag == "zh-CN" else "."
    return f"{text[:1].upper()}{text[1:]}{stop}"
