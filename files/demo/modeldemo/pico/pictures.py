"""Draws pictures of coloured shapes and asks questions about them whose answers are known."""

from __future__ import annotations

import functools
import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

# Far enough apart to be told apart after the jitter below, which is smaller than half the
# distance between the nearest pair (orange and yellow).
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 44),
    "green": (44, 160, 62),
    "blue": (42, 84, 216),
    "yellow": (242, 220, 48),
    "purple": (140, 56, 180),
    "orange": (246, 138, 28),
}
SHAPES = ("circle", "square", "triangle", "star")
NUMBERS = ("one", "two", "three", "four", "five")
KINDS = ("color", "shape", "count", "relation")

SIDE = 224  # pixels of the plane in which a scene is laid out, MiniGPT-4's own picture size
CELL = 56  # pixels of the grid on which two scenes count as the same
HELD_OUT_SHARE = 0.1  # of all scenes; the trainer never draws them


@dataclass(frozen=True)
class Thing:
    """One shape: its centre, radius (pixels of a SIDE × SIDE plane), tilt (degrees) and tint."""

    shape: str
    color: str
    x: int
    y: int
    radius: int
    tilt: int = 0
    tint: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class Scene:
    """Shapes on a background that runs from one muted color to another."""

    things: tuple[Thing, ...]
    background: tuple[tuple[int, int, int], tuple[int, int, int]] = ((236, 236, 232),) * 2
    direction: int = 0  # quarter turns of the background's gradient
    noise: int = 0  # seed of the grain; 0 is none


@dataclass(frozen=True)
class Example:
    """A question about a scene, and the one right answer in words."""

    scene: Scene
    question: str
    answer: str
    kind: str


def draw(scene: Scene, size: int = SIDE) -> Image.Image:
    """Draw a scene as a `size` × `size` RGB picture, the same for the same scene every time."""
    ramp = _ramp(scene.direction, size)
    first, second = (Image.new("RGB", (size, size), shade) for shade in scene.background)
    picture = Image.composite(first, second, ramp)
    for thing in scene.things:
        _draw_thing(picture, thing, size / SIDE)
    if scene.noise:
        grain = random.Random(scene.noise).randbytes(3 * size * size)
        picture = Image.blend(picture, Image.frombytes("RGB", (size, size), grain), 0.05)
    return picture


@functools.cache
def _ramp(direction: int, size: int) -> Image.Image:
    """From black to white, turned by quarters."""
    return Image.linear_gradient("L").rotate(90 * direction).resize((size, size))


def _draw_thing(picture: Image.Image, thing: Thing, scale: float) -> None:
    """Draw through a mask at twice the size, so that edges are smooth."""
    base = COLORS[thing.color]
    fill = tuple(max(0, min(255, c + t)) for c, t in zip(base, thing.tint, strict=True))
    reach = math.ceil(thing.radius * scale) + 1
    mask = Image.new("L", (4 * reach, 4 * reach))
    pen = ImageDraw.Draw(mask)
    radius, middle = 2 * thing.radius * scale, 2 * reach
    if thing.shape == "circle":
        # A circle of the same radius looks bigger than the others: it fills its whole box.
        r = 0.9 * radius
        pen.ellipse((middle - r, middle - r, middle + r, middle + r), fill=255)
    else:
        pen.polygon([(middle + x, middle + y) for x, y in _outline(thing, radius)], fill=255)
    box = (round(thing.x * scale) - reach, round(thing.y * scale) - reach)
    picture.paste(fill, box, mask.resize((2 * reach, 2 * reach), Image.Resampling.BOX))


def _outline(thing: Thing, radius: float) -> list[tuple[float, float]]:
    """Corners around the origin; y grows downwards, so -90° is the top."""
    corners, start, inner = {
        "square": (4, -45.0, 1.0),
        "triangle": (3, -90.0, 1.0),
        "star": (10, -90.0, 0.42),
    }[thing.shape]
    points = []
    for i in range(corners):
        angle = math.radians(start + thing.tilt + 360 * i / corners)
        r = radius * (inner if i % 2 else 1.0)
        points.append((r * math.cos(angle), r * math.sin(angle)))
    return points


def questions(scene: Scene) -> list[Example]:
    """Every question that has exactly one right answer in this scene."""
    found = [Example(scene, "How many shapes are there?", _count(len(scene.things)), "count")]
    shapes = [t.shape for t in scene.things]
    colors = [t.color for t in scene.things]
    lone = [t for t in scene.things if shapes.count(t.shape) == 1]
    for t in lone:
        question, answer = f"What color is the {t.shape}?", f"The {t.shape} is {t.color}."
        found.append(Example(scene, question, answer, "color"))
    for t in scene.things:
        if colors.count(t.color) == 1:
            question, answer = f"What shape is {t.color}?", f"The {t.color} shape is a {t.shape}."
            found.append(Example(scene, question, answer, "shape"))
    for a in lone:
        for b in lone:
            where = _relation(a, b)
            if where:
                question = f"Where is the {a.shape} relative to the {b.shape}?"
                answer = f"The {a.shape} is {where} the {b.shape}."
                found.append(Example(scene, question, answer, "relation"))
    return found


def _count(n: int) -> str:
    return f"There is {NUMBERS[0]} shape." if n == 1 else f"There are {NUMBERS[n - 1]} shapes."


def _relation(a: Thing, b: Thing) -> str | None:
    """Where a lies as seen from b, or None where a person might hesitate."""
    dx, dy = a.x - b.x, a.y - b.y
    if max(abs(dx), abs(dy)) < 2 * min(abs(dx), abs(dy)) or (dx, dy) == (0, 0):
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def canonical(scene: Scene) -> str:
    """What a scene shows, whatever its order, background, grain, tints and exact places."""
    return ";".join(
        sorted(f"{t.color} {t.shape} {t.x // CELL},{t.y // CELL}" for t in scene.things)
    )


def is_held_out(scene: Scene) -> bool:
    """Whether a scene is kept for tests: decided by a hash of what it shows, and by nothing else.

    A training picture therefore never shows the same shapes in the same colors and cells as a
    held-out one.
    """
    digest = hashlib.sha256(canonical(scene).encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def scenes(seed: int, held_out: bool = False) -> Iterator[tuple[Scene, str]]:
    """Endless scenes, each with a kind of question it can answer; the kinds take turns."""
    rng = random.Random(f"{seed} {held_out}")
    while True:
        for kind in KINDS:
            while True:
                scene = _random_scene(rng, kind)
                if is_held_out(scene) is held_out and any(e.kind == kind for e in questions(scene)):
                    break
            yield scene, kind


def training_examples(seed: int) -> Iterator[Example]:
    """Endless examples, the kinds taking turns; none of them is about a held-out scene."""
    return _examples(seed, held_out=False)


def held_out_examples(seed: int, count: int) -> list[Example]:
    """`count` examples about distinct held-out scenes, the kinds balanced."""
    chosen: list[Example] = []
    seen: set[str] = set()
    for example in _examples(seed, held_out=True):
        if len(chosen) == count:
            break
        # Kinds take turns: one that repeats a scene is replaced by the next of its kind.
        wanted = KINDS[len(chosen) % len(KINDS)]
        if example.kind == wanted and canonical(example.scene) not in seen:
            seen.add(canonical(example.scene))
            chosen.append(example)
    return chosen


def _examples(seed: int, held_out: bool) -> Iterator[Example]:
    rng = random.Random(f"{seed} {held_out} questions")
    for scene, kind in scenes(seed, held_out):
        yield rng.choice([e for e in questions(scene) if e.kind == kind])


def _random_scene(rng: random.Random, kind: str) -> Scene:
    n = rng.randint(2, 3) if kind == "relation" else rng.randint(1, 5)
    side = SIDE // CELL
    things: list[Thing] = []
    for place in rng.sample(range(side * side), n):
        thing = _random_thing(rng, place % side, place // side)
        while not all(_apart(thing, other) for other in things):
            thing = _random_thing(rng, place % side, place // side)
        things.append(thing)
    return Scene(
        tuple(things),
        background=(_muted(rng), _muted(rng)),
        direction=rng.randrange(4),
        noise=rng.randrange(1, 2**31),
    )


def _random_thing(rng: random.Random, column: int, row: int) -> Thing:
    """Anywhere in a cell, up to 3 pixels over its edge but never over the picture's."""
    radius = rng.randint(20, 27)
    play = CELL // 2 - radius + 3
    x, y = (
        max(radius, min(SIDE - radius, at * CELL + CELL // 2 + rng.randint(-play, play)))
        for at in (column, row)
    )
    tint = (rng.randint(-14, 14), rng.randint(-14, 14), rng.randint(-14, 14))
    return Thing(
        rng.choice(SHAPES), rng.choice(tuple(COLORS)), x, y, radius, rng.randint(-12, 12), tint
    )


def _apart(a: Thing, b: Thing) -> bool:
    return math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius + 2


def _muted(rng: random.Random) -> tuple[int, int, int]:
    """A grey with a slight cast, from black to white."""
    level = rng.randint(10, 245)
    return tuple(max(0, min(255, level + rng.randint(-10, 10))) for _ in range(3))  # type: ignore[return-value]


def is_right(answer: str, expected: str) -> bool:
    """Whether two answers are the same but for case, spaces and the final punctuation."""
    return _plain(answer) == _plain(expected)


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".!?。 ").casefold()


def show(examples: Sequence[Example], columns: int = 4, size: int = SIDE) -> Image.Image:
    """A contact sheet of the examples' pictures, row by row."""
    rows = math.ceil(len(examples) / columns)
    sheet = Image.new("RGB", (columns * size, rows * size), "white")
    for i, example in enumerate(examples):
        sheet.paste(draw(example.scene, size), (i % columns * size, i // columns * size))
    return sheet
