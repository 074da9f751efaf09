"""The words around a question, and what is left of an answer."""

import pytest
from modeldemo.engine import BadRequest, Turn
from modeldemo.minigpt4.answer import Answer
from modeldemo.minigpt4.conversation import around_image, clean, prompt
from modeldemo.minigpt4.tokenizer import Tokenizer
from modeldemo.pico.train import make_tokenizer

FIRST = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I "
    "provide it to you. Please answer my questions.###Human: <Img><ImageHere></Img> "
    "What is this?###Assistant:"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(make_tokenizer(640, seed=0))
    return Tokenizer(file)


def test_the_first_prompt_is_upstreams_to_the_letter():
    assert prompt([Turn("user", "What is this?")]) == FIRST


def test_a_second_question_follows_the_first_answer():
    turns = [Turn("user", "What is this?"), Turn("assistant", "A dog."), Turn("user", "Why?")]
    assert prompt(turns) == FIRST + " A dog.###Human: Why?###Assistant:"


def test_the_picture_stands_between_its_tags():
    before, after = around_image(FIRST)
    assert before.endswith("###Human: <Img>")
    assert after == "</Img> What is this?###Assistant:"


def test_a_placeholder_that_a_user_types_stays_text():
    before, after = around_image(prompt([Turn("user", "is <ImageHere> a word?")]))
    assert before.endswith("Human: <Img>")
    assert "is <ImageHere> a word?" in after


@pytest.mark.parametrize(
    "roles", [[], ["assistant"], ["user", "user"], ["user", "assistant"], ["assistant", "user"]]
)
def test_turns_that_do_not_alternate_are_refused_in_one_line(roles):
    with pytest.raises(BadRequest) as caught:
        prompt([Turn(role, "text") for role in roles])
    assert "\n" not in str(caught.value)
    assert "alternate" in str(caught.value)


def test_an_empty_question_is_refused():
    with pytest.raises(BadRequest, match="no text"):
        prompt([Turn("user", "  ")])


CASES = [
    ("The circle is red.###", "The circle is red."),
    (" The circle is red.### Human: more", "The circle is red."),
    ("Assistant: The circle is red.###", "The circle is red."),
    (" Assistant: Assistant: yes", "yes"),
    ("a # b ## c", "a # b ## c"),
    ("ends with #", "ends with #"),
    ("ends with Assist", "ends with Assist"),
    ("Assistant of the year###", "Assistant of the year"),
    ("###", ""),
    ("", ""),
    ("red.##", "red.##"),
    ("naïve 世界 🙂###", "naïve 世界 🙂"),
]


@pytest.mark.parametrize(("raw", "expected"), CASES)
def test_an_answer_is_cut_at_the_separator_and_loses_the_role(raw, expected):
    assert clean(raw) == expected


@pytest.mark.parametrize(("raw", "expected"), CASES)
@pytest.mark.parametrize("step", [1, 2, 5])
def test_pieces_joined_are_the_cleaned_answer(tokenizer, raw, expected, step):
    ids = tokenizer.encode(raw)
    answer = Answer(tokenizer)
    pieces = [answer.add(ids[i : i + step]) for i in range(0, len(ids), step)]
    pieces.append(answer.finish())
    assert "".join(pieces) == expected


@pytest.mark.parametrize(
    "raw",
    ["The circle is red.###Human: x", " Assistant: The one# and ##two###", "日本語 Assistant###"],
)
def test_no_piece_holds_part_of_a_separator_role_or_character(tokenizer, raw):
    answer = Answer(tokenizer)
    given = ""
    # Letter by letter: every token boundary there can be.
    for letter in raw:
        given += answer.add(tokenizer.encode_after("#", letter))
        assert clean(raw).startswith(given)
        assert "###" not in given
        assert "\ufffd" not in given
    assert given + answer.finish() == clean(raw)


def test_leading_control_tokens_are_dropped_in_upstreams_order(tokenizer):
    answer = Answer(tokenizer)
    piece = answer.add([0, 1, *tokenizer.encode("red. ")])
    assert piece + answer.finish() == "red."


def test_ids_past_the_vocabulary_have_no_text(tokenizer):
    ids = tokenizer.encode("red")
    assert tokenizer.decode([*ids, tokenizer.size, tokenizer.size + 7]) == "red"


def test_any_text_survives_the_tokenizer(tokenizer):
    text = "Ünïcode 世界 🙂 \t <s> </s> [INST] 0123 ###"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_typed_control_tokens_stay_text(tokenizer):
    assert tokenizer.bos not in tokenizer.encode("<s></s><unk>")
    assert tokenizer.eos not in tokenizer.encode("<s></s><unk>")


def test_the_separator_is_found_however_it_is_encoded(tokenizer):
    for text in ("###", "red.###", "\n###", " ###", "a b ###"):
        ids = tokenizer.encode(text)
        assert any(ids[-len(end) :] == end for end in tokenizer.separators)
