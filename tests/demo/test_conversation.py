"""The words around a question, and what is left of an answer."""

import pytest
from modeldemo.engine import BadRequest, Turn
from modeldemo.minigpt4.answer import Answer
from modeldemo.minigpt4.context import Picture, layout
from modeldemo.minigpt4.conversation import clean, segments
from modeldemo.minigpt4.tokenizer import Tokenizer
from modeldemo.pico.train import make_tokenizer
from PIL import Image

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


PICTURE = Image.new("RGB", (4, 4))


def prompt(turns):
    """The text as upstream writes it, with its mark where a picture goes."""
    return "<ImageHere>".join(segment.text for segment in segments(turns))


def user(text, pictures=0):
    return Turn("user", text, (PICTURE,) * pictures)


def test_the_first_prompt_is_upstreams_to_the_letter():
    assert prompt([user("What is this?", 1)]) == FIRST


def test_a_second_question_follows_the_first_answer():
    turns = [user("What is this?", 1), Turn("assistant", "A dog."), user("Why?")]
    assert prompt(turns) == FIRST + " A dog.###Human: Why?###Assistant:"


def test_every_picture_stands_before_the_words_of_its_turn():
    turns = [user("What is this?", 1), Turn("assistant", "A dog."), user("And these?", 2)]
    tag = "<Img><ImageHere></Img> "
    assert prompt(turns) == f"{FIRST} A dog.###Human: {tag}{tag}And these?###Assistant:"


def test_a_placeholder_that_a_user_types_stays_text():
    before, after = (segment.text for segment in segments([user("is <ImageHere> a word?", 1)]))
    assert before.endswith("Human: <Img>")
    assert "is <ImageHere> a word?" in after


def laid_out(tokenizer, turns, room):
    """What is left of a conversation in so many positions, a picture as its number."""
    pictures = [Picture(n, 5) for n in range(sum(len(turn.images) for turn in turns))]
    parts = layout(segments(turns), pictures, tokenizer, room)
    flat = [m for part in parts for m in (part if isinstance(part, list) else [part])]
    length = sum(part.width if isinstance(part, Picture) else len(part) for part in parts)
    text = "".join(
        tokenizer.decode(part) if isinstance(part, list) else f"[{part.number}]" for part in parts
    )
    return flat, length, text


STORY = [
    user("First words.", 1),
    Turn("assistant", "One answer."),
    user("Second words.", 1),
    Turn("assistant", "Two answer."),
    user("The question?"),
]


def test_exactly_one_bos_begins_the_context_however_many_pictures_there_are(tokenizer):
    flat, _, _ = laid_out(tokenizer, STORY, 2000)
    assert flat[0] == tokenizer.bos
    assert flat.count(tokenizer.bos) == 1


def test_each_segment_is_tokenised_on_its_own_as_upstream_does(tokenizer):
    flat, length, _ = laid_out(tokenizer, STORY, 2000)
    one, two, three = (tokenizer.encode(segment.text) for segment in segments(STORY))
    assert flat == [tokenizer.bos, *one, Picture(0, 5), *two, Picture(1, 5), *three]
    assert length == 1 + len(one) + len(two) + len(three) + 10


def test_history_goes_oldest_first_and_only_as_much_as_has_to(tokenizer):
    _, whole, text = laid_out(tokenizer, STORY, 2000)
    previous = text
    for room in range(whole - 1, whole - 30, -1):
        _, length, text = laid_out(tokenizer, STORY, room)
        assert length == room
        assert len(text) <= len(previous)
        previous = text
    assert "First words" not in text
    assert text.startswith("Give the following image")
    assert text.endswith("Human: The question?###Assistant:")
    assert "[0]" in text
    assert "[1]" in text


def test_what_has_to_stay_and_does_not_fit_is_refused_with_the_numbers(tokenizer):
    _, least, _ = laid_out(tokenizer, [STORY[0]], 2000)
    assert laid_out(tokenizer, [STORY[0]], least)[1] == least
    with pytest.raises(BadRequest, match=f"take {least} tokens, {least - 1} are left"):
        laid_out(tokenizer, [STORY[0]], least - 1)


def refuses(tokenizer, turns, room):
    try:
        laid_out(tokenizer, turns, room)
    except BadRequest:
        return True
    return False


def test_the_last_questions_pictures_and_words_are_never_cut(tokenizer):
    turns = [*STORY[:4], user("Which of the two?", 1)]
    _, whole, _ = laid_out(tokenizer, turns, 2000)
    rooms = range(whole, 0, -1)
    refused = next(room for room in rooms if refuses(tokenizer, turns, room))
    smallest = laid_out(tokenizer, turns, refused + 1)[2]
    assert smallest.endswith("Human: <Img>[2]</Img> Which of the two?###Assistant:")
    assert "One answer" not in smallest


@pytest.mark.parametrize(
    "roles", [[], ["assistant"], ["user", "user"], ["user", "assistant"], ["assistant", "user"]]
)
def test_turns_that_do_not_alternate_are_refused_in_one_line(roles):
    with pytest.raises(BadRequest) as caught:
        segments([Turn(role, "text") for role in roles])
    assert "\n" not in str(caught.value)
    assert "alternate" in str(caught.value)


def test_an_empty_question_is_refused():
    with pytest.raises(BadRequest, match="no text"):
        segments([Turn("user", "  ")])


def test_a_question_that_follows_an_empty_answer_is_asked():
    (one,) = segments([Turn("user", "Which?"), Turn("assistant", ""), Turn("user", "And now?")])
    assert one.text.endswith("###Human: Which?###Assistant: ###Human: And now?###Assistant:")


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
