"""What a conversation has computed is used again, and never where it would be wrong."""

import math
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from modeldemo import config, systems
from modeldemo.engine import Conversation, ModelDemoError, OutOfMemory, Sampling, Turn
from modeldemo.minigpt4.decoder import Decoder
from modeldemo.minigpt4.engine import PICTURES_KEPT, MiniGPT4Engine
from modeldemo.minigpt4.sampler import Sampler
from modeldemo.pico import pictures
from modeldemo.pico.evaluate import pico_settings
from modeldemo.pico.train import Plan
from PIL import Image
from tiny import about
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

GREEDY = Sampling(temperature=0, max_new_tokens=12)
FIRST = Turn("user", "What color is the circle?")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loaded(made):
    return systems.load(config.load(*made.yamls, []), "cpu", "tiny")


@pytest.fixture
def engine(loaded):
    """An engine that has computed nothing yet."""
    return MiniGPT4Engine("tiny", loaded._model, loaded._tokenizer)


@pytest.fixture(scope="module")
def drawings():
    return [pictures.draw(e.scene) for e in pictures.held_out_examples(5, 3)]


def answer(engine, conversation, sampling=GREEDY):
    return "".join(piece.text for piece in engine.stream(conversation, sampling))


@contextmanager
def positions(engine):
    """Counts the positions that pass through the LLaMA's first layer, and the pictures encoded."""
    seen = {"positions": 0, "pictures": 0}

    def llama(_, read):
        seen["positions"] += read[0].shape[1]

    def vision(*_):
        seen["pictures"] += 1

    first = engine._model.llama.model.layers[0].mlp
    hooks = [
        first.register_forward_pre_hook(llama),
        engine._model.vision.register_forward_pre_hook(vision),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def whole(engine, conversation):
    """How many positions a conversation has."""
    return next(engine.stream(conversation, GREEDY)).prompt_tokens


def follow(conversation, said, question, *images):
    turns = (*conversation.turns, Turn("assistant", said), Turn("user", question, images))
    return Conversation(turns)


def test_a_step_after_reading_equals_reading_it_all(loaded):
    llama = loaded._model.llama
    ids = torch.randint(3, 400, (70,))
    with torch.inference_mode():
        expected = llama(ids[None]).logits[0]
        for cut in (1, 2, 37, 69):
            decoder = Decoder(llama, 512)
            logits = decoder.read(decoder.embed(ids[:cut]), ids[:cut].tolist())
            assert (logits - expected[cut - 1]).abs().max() < 1e-4
            for i in range(cut, len(ids)):
                logits = decoder.step(ids[i : i + 1])
                decoder.note(int(ids[i]))
            assert (logits - expected[-1]).abs().max() < 1e-4
            # and once more from the middle, over what is there
            kept = decoder.resume([*ids[:50].tolist(), 5, 6, 7])
            assert kept == 50
            more = torch.tensor([5, 6, 7])
            logits = decoder.read(decoder.embed(more), more.tolist())
            fresh = llama(torch.cat((ids[:50], more))[None]).logits[0, -1]
            assert (logits - fresh).abs().max() < 1e-4


def test_the_step_that_a_gpu_records_computes_the_same(loaded):
    # What a graph replays is `_recorded` with its token and position in tensors.
    decoder = Decoder(loaded._model.llama, 512)
    ids = torch.randint(3, 400, (40,))
    with torch.inference_mode():
        decoder.read(decoder.embed(ids), ids.tolist())
        expected = decoder.step(torch.tensor([9]))
        for seen in decoder._sizes():
            decoder._token[0], decoder._at[0] = 9, 40
            assert (decoder._recorded(seen) - expected).abs().max() < 1e-4
    assert decoder._sizes() == [256, 512]


def test_grouped_heads_are_computed_as_transformers_does():
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 90}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=2))
    ids = torch.arange(20)
    with torch.inference_mode():
        decoder = Decoder(llama.eval(), 64)
        logits = decoder.read(decoder.embed(ids), ids.tolist())
        assert (logits - llama(ids[None]).logits[0, -1]).abs().max() < 1e-5


def test_a_second_question_computes_only_what_is_new(engine, drawings):
    first = about(drawings[0], FIRST)
    with positions(engine) as seen:
        said = answer(engine, first)
    assert seen["pictures"] == 1
    length = whole(engine, first)
    assert seen["positions"] >= length
    second = follow(first, said, "And its size?")
    with positions(engine) as seen:
        pieces = list(engine.stream(second, Sampling(temperature=0, max_new_tokens=1)))
    assert seen["pictures"] == 0
    assert seen["positions"] <= pieces[0].prompt_tokens - length


def test_a_trained_models_own_answer_is_not_computed_again(drawings):
    folder = Path(__file__).parents[2] / "files" / "weights" / "pico"
    engine = MiniGPT4Engine.load(pico_settings(folder, Plan().sizes), "cpu", "pico")
    first = about(drawings[0], FIRST)
    said = answer(engine, first)
    assert "###" not in said
    second = follow(first, said, "Where is it?")
    new = engine._tokenizer.encode("###Human: Where is it?###Assistant:")
    with positions(engine) as seen:
        pieces = list(engine.stream(second, Sampling(temperature=0, max_new_tokens=1)))
    assert seen["pictures"] == 0
    assert seen["positions"] <= len(new)
    assert pieces[0].prompt_tokens > 5 * seen["positions"]


def test_the_same_question_again_computes_one_position(engine, drawings):
    first = about(drawings[0], FIRST)
    one = Sampling(temperature=0, max_new_tokens=1)
    answer(engine, first, one)
    with positions(engine) as seen:
        answer(engine, first, one)
    assert seen == {"positions": 1, "pictures": 0}


def test_answers_are_the_same_with_and_without_what_was_computed_before(loaded, engine, drawings):
    """Conversations in turn, longer and shorter, with other pictures, cut off, sampled, left."""
    one, two = about(drawings[0], FIRST), about(drawings[1], FIRST)
    long = Turn("user", "What is it? " * 45)
    cases = [
        (one, GREEDY),
        (follow(one, "Red.", "And its size?"), GREEDY),
        (two, GREEDY),
        (follow(one, "Blue.", "And its size?"), GREEDY),
        (follow(one, "Red.", "And this?", drawings[2]), GREEDY),
        (follow(two, "Red.", "And this?", drawings[2]), GREEDY),
        (follow(follow(about(drawings[0], long), "Red.", long.text), "Blue.", "Why?"), GREEDY),
        (one, Sampling(temperature=1.0, seed=4, max_new_tokens=12)),
        (one, Sampling(temperature=0, repetition_penalty=1.3, max_new_tokens=12)),
        (one, GREEDY),
    ]
    for conversation, sampling in cases + cases[::-1]:
        fresh = MiniGPT4Engine("tiny", loaded._model, loaded._tokenizer)
        assert answer(engine, conversation, sampling) == answer(fresh, conversation, sampling)
        left = engine.stream(conversation, sampling)
        next(left), next(left)
        left.close()


def test_logits_are_the_same_with_and_without_what_was_computed_before(loaded, engine, drawings):
    conversation = follow(about(drawings[0], FIRST), "Red.", "And its size?")
    answer(engine, about(drawings[0], FIRST))
    given = []
    for each in (engine, MiniGPT4Engine("tiny", loaded._model, loaded._tokenizer)):
        each._decoder.read = spied(each._decoder.read, given)
        answer(each, conversation, Sampling(temperature=0, max_new_tokens=1))
    assert (given[0] - given[1]).abs().max() < 1e-5
    assert given[1].abs().max() > 0.1


def spied(function, given):
    def call(*arguments):
        given.append(function(*arguments))
        return given[-1]

    return call


def test_conversations_in_turn_do_not_push_each_other_out(engine, drawings):
    ones = [about(drawing, FIRST) for drawing in drawings]
    said = [answer(engine, one) for one in ones]
    twos = [follow(one, text, "And its size?") for one, text in zip(ones, said, strict=True)]
    with positions(engine) as seen:
        for two in twos:
            answer(engine, two, Sampling(temperature=0, max_new_tokens=1))
    assert seen["pictures"] == 0
    assert seen["positions"] < sum(whole(engine, two) for two in twos) / 2


def test_what_is_kept_of_other_conversations_is_no_more_than_one_whole_one(engine, drawings):
    long = Turn("user", "What is it? " * 45)
    for i in range(6):
        picture = Image.new("RGB", (8, 8), (40 * i, 0, 0))
        answer(engine, about(picture, long), Sampling(temperature=0, max_new_tokens=1))
    kept = engine._decoder._parked
    assert kept
    assert sum(parked.cache.nbytes for parked in kept) <= engine._decoder._cache.nbytes


def test_a_picture_is_encoded_once_and_the_oldest_is_forgotten(engine):
    def ask(i):
        answer(engine, about(Image.new("RGB", (8, 8), (i, i, 0)), FIRST), one)

    one = Sampling(temperature=0, max_new_tokens=1)
    with positions(engine) as seen:
        for i in [0, 1, 0, 1, *range(2, PICTURES_KEPT + 2), PICTURES_KEPT + 1, 1]:
            ask(i)
    assert seen["pictures"] == PICTURES_KEPT + 2 + 1
    assert len(engine._pictures) == PICTURES_KEPT


@pytest.mark.parametrize("beams", [1, 2])
def test_an_answer_tells_how_many_pictures_were_encoded_for_it(engine, beams):
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("#a01", "#10a"))
    one = Sampling(temperature=0, num_beams=beams, max_new_tokens=1)
    engine._pictures.clear()

    def told(conversation):
        given = list(engine.stream(conversation, one))
        return sum(p.pictures_encoded for p in given), sum(p.pictures_reused for p in given)

    assert told(about(red, FIRST)) == (1, 0)
    assert told(about(red, FIRST)) == (0, 1)
    assert told(follow(about(red, FIRST), "Red.", "And these?", blue, red)) == (1, 2)


@pytest.mark.parametrize("beams", [1, 2])
def test_after_the_memory_ran_out_the_next_question_is_answered(
    engine, drawings, beams, monkeypatch
):
    question = about(drawings[0], FIRST)
    sampling = Sampling(temperature=0, num_beams=beams, max_new_tokens=12)
    expected = answer(engine, question, sampling)

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    hook = engine._model.llama.lm_head.register_forward_pre_hook(fail)
    other = about(drawings[1], FIRST)
    with pytest.raises(OutOfMemory, match="use fewer beams") as caught:
        answer(engine, other, sampling)
    hook.remove()
    assert "\n" not in str(caught.value)
    assert not engine._pictures
    assert not engine._decoder._parked
    assert answer(engine, question, sampling) == expected


def test_numbers_that_are_none_end_the_answer_and_not_the_service(engine, drawings):
    question = about(drawings[0], FIRST)
    expected = answer(engine, question)

    def spoil(_, __, logits):
        return logits * math.nan

    for temperature in (0, 1):
        hook = engine._model.llama.model.layers[0].mlp.register_forward_hook(spoil)
        sampling = Sampling(temperature=temperature, max_new_tokens=12)
        with pytest.raises(ModelDemoError, match="not a number"):
            answer(engine, about(drawings[1], FIRST), sampling)
        hook.remove()
        assert answer(engine, question) == expected


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.6, "top_p": 0.5, "top_k": 7},
        {"temperature": 1.0, "top_p": 1.0, "top_k": 0},
        {"temperature": 0.2, "top_p": 0.01},
        {"temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.2},
    ],
)
def test_the_odds_of_every_token_are_those_of_transformers(how):
    torch.manual_seed(2)
    sampling = Sampling(seed=1, **how)
    sampler = Sampler(sampling, torch.device("cpu"))
    made = [sampler.choose(torch.randn(500) * 3)[0].item() for _ in range(5)]
    logits = torch.randn(500) * 3
    chain = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    chain.append(TopPLogitsWarper(sampling.top_p))
    ours = logits
    if sampling.repetition_penalty != 1:
        chain.insert(0, RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        ours = sampler._penalised(logits)
    expected = chain(torch.tensor([made]), logits[None].clone())[0].softmax(0)
    ids, weights = sampler.candidates(ours)
    given = torch.zeros(500).scatter(0, ids, weights / weights.sum())
    assert (given - expected).abs().max() < 1e-6


def test_tokens_are_drawn_by_their_odds():
    sampler = Sampler(Sampling(seed=3, top_p=1.0), torch.device("cpu"))
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    drawn = torch.stack([sampler.choose(logits)[0] for _ in range(6000)])
    odds = drawn.bincount(minlength=3) / 6000
    assert (odds - torch.tensor([0.5, 0.3, 0.2])).abs().max() < 0.03
