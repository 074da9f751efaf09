"""Asks a pico model, through the engine that serves it, about held-out pictures."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from ..engine import Conversation, Engine, Sampling, Turn
from ..minigpt4.engine import MiniGPT4Engine
from ..minigpt4.settings import Settings
from ..minigpt4.sizes import Sizes
from . import pictures
from .write import PROJECTION, QFORMER, VICUNA, VIT


@dataclass(frozen=True)
class Result:
    """(right, asked) by kind of question, `all` at last, and the median seconds of an answer."""

    kinds: dict[str, tuple[int, int]]
    seconds: float
    wrong: list[tuple[str, str, str]]  # question, expected, answer


def pico_settings(folder: Path, sizes: Sizes) -> Settings:
    """The settings for the files that the trainer wrote into a folder."""
    return Settings(
        sizes,
        llama=folder / VICUNA,
        vit=folder / VIT,
        qformer=folder / QFORMER,
        projection=folder / PROJECTION,
    )


def ask(source: Settings | Engine, seed: int, count: int) -> Result:
    """Greedy answers to `count` held-out questions, on the CPU in float32."""
    if isinstance(source, Settings):
        source = MiniGPT4Engine.load(source, "cpu", "pico")
    right = {kind: [0, 0] for kind in (*pictures.KINDS, "all")}
    took: list[float] = []
    wrong: list[tuple[str, str, str]] = []
    for example in pictures.held_out_examples(seed, count):
        began = time.perf_counter()
        turn = Turn("user", example.question, (pictures.draw(example.scene),))
        sampling = Sampling(temperature=0, max_new_tokens=40)
        answer = "".join(piece.text for piece in source.stream(Conversation((turn,)), sampling))
        took.append(time.perf_counter() - began)
        good = pictures.is_right(answer, example.answer)
        if not good:
            wrong.append((example.question, example.answer, answer))
        for kind in (example.kind, "all"):
            right[kind][0] += good
            right[kind][1] += 1
    kinds = {kind: (counts[0], counts[1]) for kind, counts in right.items()}
    return Result(kinds, statistics.median(took), wrong)
