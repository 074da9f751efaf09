"""Trains the pico model from scratch on the CPU, in three phases of a fixed number of steps.

A small transformer learns to look things up only after a long plateau. Two things make it short:
the language model first reads scenes whose cells are vectors of its own words, so that an answer
is one attention step away, and a part of the dialogues are captions, in which every word's
predecessor is the key to it. Then the picture's half learns to write those same vectors, and in
the end both halves are tuned together.
"""

from __future__ import annotations

import io
import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import sentencepiece
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from ..engine import Turn
from ..minigpt4.conversation import segments
from ..minigpt4.model import MiniGPT4
from ..minigpt4.preprocess import normalize, resize
from ..minigpt4.sizes import QFormerSizes, Sizes, VitSizes
from ..minigpt4.tokenizer import Tokenizer
from . import pictures
from .pictures import Example, Scene, Thing

IGNORED = -100  # cross_entropy's own mark for positions without a target
#: Cells a side; the ViT has a patch for each and the Q-Former a query.
GRID = pictures.SIDE // pictures.CELL
COLUMNS, ROWS = "abcd", "1234"

VIT = VitSizes(width=128, depth=3, heads=4, mlp_width=384, patch_size=24)
QFORMER = QFormerSizes(96, 3, 4, 192, cross_attention_frequency=2)


@dataclass(frozen=True)
class Plan:
    """How big the model is, and how many steps of how many pictures each phase takes."""

    vit: VitSizes = VIT
    qformer: QFormerSizes = QFORMER
    image_size: int = 96
    vocabulary: int = 640
    llama_width: int = 128
    llama_mlp_width: int = 256
    llama_depth: int = 3
    llama_heads: int = 4
    pictures: int = 20480
    words_steps: int = 1800
    sight_steps: int = 700
    sight_batch: int = 128
    joint_steps: int = 600
    batch: int = 16
    turns: int = 4  # questions about a picture in one training dialogue
    first_steps: int = 500  # of the words, in which half of the turns are captions without places
    captions: float = 0.3  # of the turns after that
    places: float = 0.15  # of them ask for the cell of a shape
    relations: float = 3.0  # how much likelier a question of this hardest kind is than another
    rate: float = 2.2e-3
    joint_rate: float = 3e-4  # gentle: both halves are nearly right by then

    @property
    def steps(self) -> int:
        """All steps of all phases."""
        return self.words_steps + self.sight_steps + self.joint_steps

    def scaled(self, share: float) -> Plan:
        """The same plan with `share` of its steps in every phase."""
        return replace(
            self,
            words_steps=max(1, round(self.words_steps * share)),
            first_steps=max(1, round(self.first_steps * share)),
            sight_steps=max(1, round(self.sight_steps * share)),
            joint_steps=max(1, round(self.joint_steps * share)),
        )

    @property
    def sizes(self) -> Sizes:
        """The picture's half, with a query a cell."""
        return Sizes(self.vit, self.qformer, self.image_size, GRID * GRID)

    @property
    def llama(self) -> LlamaConfig:
        """The language model."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.llama_width,
            intermediate_size=self.llama_mlp_width,
            num_hidden_layers=self.llama_depth,
            num_attention_heads=self.llama_heads,
            max_position_embeddings=2048,
            initializer_range=self.llama_width**-0.5,
            rms_norm_eps=1e-6,
            bos_token_id=1,
            eos_token_id=2,
        )


#: Enough to see both halves begin to learn, in about two minutes.
SMALL = Plan(
    pictures=4096, words_steps=500, first_steps=500, sight_steps=200, sight_batch=96, joint_steps=1
)


@dataclass(frozen=True)
class Trained:
    """What a training made: the model, its tokenizer and the language model it began from."""

    model: MiniGPT4
    base: dict[str, Tensor]
    tokenizer: bytes
    accuracy: dict[str, float]


# --- dialogues -----------------------------------------------------------------------------------


def make_tokenizer(size: int, seed: int) -> bytes:
    """A tokenizer.model of `size` pieces with LLaMA's settings, learnt from the dialogues."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_corpus(seed),
        model_writer=model,
        vocab_size=size,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        user_defined_symbols=["###"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _corpus(seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    for scene, _ in itertools.islice(pictures.scenes(seed), 3000):
        first, second = rng.choices(pictures.questions(scene), k=2)
        turns = [
            Turn("user", first.question),
            Turn("assistant", first.answer),
            Turn("user", second.question),
        ]
        yield from around_picture(turns)
        yield " ".join(f"{t.color} {t.shape} {_cell(t)}" for t in scene.things)


def around_picture(turns: list[Turn]) -> list[str]:
    """What is read before and after a picture that comes with the first question."""
    first = replace(turns[0], images=(Image.new("RGB", (1, 1)),))
    return [segment.text for segment in segments([first, *turns[1:]])]


def _cell(thing: Thing) -> str:
    """The cell of a thing, such as `b 3`."""
    return f"{COLUMNS[thing.x // pictures.CELL]} {ROWS[thing.y // pictures.CELL]}"


#: Questions whose answers name all things of a scene, and how they name one. The first lesson
#: has colors and shapes alone, in both orders; places come when those can be looked up.
FIRST_CAPTIONS: dict[str, Callable[[Thing], str]] = {
    "Describe this image in detail.": lambda t: f"{t.color} {t.shape}",
    "List the shapes.": lambda t: f"{t.shape} {t.color}",
}
CAPTIONS = FIRST_CAPTIONS | {
    "Where is what?": lambda t: f"{t.color} {t.shape} {_cell(t)}",
    "List the shapes with their cells.": lambda t: f"{t.shape} {t.color} {_cell(t)}",
    "Map the shapes.": lambda t: f"{t.shape} {_cell(t)}",
}


def caption(
    scene: Scene, captions: dict[str, Callable[[Thing], str]], rng: random.Random
) -> Example:
    """One of the captions of a scene, its things in reading order."""
    things = sorted(scene.things, key=lambda t: (t.y // pictures.CELL, t.x // pictures.CELL))
    question, words = rng.choice(list(captions.items()))
    return Example(scene, question, ", ".join(map(words, things)) + ".", "caption")


def place(scene: Scene, rng: random.Random) -> Example | None:
    """The question for the cell of a shape that there is one of."""
    shapes = [t.shape for t in scene.things]
    lone = [t for t in scene.things if shapes.count(t.shape) == 1]
    if not lone:
        return None
    thing = rng.choice(lone)
    question = f"In which cell is the {thing.shape}?"
    return Example(scene, question, f"The {thing.shape} is at {_cell(thing)}.", "place")


class Dialogues:
    """Token ids of dialogues about a picture, and which of them the model has to write."""

    def __init__(self, tokenizer: Tokenizer, plan: Plan, rng: random.Random) -> None:
        self._tokenizer, self._plan, self._rng = tokenizer, plan, rng
        self.first_lesson = False
        self._turn = cache(self._encode_turn)
        before, _ = around_picture([Turn("user", "?")])
        #: [1, L] ids that every dialogue begins with, up to the picture.
        self.before = torch.tensor([[tokenizer.bos, *tokenizer.encode(before)]])

    def about(self, scenes: Iterable[Scene]) -> tuple[Tensor, Tensor]:
        """A dialogue about each scene: [B, T] ids and [B, T] targets after the picture."""
        return self.batch(self._ask(scene) for scene in scenes)

    def _ask(self, scene: Scene) -> list[Example]:
        """Questions about a scene in random order, captions among them."""
        kinds: dict[str, list[Example]] = {}
        for example in pictures.questions(scene):
            kinds.setdefault(example.kind, []).append(example)
        chosen: list[Example] = []
        weights = [self._plan.relations if kind == "relation" else 1.0 for kind in kinds]
        for examples in self._rng.choices([*kinds.values()], weights, k=self._plan.turns):
            lot = self._rng.random()
            other: Example | None = None
            if self.first_lesson:
                if lot < 0.5:
                    other = caption(scene, FIRST_CAPTIONS, self._rng)
            elif lot < self._plan.captions:
                other = caption(scene, CAPTIONS, self._rng)
            elif lot < self._plan.captions + self._plan.places:
                other = place(scene, self._rng)
            chosen.append(other or self._rng.choice(examples))
        return chosen

    def batch(self, dialogues: Iterable[list[Example]]) -> tuple[Tensor, Tensor]:
        """The examples of each row, one turn after the other → [B, T] ids and [B, T] targets."""
        ids: list[list[int]] = []
        targets: list[list[int]] = []
        for examples in dialogues:
            row: list[int] = []
            aims: list[int] = []
            for i, example in enumerate(examples):
                asked, answer = self._turn(example.question, example.answer, i == 0)
                row = row + asked + answer
                aims = aims + [IGNORED] * len(asked) + answer
            ids.append(row)
            targets.append(aims)
        return _pad(ids, 0), _pad(targets, IGNORED)

    def _encode_turn(self, question: str, answer: str, first: bool) -> tuple[list[int], list[int]]:
        asked = f"{question}###Assistant:"
        encode = self._tokenizer.encode_after
        start = encode("", f"</Img> {asked}") if first else encode("#", f"Human: {asked}")
        return start, encode(asked, f" {answer}###")


def _pad(rows: list[list[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


# --- pictures ------------------------------------------------------------------------------------


def draw_all(scenes: list[Scene], size: int) -> Tensor:
    """[N, 3, size, size] uint8, each drawn at 224 pixels and resized as when it is served."""
    chunks = [scenes[i : i + 256] for i in range(0, len(scenes), 256)]
    # spawn: a forked child of a process that has run torch may hang in its threads.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        drawn = list(pool.map(_draw, chunks, itertools.repeat(size)))
    tensors = [torch.frombuffer(bytearray(d), dtype=torch.uint8) for d in drawn]
    return torch.cat(tensors).reshape(-1, 3, size, size)


def _draw(scenes: list[Scene], size: int) -> bytes:
    return b"".join(resize(pictures.draw(s), size).numpy().tobytes() for s in scenes)


@dataclass(frozen=True)
class Cells:
    """What lies in every cell, [N, GRID²] each: number of the color and of the shape, 0 if none."""

    colors: Tensor
    shapes: Tensor

    def __getitem__(self, rows: list[int]) -> Cells:
        return Cells(self.colors[rows], self.shapes[rows])


def cells(scenes: list[Scene]) -> Cells:
    """The cells of scenes, in reading order."""
    colors = torch.zeros(len(scenes), GRID * GRID, dtype=torch.long)
    shapes = torch.zeros_like(colors)
    names = list(pictures.COLORS)
    for i, scene in enumerate(scenes):
        for t in scene.things:
            at = t.y // pictures.CELL * GRID + t.x // pictures.CELL
            colors[i, at] = 1 + names.index(t.color)
            shapes[i, at] = 1 + pictures.SHAPES.index(t.shape)
    return Cells(colors, shapes)


class Words:
    """A scene as the language model's own words: a vector a cell."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        def ids(words: Iterable[str]) -> Tensor:
            return torch.tensor([tokenizer.encode_after("a", f" {word}")[-1] for word in words])

        self._colors, self._shapes = ids(pictures.COLORS), ids(pictures.SHAPES)
        self._columns, self._rows = ids(COLUMNS), ids(ROWS)

    def vectors(self, llama: LlamaForCausalLM, seen: Cells) -> Tensor:
        """[B, GRID², W]: in each cell the sum of the embeddings of its color, shape and place."""
        words = llama.get_input_embeddings().weight
        nothing = words.new_zeros(1, words.shape[1])
        colors = torch.cat([nothing, words[self._colors]])
        shapes = torch.cat([nothing, words[self._shapes]])
        places = words[self._columns].repeat(GRID, 1) + words[self._rows].repeat_interleave(GRID, 0)
        return colors[seen.colors] + shapes[seen.shapes] + places


# --- learning ------------------------------------------------------------------------------------


class Learner:
    """AdamW over some parameters: a short warm-up, then a cosine down to 2 % of the rate."""

    def __init__(self, parameters: Iterable[nn.Parameter], rate: float, steps: int) -> None:
        self._parameters = list(parameters)
        decayed = [p for p in self._parameters if p.ndim > 1]
        plain = [p for p in self._parameters if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
        warm = min(50, 1 + steps // 5)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer,
            lambda n: min(1, (n + 1) / warm) * (0.51 + 0.49 * math.cos(math.pi * n / steps)),
        )

    def step(self, loss: Tensor) -> None:
        """Move the parameters against the gradient of the loss, clipped at norm 1."""
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._schedule.step()


def answers(
    llama: LlamaForCausalLM, before: Tensor, embeddings: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss over the answers' tokens, and per row the number of tokens that are not the likeliest.

    `before` [1, L] ids start every row alike, so they are computed once; `embeddings` [B, T, W]
    follow them; `targets` [B, ≤T] are those of the last positions. A row without a wrong token is
    one whose answers greedy decoding writes exactly.
    """
    shared = DynamicCache(config=llama.config)
    llama.model(input_ids=before, past_key_values=shared, use_cache=True)
    for layer in shared.layers:
        layer.keys = layer.keys.expand(len(embeddings), -1, -1, -1)
        layer.values = layer.values.expand(len(embeddings), -1, -1, -1)
    hidden = llama.model(inputs_embeds=embeddings, past_key_values=shared).last_hidden_state
    hidden = hidden[:, -targets.shape[1] :]
    aims = targets[:, 1:]
    asked = aims != IGNORED
    logits = llama.lm_head(hidden[:, :-1][asked])
    wrong = torch.zeros_like(aims)
    wrong[asked] = (logits.argmax(-1) != aims[asked]).long()
    return nn.functional.cross_entropy(logits, aims[asked]), wrong.sum(1)


def new_model(plan: Plan) -> MiniGPT4:
    """Random weights at a scale that suits small widths; transformers' own suits large ones."""
    model = MiniGPT4(plan.sizes, plan.llama)
    for part in (model.vision, model.qformer, model.llama_proj):
        for module in part.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    nn.init.normal_(model.vision.embeddings.position_embedding, std=0.2)
    nn.init.normal_(model.vision.embeddings.class_embedding, std=0.2)
    nn.init.normal_(model.query_tokens, std=0.5)
    return model


class Training:
    """The data and the model of one training, and its phases in their order."""

    def __init__(self, plan: Plan, seed: int, say: Callable[[str], None]) -> None:
        self.plan, self.say = plan, say
        self._began = time.monotonic()
        torch.manual_seed(seed)
        self._rng = random.Random(seed)
        self.tokenizer = make_tokenizer(plan.vocabulary, seed)
        with TemporaryDirectory() as folder:
            file = Path(folder, "tokenizer.model")
            file.write_bytes(self.tokenizer)
            tokenizer = Tokenizer(file)
        self._words = Words(tokenizer)
        self._dialogues = Dialogues(tokenizer, plan, self._rng)
        self.model = new_model(plan)
        self._scenes = [s for s, _ in itertools.islice(pictures.scenes(seed), plan.pictures)]
        self._cells = cells(self._scenes)
        self._pixels = draw_all(self._scenes, plan.image_size)
        held_out = pictures.held_out_examples(seed + 1, 400)
        self._held_out = held_out
        self._held_out_cells = cells([e.scene for e in held_out])
        self._held_out_pixels = draw_all([e.scene for e in held_out], plan.image_size)

    def words(self) -> list[float]:
        """The language model learns to answer about scenes made of its own words."""
        plan, llama = self.plan, self.model.llama
        learner = Learner(llama.parameters(), plan.rate, plan.words_steps)
        losses = []
        for step in range(plan.words_steps):
            self._dialogues.first_lesson = step < plan.first_steps
            rows = self._pick(plan.batch)
            ids, targets = self._dialogues.about(self._scenes[row] for row in rows)
            seen = self._words.vectors(llama, self._cells[rows])
            losses.append(self._learn_answers(learner, seen, ids, targets))
            self._tell("words", step, plan.words_steps, losses, self._reading)
        self._dialogues.first_lesson = False
        return losses

    def sight(self) -> list[float]:
        """The picture's half learns to write the vectors that the language model can read."""
        plan, model = self.plan, self.model
        n_colors, n_shapes = 1 + len(pictures.COLORS), 1 + len(pictures.SHAPES)
        # These tell what each half alone has seen, which shortens the way; they are not kept.
        widths = (plan.vit.width, plan.qformer.hidden_size)
        heads = nn.ModuleList(nn.Linear(width, n_colors + n_shapes) for width in widths)
        # Most cells are empty; without this they drown the rest.
        weight = torch.tensor([0.1, *[1.0] * (n_colors - 1)])
        parts = (model.vision, model.qformer, model.llama_proj, heads)
        parameters = itertools.chain([model.query_tokens], *(part.parameters() for part in parts))
        learner = Learner(parameters, plan.rate, plan.sight_steps)
        losses = []
        for step in range(plan.sight_steps):
            rows = self._pick(plan.sight_batch)
            seen = self._cells[rows]
            with torch.no_grad():
                aim = self._words.vectors(model.llama, seen)
            patches = model.vision(normalize(self._pixels[rows])).last_hidden_state
            queries = model.query_tokens.expand(len(rows), -1, -1)
            read = model.qformer(
                query_embeds=queries, encoder_hidden_states=patches
            ).last_hidden_state
            written = model.llama_proj(read)
            loss = (written - aim).square().sum(-1).mean() / aim.square().sum(-1).mean()
            for head, part in zip(heads, (patches[:, 1:], read), strict=True):
                color, shape = head(part).flatten(0, 1).split([n_colors, n_shapes], -1)
                loss = loss + nn.functional.cross_entropy(color, seen.colors.flatten(), weight)
                loss = loss + nn.functional.cross_entropy(
                    shape, seen.shapes.flatten(), weight[:n_shapes]
                )
            learner.step(loss)
            losses.append(loss.item())
            self._tell("sight", step, plan.sight_steps, losses, self.accuracy)
        return losses

    def joint(self) -> list[float]:
        """Both halves learn together to answer about pictures."""
        plan, model = self.plan, self.model
        learner = Learner(model.parameters(), plan.joint_rate, plan.joint_steps)
        losses = []
        for step in range(plan.joint_steps):
            rows = self._pick(plan.batch)
            ids, targets = self._dialogues.about(self._scenes[row] for row in rows)
            seen = model.encode_image(normalize(self._pixels[rows]))
            losses.append(self._learn_answers(learner, seen, ids, targets))
            self._tell("joint", step, plan.joint_steps, losses, self.accuracy)
        return losses

    def _pick(self, count: int) -> list[int]:
        return self._rng.choices(range(len(self._scenes)), k=count)

    def _learn_answers(self, learner: Learner, seen: Tensor, ids: Tensor, targets: Tensor) -> float:
        embeddings = torch.cat([seen, self.model.embed(ids)], dim=1)
        loss, _ = answers(self.model.llama, self._dialogues.before, embeddings, targets)
        learner.step(loss)
        return loss.item()

    def _tell(
        self,
        phase: str,
        step: int,
        steps: int,
        losses: list[float],
        check: Callable[[], dict[str, float]],
    ) -> None:
        if (step + 1) % 100 and step + 1 != steps:
            return
        recent = losses[-100:]
        right = " ".join(f"{kind} {share:.0%}" for kind, share in check().items())
        seconds = time.monotonic() - self._began
        self.say(
            f"{seconds:5.0f} s  {phase} {step + 1}/{steps}  loss {sum(recent) / len(recent):.3f}  "
            f"held-out: {right}"
        )

    @torch.no_grad()
    def accuracy(self) -> dict[str, float]:
        """Share of right answers about held-out pictures, by kind of question."""
        return self._check(self.model.encode_image(normalize(self._held_out_pixels)))

    @torch.no_grad()
    def _reading(self) -> dict[str, float]:
        """The same, with the pictures in the language model's own words."""
        return self._check(self._words.vectors(self.model.llama, self._held_out_cells))

    def _check(self, seen: Tensor) -> dict[str, float]:
        ids, targets = self._dialogues.batch([example] for example in self._held_out)
        embeddings = torch.cat([seen, self.model.embed(ids)], dim=1)
        _, wrong = answers(self.model.llama, self._dialogues.before, embeddings, targets)
        right: dict[str, list[bool]] = {}
        for example, tokens in zip(self._held_out, wrong.tolist(), strict=True):
            right.setdefault(example.kind, []).append(tokens == 0)
        return {kind: sum(each) / len(each) for kind, each in right.items()}


def train(plan: Plan, seed: int, say: Callable[[str], None]) -> Trained:
    """Train a pico model; the same plan, seed and number of threads make the same model."""
    training = Training(plan, seed, say)
    training.words()
    base = {k: v.detach().clone() for k, v in training.model.llama.state_dict().items()}
    training.sight()
    training.joint()
    return Trained(training.model, base, training.tokenizer, training.accuracy())
