"""Callers who are too many, too slow or gone cost the others nothing, and the service stays up."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from colors import Service, picture, user
from test_images import bomb

LIMITS = {
    "waiting": 10,
    "seconds": 3,
    "connections": 120,
    "header_seconds": 2,
    "idle_seconds": 1,
    "body_seconds": 2,
    "unread_seconds": 2,
}
SLOW = user("slowly one after the other", picture())  # thirty seconds, were it let


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    service = Service("--limits", json.dumps(LIMITS))
    yield service
    assert "Traceback" not in service.stderr
    assert service.stop() == 0


@pytest.fixture(scope="module")
def crowded() -> Iterator[Service]:
    """A service with a queue of ten and its other limits as they are."""
    service = Service("--limits", json.dumps({"waiting": 10}))
    yield service
    assert service.ask(user("Which?", picture())).status_code == 200
    assert "Traceback" not in service.stderr
    assert service.stop() == 0


@pytest.fixture(autouse=True)
def answers_afterwards(service: Service) -> Iterator[None]:
    """Whatever happened, the next question is answered."""
    yield
    service.wait_until(lambda: service.metric("modeldemo_running") == 0, 10)
    answer = service.ask(user("Which?", picture("blue")))
    assert answer.json()["choices"][0]["message"]["content"] == "It is mostly blue after 1 turns."


def code(response: httpx.Response) -> str:
    return str(response.json()["error"]["code"])


def test_of_a_hundred_clients_at_once_eleven_are_answered_and_the_others_told(
    crowded: Service,
) -> None:
    question = user("slowly", picture())
    start = threading.Barrier(100)

    def ask(_: int) -> tuple[int, str]:
        start.wait()
        response = crowded.ask(question)
        if response.status_code == 503:
            assert int(response.headers["retry-after"]) >= 1
            return 503, code(response)
        return response.status_code, response.json()["choices"][0]["finish_reason"]

    before = crowded.metric("process_resident_memory_bytes")
    with ThreadPoolExecutor(100) as pool:
        outcomes = Counter(pool.map(ask, range(100)))
    # All of them may be in before the first is done; each that is done meanwhile makes room.
    assert set(outcomes) == {(200, "stop"), (503, "queue_full")}
    assert 11 <= outcomes[200, "stop"] <= 15
    assert crowded.metric("process_resident_memory_bytes") - before < 200 * 2**20


def test_large_requests_at_once_do_not_fill_the_memory(crowded: Service) -> None:
    # Each is refused for what it holds, once it was read: 20 MiB that are no picture.
    question = user("Which?", bytes(20 * 2**20 - 1))
    body = json.dumps({"model": "colors", "messages": [question]}).encode()
    before = crowded.metric("process_resident_memory_bytes")
    peaks = []

    def send(_: int) -> int:
        with crowded.client() as client:
            return client.post(
                "/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
            ).status_code

    with ThreadPoolExecutor(20) as pool:
        sending = [pool.submit(send, n) for n in range(20)]
        while not all(one.done() for one in sending):
            peaks.append(crowded.metric("process_resident_memory_bytes") - before)
        statuses = {one.result() for one in sending}
    assert statuses <= {400, 503}
    assert max(peaks) < 900 * 2**20


def test_an_answer_over_its_time_is_ended(service: Service) -> None:
    late = 'modeldemo_answers_total{outcome="late"}'
    before = service.metric(late)
    started = time.monotonic()
    response = service.ask(SLOW)
    assert 2 < time.monotonic() - started < 6
    assert (response.status_code, code(response)) == (504, "timeout")
    assert "longer than 3 seconds" in response.json()["error"]["message"]
    service.wait_until(lambda: service.metric(late) == before + 1, 2)


def test_a_stream_over_its_time_ends_with_the_reason(service: Service) -> None:
    response = service.ask(SLOW, stream=True)
    events = [line for line in response.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "timeout"
    assert len(events) > 10


def test_waiting_counts_as_time(service: Service) -> None:
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(service.ask, SLOW)
        service.wait_until(lambda: service.metric("modeldemo_running") == 1, 5)
        second = service.ask(SLOW)
        assert first.result().status_code == second.status_code == 504


def test_a_question_without_memory_for_it_is_refused(service: Service) -> None:
    for stream in (False, True):
        response = service.ask(user("too much", picture()), stream=stream)
        assert (response.status_code, code(response)) == (503, "out_of_memory")
        assert response.headers["retry-after"]
        message = response.json()["error"]["message"]
        assert message == "the GPU has no memory left for this question; use one beam"


def test_others_are_answered_while_one_client_never_reads_its_answer(service: Service) -> None:
    body = json.dumps({"model": "colors", "messages": [SLOW], "stream": True}).encode()
    sock = socket.create_connection(service.address)
    sock.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    service.wait_until(lambda: service.metric("modeldemo_running") == 1, 5)
    assert service.ask(user("Which?", picture())).status_code in (200, 504)
    sock.close()


def test_a_client_that_takes_nothing_is_hung_up_on(service: Service) -> None:
    # Forty megabytes are more than the system holds for a reader who does not come.
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.connect(service.address)
    sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 400)
    assert established(service, sock)
    service.wait_until(lambda: not established(service, sock), 20)
    sock.close()


def established(service: Service, sock: socket.socket) -> bool:
    """Whether the server's end of this connection is open, as Linux says."""
    ends = [f":{port:04X}" for port in (service.address[1], sock.getsockname()[1])]
    rows = [row.split()[1:4] for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(
        local.endswith(ends[0]) and remote.endswith(ends[1]) and state == "01"
        for local, remote, state in rows
    )


def received(sock: socket.socket, seconds: float = 10) -> bytes:
    """All that comes until the server hangs up."""
    sock.settimeout(seconds)
    data = b""
    try:
        while part := sock.recv(4096):
            data += part
    except ConnectionResetError:
        pass
    return data


@pytest.mark.parametrize("begun", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_a_header_that_does_not_end_is_hung_up_on(service: Service, begun: bytes) -> None:
    with socket.create_connection(service.address) as sock:
        sock.sendall(begun)
        started = time.monotonic()
        assert received(sock) == b""
        assert 1 < time.monotonic() - started < 6


def test_a_second_request_on_a_connection_has_the_same_time(service: Service) -> None:
    with socket.create_connection(service.address) as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.3)
        sock.sendall(b"GET /healthz HTT")
        started = time.monotonic()
        assert received(sock).count(b"HTTP/1.1 200") == 1
        assert time.monotonic() - started < 6


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/chat/completions", "application/json"),
        ("/gradio_api/upload", "multipart/form-data; boundary=x"),
    ],
)
def test_a_body_that_stops_half_way_is_refused(service: Service, path: str, kind: str) -> None:
    with socket.create_connection(service.address) as sock:
        sock.sendall(
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
            'Content-Length: 5000\r\n\r\n{"model": '.encode()
        )
        started = time.monotonic()
        # What reads uploads for gradio makes 400 of it.
        assert sock.recv(100).split()[1] in (b"408", b"400")
        assert time.monotonic() - started < 4


def test_a_body_that_trickles_is_refused_in_the_end(service: Service) -> None:
    with socket.create_connection(service.address) as sock:
        sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 5000\r\n\r\n"
        )
        started = time.monotonic()
        sock.settimeout(0.4)
        data = b""
        while not data and time.monotonic() - started < 10:
            sock.sendall(b" ")
            try:
                data = sock.recv(4096)
            except TimeoutError:
                continue
        assert b" 408 " in data.splitlines()[0]
        assert 1 < time.monotonic() - started < 6


def test_hanging_clients_do_not_keep_others_out(service: Service) -> None:
    hanging = []
    for _ in range(100):
        sock = socket.create_connection(service.address)
        sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 9\r\n\r\n{"
        )
        hanging.append(sock)
    assert service.ask(user("Which?", picture())).status_code == 200
    for sock in hanging:
        sock.close()


def test_connections_over_the_limit_are_told_so(service: Service) -> None:
    held = [socket.create_connection(service.address) for _ in range(125)]
    with service.client() as client:
        assert client.get("/healthz").status_code == 503
        for sock in held:
            sock.close()
        service.wait_until(lambda: client.get("/healthz").status_code == 200, 5)


def test_an_image_bomb_is_refused_and_costs_no_memory(service: Service) -> None:
    before = service.metric("process_resident_memory_bytes")
    for size in ((30_000, 30_000), (8001, 8000)):
        response = service.ask(user("Which?", bomb(*size)))
        assert (response.status_code, code(response)) == (413, "request_too_large")
    assert service.metric("process_resident_memory_bytes") - before < 50 * 2**20


def test_a_conversation_longer_than_any_model_reads_is_refused(service: Service) -> None:
    response = service.ask(user("word " * 50_000, picture()))
    assert (response.status_code, code(response)) == (400, "context_length_exceeded")
    assert "250000 characters" not in response.text  # the trailing blank was stripped
    assert "249999 characters of text, the limit is 200000" in response.text
