"""The HTTP interface speaks OpenAI's dialect and refuses bad input in one line."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from colors import COLORS, Service, data_url, picture, shared, user


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    service = shared()
    yield service
    assert "Traceback" not in service.stderr


JSON = {"Content-Type": "application/json"}


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def refusal(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return error["message"]


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.iter_lines() if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_health_names_model_revision_and_uptime(service: Service) -> None:
    with service.client() as client:
        body = client.get("/healthz").json()
    assert body["status"] == "ok"
    assert body["model"] == "colors"
    assert body["uptime_s"] > 0


def test_models_lists_the_one_model(service: Service) -> None:
    with service.client() as client:
        listed = client.get("/v1/models").json()
        one = client.get("/v1/models/colors").json()
    assert [model["id"] for model in listed["data"]] == ["colors"]
    assert one == listed["data"][0]


@pytest.mark.parametrize("color", ["red", "green", "blue"])
def test_the_answer_is_about_the_picture_that_was_sent(service: Service, color: str) -> None:
    assert f"mostly {color}" in text(service.ask(user("Which color?", picture(color))))


def test_the_last_picture_of_the_conversation_counts(service: Service) -> None:
    first, second = user("And this?", picture("red")), user("And this?", picture("blue"))
    reply = {"role": "assistant", "content": "Red."}
    answer = text(service.ask(first, reply, second, reply, user("Which color?")))
    assert answer == "It is mostly blue after 5 turns."


def test_plain_strings_are_content_too(service: Service) -> None:
    asked = {"role": "user", "content": "Which color?"}
    answer = text(
        service.ask(user("Look", picture()), {"role": "assistant", "content": "Yes"}, asked)
    )
    assert answer == "It is mostly red after 3 turns."


def test_system_messages_join_the_first_question(service: Service) -> None:
    system = {"role": "system", "content": "Please list one after the other."}
    answer = text(service.ask(system, user("Which?", picture()), max_tokens=2))
    assert answer == "blue green"


def test_neighbours_of_one_role_are_one_turn(service: Service) -> None:
    greeting = {"role": "assistant", "content": "Hello!"}
    answer = text(service.ask(greeting, user("", picture("green")), user("Which color?")))
    assert answer == "It is mostly green after 1 turns."


def test_streamed_pieces_join_to_the_same_answer(service: Service) -> None:
    question = user("Which color?", picture("blue"))
    whole = service.ask(question).json()
    chunks = events(service.ask(question, stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert len(deltas) > 5
    joined = "".join(delta.get("content", "") for delta in deltas)
    assert joined == whole["choices"][0]["message"]["content"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    made = len(joined.split())
    used = {"prompt_tokens": 2, "completion_tokens": made, "total_tokens": 2 + made}
    assert whole["usage"] == used


def test_a_stream_ends_with_its_usage_when_that_is_asked_for(service: Service) -> None:
    question = user("Which color?", picture("blue"))
    chunks = events(service.ask(question, stream=True, stream_options={"include_usage": True}))
    used = {"prompt_tokens": 2, "completion_tokens": 7, "total_tokens": 9}
    assert [chunk["usage"] for chunk in chunks] == [None] * (len(chunks) - 1) + [used]
    assert chunks[-1]["choices"] == []
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"


def test_an_answer_ends_where_its_tokens_do_or_where_the_model_ends_it(service: Service) -> None:
    reasons = [
        service.ask(user("one after the other", picture()), max_tokens=n).json()["choices"][0]
        for n in (3, 4)
    ]
    assert [reason["finish_reason"] for reason in reasons] == ["length", "length"]
    whole = service.ask(user("Which?", picture()), max_tokens=50).json()
    assert whole["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        ("mostly", "It is "),
        ([" red after", "turns"], "It is mostly"),
        (["is mos", "It is nothing"], "It "),
        ("purple", "It is mostly red after 1 turns."),
        ("", "It is mostly red after 1 turns."),
    ],
)
def test_an_answer_ends_before_a_stop_string(
    service: Service, stop: str | list[str], said: str
) -> None:
    question = user("Which?", picture())
    assert text(service.ask(question, stop=stop)) == said
    chunks = events(service.ask(question, stop=stop, stream=True))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == said
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_stop_string_stops_the_model(service: Service) -> None:
    question = user("slowly one after the other", picture())
    started = time.monotonic()
    answer = service.ask(question, stop="red").json()
    assert answer["choices"][0]["message"]["content"] == "blue green "
    assert answer["usage"]["completion_tokens"] == 3
    assert time.monotonic() - started < 5


def test_pieces_arrive_while_the_model_is_still_answering(service: Service) -> None:
    body = {"model": "colors", "messages": [user("slowly", picture())], "stream": True}
    with service.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as r:
        times = [time.monotonic() for line in r.iter_lines() if '"content"' in line]
    assert times[-1] - times[0] > 0.3


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_the_token_limit_reaches_the_engine(service: Service, limit: str) -> None:
    question = user("one after the other", picture())
    assert len(text(service.ask(question, **{limit: 7})).split()) == 7
    assert len(text(service.ask(question)).split()) == 300  # upstream's default


def test_every_sampling_parameter_is_accepted(service: Service) -> None:
    extremes: list[dict[str, Any]] = [
        {"temperature": 0, "top_p": 1, "seed": 0, "num_beams": 1},
        {"temperature": 2, "top_p": 0.01, "seed": -5, "num_beams": 10, "n": 1, "stop": None},
        {"temperature": None, "user": "x", "metadata": {}, "presence_penalty": 0},
        {"response_format": {"type": "text"}},
        {"top_p": 0, "top_k": 0, "repetition_penalty": 10},
    ]
    for options in extremes:
        assert "red" in text(service.ask(user("Which?", picture()), **options))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 10.1}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"num_beams": 11}, "num_beams"),
        ({"num_beams": 1.5}, "num_beams"),
        ({"n": 2}, "n: this server does not support it"),
        ({"stop": list("abcde")}, "stop: at most 4 strings"),
        ({"stop": 5}, "stop"),
        ({"top_k": -1}, "top_k"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"messages": [user("x", *[picture()] * 9)]}, "9 pictures, the limit is 8"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "answers as text, not as json_object"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "not as json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"stream": "yes"}, "stream"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the last one must be the user's"),
        ({"messages": [{"role": "system", "content": "x"}]}, "the last one must be the user's"),
        ({"messages": [user("  ", picture())]}, "no text; ask a question"),
        ({"messages": [user("Which color?")]}, "answers about a picture"),
        ({"model": None}, "model"),
    ],
)
def test_a_bad_parameter_is_refused_by_name(
    service: Service, options: dict[str, Any], names: str
) -> None:
    body = {"model": "colors", "messages": [user("Which?", picture())], **options}
    with service.client() as client:
        assert names in refusal(client.post("/v1/chat/completions", json=body), 400)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://example.org/cat.png", "fetches nothing"),
        ("data:image/png;base64,AAAA", "not a picture"),
        (data_url(picture()[:60]), "damaged or cut off"),
        ("data:image/png;base64,@", "base64"),
    ],
)
def test_a_bad_picture_is_refused_in_one_line(service: Service, url: str, reason: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    message = {"role": "user", "content": [part, {"type": "text", "text": "Which?"}]}
    assert reason in refusal(service.ask(message), 400)


def test_a_picture_over_the_limit_is_too_large(service: Service) -> None:
    assert "limit is 20 MiB" in refusal(service.ask(user("Which?", bytes(21 * 2**20))), 413)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": "colors"}', b"[" * 100_000,
     b'{"model":"colors","messages":[{"role":"user","content":"x"}],"temperature":NaN}',
     b'{"model":"colors","messages":[{"role":"user","content":"\\ud800"}]}'],
)  # fmt: skip
def test_a_body_that_is_no_request_is_refused(service: Service, body: bytes) -> None:
    with service.client() as client:
        refusal(client.post("/v1/chat/completions", content=body, headers=JSON), 400)


def test_unknown_models_and_routes_are_not_found(service: Service) -> None:
    with service.client() as client:
        body = {"model": "gpt-4o", "messages": [user("Hi", picture())]}
        response = client.post("/v1/chat/completions", json=body)
        assert "no model 'gpt-4o' here; this server has 'colors'" in refusal(response, 404)
        assert response.json()["error"]["code"] == "model_not_found"
        refusal(client.get("/v1/models/gpt-4o"), 404)
        refusal(client.get("/v1/embeddings"), 404)


READ = ("/healthz", "/metrics", "/v1/models", "/v1/models/colors")


@pytest.mark.parametrize("path", READ)
def test_what_can_be_read_answers_head_as_load_balancers_ask(service: Service, path: str) -> None:
    with service.client() as client:
        head, whole = client.head(path), client.get(path)
    assert head.status_code == 200
    assert head.headers["content-type"] == whole.headers["content-type"]
    assert head.content == b""


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("OPTIONS", "/v1/chat/completions", "POST"),
        *[("POST", path, "GET, HEAD") for path in READ],
        ("DELETE", "/v1/models/colors", "GET, HEAD"),
    ],
)
def test_another_method_is_refused_with_those_that_are_allowed(
    service: Service, method: str, path: str, allowed: str
) -> None:
    with service.client() as client:
        response = client.request(method, path)
    assert f"{path} does not answer {method}" in refusal(response, 405)
    assert response.headers["allow"] == allowed


@pytest.mark.parametrize(
    "kind", [None, "text/plain;charset=UTF-8", "application/x-www-form-urlencoded"]
)
def test_only_json_is_read_or_any_site_could_ask_with_a_browsers_password(
    service: Service, kind: str | None
) -> None:
    body = json.dumps({"model": "colors", "messages": [user("Which?", picture())]}).encode()
    with service.client() as client:
        headers = {"Content-Type": kind} if kind else {}
        response = client.post("/v1/chat/completions", content=body, headers=headers)
        assert "must be application/json" in refusal(response, 415)
        headers = {"Content-Type": "Application/JSON; charset=utf-8"}
        text(client.post("/v1/chat/completions", content=body, headers=headers))


def test_no_route_serves_documentation_from_elsewhere(service: Service) -> None:
    with service.client() as client:
        for path in ("/docs", "/redoc", "/openapi.json"):
            assert client.get(path).status_code == 404


def test_an_announced_body_over_the_limit_is_refused_unread(service: Service) -> None:
    with socket.create_connection(service.address) as sock:
        sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"
        )
        assert b"413" in sock.recv(100)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/gradio_api/queue/join"])
def test_a_chunked_body_is_cut_off_while_it_arrives(service: Service, path: str) -> None:
    sent = 0
    with socket.create_connection(service.address) as sock:
        sock.sendall(
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            "Transfer-Encoding: chunked\r\n\r\n".encode()
        )
        piece = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        try:
            for _ in range(200):
                sock.sendall(piece)
                sent += len(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the server hung up, as it should
        else:
            pytest.fail("the server read 200 MiB")
    assert sent < 64 * 2**20


def test_an_engine_error_is_one_line_and_the_next_question_is_answered(service: Service) -> None:
    for stream in (False, True):
        message = refusal(service.ask(user("fail", picture()), stream=stream), 500)
        assert message == "the model failed: RuntimeError: the color sensor broke"
    assert "red" in text(service.ask(user("Which?", picture())))


def test_two_clients_are_served_in_turn(service: Service) -> None:
    spans: list[tuple[float, float]] = []

    def ask() -> None:
        body = {"model": "colors", "messages": [user("slowly", picture())], "stream": True}
        with service.client() as c, c.stream("POST", "/v1/chat/completions", json=body) as r:
            words = [time.monotonic() for line in r.iter_lines() if '"content": "' in line]
        spans.append((words[1], words[-1]))  # the first chunk is the role

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (_, first_end), (second_start, _) = sorted(spans)
    assert first_end <= second_start


def test_the_loop_stays_free_while_the_model_answers(service: Service) -> None:
    thread = threading.Thread(target=service.ask, args=(user("slowly", picture()),))
    thread.start()
    with service.client() as client:
        while thread.is_alive():
            started = time.monotonic()
            assert client.get("/healthz").status_code == 200
            assert time.monotonic() - started < 0.5


def _endless(service: Service, stream: bool) -> socket.socket:
    """A connection on which a question of half a minute was just asked."""
    body = json.dumps(
        {
            "model": "colors",
            "messages": [user("slowly one after the other", picture())],
            "stream": stream,
        }
    ).encode()
    sock = socket.create_connection(service.address)
    sock.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    return sock


CANCELLED = 'modeldemo_answers_total{outcome="cancelled"}'


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_stops_its_answer(service: Service, stream: bool) -> None:
    before = service.metric(CANCELLED)
    pieces = service.metric("modeldemo_completion_tokens_total")
    sock = _endless(service, stream)
    service.wait_until(lambda: service.metric("modeldemo_completion_tokens_total") > pieces)
    sock.close()
    service.wait_until(lambda: service.metric(CANCELLED) == before + 1, seconds=2)


def test_a_full_queue_is_busy_and_hanging_up_makes_room(service: Service) -> None:
    sockets = [_endless(service, stream=True) for _ in range(9)]
    service.wait_until(lambda: service.metric("modeldemo_waiting") == 8)
    response = service.ask(user("Which?", picture()))
    assert "8 questions are waiting" in refusal(response, 503)
    assert int(response.headers["retry-after"]) >= 1
    for sock in sockets[1:]:
        sock.close()
    service.wait_until(lambda: service.metric("modeldemo_waiting") == 0)
    sockets[0].close()
    assert "red" in text(service.ask(user("Which?", picture())))


def test_metrics_count_requests_answers_and_memory(service: Service) -> None:
    route = 'modeldemo_requests_total{route="/v1/chat/completions",status="200"}'
    before = service.metric(route), service.metric("modeldemo_answer_seconds_count")
    service.ask(user("Which?", picture()))
    assert service.metric(route) == before[0] + 1
    assert service.metric("modeldemo_answer_seconds_count") == before[1] + 1
    assert service.metric("process_resident_memory_bytes") > 20 * 2**20
    assert service.metric("modeldemo_first_token_seconds_count") > 0
    assert service.metric("modeldemo_ready") == 1
    assert service.metric("modeldemo_pictures_encoded_total") > 0
    assert service.metric("modeldemo_pictures_reused_total") == 0
    with service.client() as client:
        for path in ("/a", "/b", "/v1/c"):
            client.get(path)
        body = client.get("/metrics").text
    assert 'modeldemo_info{model="colors"' in body
    assert 'route="/a"' not in body  # callers cannot grow the label set
    assert sorted(COLORS)[0] not in body  # nor does it tell what was asked
