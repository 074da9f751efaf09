"""The loaded model computes what the original code computed from the same files."""

import json
import shutil

import pytest
import tiny
import torch
from modeldemo import config, systems
from modeldemo.engine import BadRequest, Conversation, Sampling, Turn
from modeldemo.minigpt4.conversation import segments
from modeldemo.minigpt4.preprocess import MEAN, STD, preprocess
from modeldemo.pico import pictures
from PIL import Image
from tiny import about, pieces

QUESTION = Turn("user", "What color is the circle?")
GREEDY = Sampling(temperature=0, max_new_tokens=12)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(made):
    return systems.load(config.load(*made.yamls, []), "cpu", "tiny")


@pytest.fixture(scope="module")
def picture():
    return pictures.draw(pictures.held_out_examples(5, 1)[0].scene)


def test_the_language_half_is_the_file_bit_for_bit(made, engine):
    for file in (made.folder / "vicuna-pico").glob("*.bin"):
        for name, value in torch.load(file, weights_only=True).items():
            assert torch.equal(engine._model.llama.state_dict()[name], value.float()), name


def test_the_language_half_computes_what_it_did_before_it_was_written(made, engine):
    ids = torch.arange(20)[None] + 5
    loaded = engine._model.llama.state_dict()
    with torch.inference_mode():
        expected = torch.func.functional_call(made.model.llama, loaded, ids).logits
        assert torch.equal(engine._model.llama(ids).logits, expected)


def test_later_blocks_norm_and_head_of_the_vit_are_ignored(made, engine, tmp_path):
    shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "eva_vit_pico.pth"
    tensors = torch.load(file, weights_only=True)
    tensors |= {"blocks.2.norm1.weight": torch.ones(32), "norm.weight": torch.ones(32)}
    tensors |= {"head.weight": torch.ones(10, 32), "head.bias": torch.ones(10)}
    torch.save(tensors, file)
    again = systems.load(config.load(*tiny.write_yamls(tmp_path), []), "cpu", "tiny")
    pixels = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        same = torch.equal(again._model.encode_image(pixels), engine._model.encode_image(pixels))
    assert same


def test_a_decapoda_style_directory_gives_the_same_answer(made, engine, picture, tmp_path):
    shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
    vicuna = tmp_path / "vicuna-pico"
    for name in ("special_tokens_map.json", "generation_config.json"):
        (vicuna / name).unlink()
    (vicuna / "tokenizer_config.json").write_text(
        '{"bos_token": "", "eos_token": "", "tokenizer_class": "LLaMATokenizer", "unk_token": ""}'
    )
    raw = json.loads((vicuna / "config.json").read_text())
    raw |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}
    raw["max_sequence_length"] = raw.pop("max_position_embeddings")
    raw["architectures"] = ["LLaMAForCausalLM"]
    (vicuna / "config.json").write_text(json.dumps(raw))
    again = systems.load(config.load(*tiny.write_yamls(tmp_path), []), "cpu", "tiny")
    expected = "".join(pieces(engine, about(picture, QUESTION), GREEDY))
    assert "".join(pieces(again, about(picture, QUESTION), GREEDY)) == expected


def test_the_context_is_the_embedded_words_with_the_picture_inside(made, engine, picture):
    tokenizer, embed = engine._tokenizer, engine._model.llama.model.embed_tokens
    before, after = (tokenizer.encode(s.text) for s in segments(about(picture, QUESTION).turns))
    parts, pictures = engine._context(about(picture, QUESTION), 10)
    context = engine._embedded(parts, pictures)
    assert context.shape[1] == 1 + len(before) + 5 + len(after)
    start = 1 + len(before)
    assert torch.equal(context[0, :start], embed(torch.tensor([1, *before])))
    assert torch.equal(context[0, start + 5 :], embed(torch.tensor(after)))
    with torch.inference_mode():
        seen = engine._model.encode_image(preprocess(picture, 32))
    assert torch.equal(context[0, start : start + 5], seen[0])


def test_ten_thousand_words_in_one_question_are_refused(engine, picture):
    with pytest.raises(BadRequest, match="shorten the question"):
        list(engine.stream(about(picture, Turn("user", "words " * 10_000)), GREEDY))


def test_ten_thousand_words_of_history_lose_their_beginning_and_are_answered(engine, picture):
    turns = (
        Turn("user", "Hello?", (picture,)),
        Turn("assistant", "words " * 10_000),
        QUESTION,
    )
    given = list(engine.stream(Conversation(turns), GREEDY))
    assert given[0].prompt_tokens == 512 - 12
    assert given[-1].finish


def test_greedy_is_repeatable_and_a_seed_makes_sampling_so(engine, picture):
    def answer(**how):
        sampling = Sampling(max_new_tokens=20, **how)
        return "".join(pieces(engine, about(picture, QUESTION), sampling))

    assert answer(temperature=0) == answer(temperature=0)
    assert answer(temperature=1.0, seed=3) == answer(temperature=1.0, seed=3)
    assert len({answer(temperature=2.0, seed=seed) for seed in range(4)}) > 1


def test_beams_answer_in_one_piece(engine, picture):
    sampling = Sampling(temperature=0, num_beams=3, max_new_tokens=8)
    assert len(pieces(engine, about(picture, QUESTION), sampling)) <= 1


def test_generation_stops_at_the_separator(engine, picture):
    # The most likely next token becomes the separator, whatever was asked.
    separator = engine._tokenizer.separators[0]
    head = engine._model.llama.lm_head.weight
    kept = head.clone()
    try:
        with torch.inference_mode():
            head.zero_()
        hidden = []
        hook = engine._model.llama.lm_head.register_forward_pre_hook(
            lambda _, read: hidden.append(read[0])
        )
        one = Sampling(temperature=0, max_new_tokens=1)
        list(engine.stream(about(picture, QUESTION), one))
        with torch.inference_mode():
            head[separator[0]] = hidden[-1][-1]
        hidden.clear()
        assert "".join(pieces(engine, about(picture, QUESTION), GREEDY)) == ""
        assert len(hidden) == 1
    finally:
        hook.remove()
        with torch.inference_mode():
            head.copy_(kept)


@pytest.mark.parametrize("beams", [1, 2])
def test_closing_early_stops_the_generation(engine, picture, beams):
    steps = []
    hook = engine._model.llama.lm_head.register_forward_hook(lambda *_: steps.append(1))
    try:
        sampling = Sampling(temperature=0, num_beams=beams, max_new_tokens=400)
        stream = engine.stream(about(picture, QUESTION), sampling)
        assert next(stream).prompt_tokens > 0
        next(stream)
        stream.close()
        at_close = len(steps)
        assert at_close < 100
        assert "".join(pieces(engine, about(picture, QUESTION), GREEDY)) is not None
        assert len(steps) - at_close <= 12
    finally:
        hook.remove()


def test_a_question_without_a_picture_is_refused(engine):
    with pytest.raises(BadRequest, match="picture"):
        list(engine.stream(Conversation((QUESTION,)), GREEDY))


@pytest.mark.parametrize("tokens", [0, -1, 512, 10**9])
def test_an_impossible_number_of_new_tokens_is_refused(engine, picture, tokens):
    with pytest.raises(BadRequest, match="max_tokens"):
        list(engine.stream(about(picture, QUESTION), Sampling(max_new_tokens=tokens)))


def test_a_picture_is_squeezed_not_cropped_and_normalised():
    tall = Image.new("RGB", (50, 400), (255, 0, 0))
    tall.paste((0, 0, 255), (0, 200, 50, 400))
    pixels = preprocess(tall, 32)
    assert pixels.shape == (1, 3, 32, 32)
    red = [(c - m) / s for c, m, s in zip((1, 0, 0), MEAN, STD, strict=True)]
    blue = [(c - m) / s for c, m, s in zip((0, 0, 1), MEAN, STD, strict=True)]
    assert torch.allclose(pixels[0, :, 2, 2], torch.tensor(red), atol=1e-5)
    assert torch.allclose(pixels[0, :, 29, 29], torch.tensor(blue), atol=1e-5)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK", "1"])
def test_pictures_of_every_mode_are_read_as_rgb(mode):
    assert preprocess(Image.new(mode, (10, 10)), 32).shape == (1, 3, 32, 32)
