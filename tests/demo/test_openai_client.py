"""OpenAI's own client works with this API as with theirs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from colors import Service, picture, user


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    file = tmp_path_factory.mktemp("secret") / "auth"
    file.write_text("ada:an api key")
    file.chmod(0o600)
    page = json.dumps({"pictures": "several", "system_prompt": True})
    service = Service("--auth-file", str(file), "--page", page)
    yield service
    assert "Traceback" not in service.stderr
    service.stop()


@pytest.fixture(scope="module")
def client(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="an api key", max_retries=0)


def chat(client: openai.OpenAI, *messages: Any, **options: Any) -> Any:
    return client.chat.completions.create(model="colors", messages=list(messages), **options)


def test_it_lists_the_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["colors"]
    assert client.models.retrieve("colors").object == "model"


def test_it_reads_an_answer_about_pictures_of_several_turns(client: openai.OpenAI) -> None:
    answer = chat(
        client,
        user("Look", picture("green")),
        {"role": "assistant", "content": "I do."},
        user("compare", picture("blue"), picture("red")),
    )
    assert answer.choices[0].message.content == "They are green blue red"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5


def test_it_reads_a_stream_and_its_usage(client: openai.OpenAI) -> None:
    stream = chat(
        client,
        user("one after the other", picture()),
        max_tokens=4,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"top_k": 5, "repetition_penalty": 1.1, "num_beams": 2},
    )
    chunks = list(stream)
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said == "blue green red white"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 4


def test_it_sends_system_messages(client: openai.OpenAI) -> None:
    system = {"role": "system", "content": "You are a poet."}
    assert chat(client, system, user("system?", picture())).choices[0].message.content == (
        "You are a poet."
    )


def test_its_errors_are_of_the_kinds_that_it_knows(service: Service, client: openai.OpenAI) -> None:
    question = user("Which?", picture())
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4o' here"):
        client.chat.completions.create(model="gpt-4o", messages=[question])
    with pytest.raises(openai.BadRequestError, match="num_beams"):
        chat(client, question, extra_body={"num_beams": 99})
    with pytest.raises(openai.InternalServerError, match="no memory left") as refused:
        chat(client, user("too much", picture()))
    assert refused.value.status_code == 503
    stranger = client.with_options(api_key="another key")
    with pytest.raises(openai.AuthenticationError):
        chat(stranger, question)


def test_it_reads_labels_as_json() -> None:
    service = Service("--page", json.dumps({"kind": "labels"}))
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)
    question, form = user("red\nblue", picture("blue")), {"type": "json_object"}
    answer = chat(client, question, response_format=form).choices[0].message.content
    assert json.loads(answer)["labels"] == [
        {"label": "blue", "probability": 1, "cosine": 1},
        {"label": "red", "probability": 0, "cosine": 0},
    ]
    stream = chat(client, question, response_format=form, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answer
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
    with pytest.raises(openai.BadRequestError, match="text or json_object, not as json_schema"):
        chat(client, question, response_format=schema)
    service.stop()


def test_an_error_within_a_stream_is_raised(tmp_path: Path) -> None:
    service = Service("--limits", json.dumps({"seconds": 1}))
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)
    said: list[str] = []
    stream = chat(client, user("slowly one after the other", picture()), stream=True)
    with pytest.raises(openai.APIError, match="longer than 1 seconds"):
        said.extend(chunk.choices[0].delta.content for chunk in stream)
    assert len(said) > 2
    service.stop()
