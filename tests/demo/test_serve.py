"""The process binds first, tells systemd, fails in one line and stops within five seconds."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from colors import DEMO, Service, picture, user


class Systemd:
    """The socket that a unit of Type=notify sends its messages to."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)
        self._sock.setblocking(False)
        self.heard: list[str] = []

    def hears(self, line: str) -> bool:
        while True:
            try:
                self.heard += self._sock.recv(4096).decode().splitlines()
            except BlockingIOError:
                return line in self.heard

    def close(self) -> None:
        self._sock.close()


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Systemd]:
    abstract = request.param == "abstract"
    listener = Systemd(f"@modeldemo-test-{os.getpid()}" if abstract else str(tmp_path / "notify"))
    yield listener
    listener.close()


def last_line(service: Service) -> str:
    assert "Traceback" not in service.stderr
    return service.stderr.splitlines()[-1]


def test_the_life_of_a_service_as_systemd_and_its_callers_see_it(systemd: Systemd) -> None:
    service = Service(
        "--load-seconds",
        "1",
        wait=False,
        NOTIFY_SOCKET=systemd.address,
        MODELDEMO_REVISION="2026-11-21",
    )
    # It listens while it loads, and says so.
    service.wait_until(lambda: "listening on" in service.stderr)
    with service.client() as client:
        loading = client.get("/healthz")
        assert (loading.status_code, loading.json()["status"]) == (503, "loading")
        assert not systemd.hears("READY=1")
        page = client.get("/")
        assert (page.status_code, "loading the model" in page.text) == (503, True)
        refused = service.ask(user("Which?", picture()))
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert client.get("/v1/models").status_code == 503
        assert service.metric("modeldemo_ready") == 0
    # It is ready only when it has answered.
    service.wait_until(lambda: systemd.hears("READY=1"))
    assert systemd.heard.index("STATUS=loading the model") < systemd.heard.index("READY=1")
    with service.client() as client:
        health = client.get("/healthz")
        assert (health.status_code, health.json()["revision"]) == (200, "2026-11-21")
    assert service.metric('modeldemo_answers_total{outcome="complete"}') == 1
    # SIGTERM lets the running answer end, refuses others, and exits with 0.
    answers: list[httpx.Response] = []
    thread = threading.Thread(
        target=lambda: answers.append(
            service.ask(user("slowly one after the other", picture()), max_tokens=15)
        )
    )
    thread.start()
    service.wait_until(lambda: service.metric("modeldemo_completion_tokens_total") > 8)
    service.process.send_signal(signal.SIGTERM)
    thread.join()
    assert len(answers[0].json()["choices"][0]["message"]["content"].split()) == 15
    assert service.exit_status() == 0
    assert systemd.hears("STOPPING=1")
    assert "Traceback" not in service.stderr


def test_an_answer_that_is_too_long_is_cut_off_within_five_seconds_of_sigterm() -> None:
    service = Service()
    question = user("slowly one after the other", picture())
    responses: list[httpx.Response] = []

    def ask() -> None:
        responses.append(service.ask(question))

    running, waiting = threading.Thread(target=ask), threading.Thread(target=ask)
    running.start()
    service.wait_until(lambda: service.metric("modeldemo_completion_tokens_total") > 8)
    waiting.start()
    service.wait_until(lambda: service.metric("modeldemo_waiting") == 1)
    started = time.monotonic()
    assert service.stop() == 0
    assert time.monotonic() - started < 6
    for thread in (running, waiting):
        thread.join()
    assert [response.status_code for response in responses] == [503, 503]
    assert "the service is stopping" in responses[0].text
    assert "Traceback" not in service.stderr


def test_a_service_whose_gpu_is_lost_says_so_and_ends_for_systemd_to_start_it_again() -> None:
    service = Service()
    refused = service.ask(user("lost", picture()))
    assert refused.status_code == 503
    assert "the GPU has failed (Xid 79)" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) > 0
    assert service.exit_status() == 1
    assert "modeldemo: the GPU has failed (Xid 79)" in service.stderr
    assert "Traceback" not in service.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_loading_stops_at_once(number: signal.Signals) -> None:
    service = Service("--load-seconds", "60", wait=False)
    service.wait_until(lambda: "listening on" in service.stderr)
    started = time.monotonic()
    service.process.send_signal(number)
    assert service.exit_status() == 0
    assert time.monotonic() - started < 6
    assert "Traceback" not in service.stderr


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("known", "modeldemo: /weights/x.pth: no such file; bring it with fleet weights push"),
        (
            "unknown",
            "modeldemo: the service cannot start: RuntimeError: CUDA driver is too old",
        ),
    ],
)
def test_a_model_that_does_not_load_is_one_line_and_exit_status_1(
    kind: str, line: str, tmp_path: Path
) -> None:
    systemd = Systemd(str(tmp_path / "notify"))
    service = Service("--load-error", kind, wait=False, NOTIFY_SOCKET=systemd.address)
    assert service.exit_status() == 1
    assert last_line(service) == line
    assert len(service.stderr.splitlines()) == 2
    assert systemd.hears(f"STATUS=failed: {line.removeprefix('modeldemo: ')}")
    assert "READY=1" not in systemd.heard
    systemd.close()


def test_a_port_in_use_is_one_line_that_says_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        service = Service("--port", str(port), wait=False)
        assert service.exit_status() == 1
    assert len(service.stderr.splitlines()) == 1
    assert f"127.0.0.1 port {port}: something listens there already" in service.stderr
    assert "choose another --port" in service.stderr


@pytest.mark.parametrize(
    ("host", "advice"),
    [("192.0.2.77", "choose another --host"), ("no.such.host.invalid", "give an address")],
)
def test_an_address_that_is_not_this_hosts_is_one_line(host: str, advice: str) -> None:
    service = Service("--host", host, wait=False)
    assert service.exit_status() == 1
    assert len(service.stderr.splitlines()) == 1
    assert advice in last_line(service)


def test_ipv6_addresses_are_served_too() -> None:
    service = Service("--host", "::1", "--load-seconds", "60", wait=False)
    service.wait_until(lambda: "listening on http://[::1]:" in service.stderr)
    with service.client() as client:
        assert client.get("/healthz").status_code == 503
    assert service.stop() == 0


def refuses(address: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address) != 0


def test_sigquit_lets_every_answer_end_however_long_and_nobody_else_in() -> None:
    service = Service()
    question = user("slowly one after the other", picture())
    responses: list[httpx.Response] = []

    def ask(words: int) -> None:
        responses.append(service.ask(question, max_tokens=words))

    asking = [threading.Thread(target=ask, args=(words,)) for words in (45, 5)]
    asking[0].start()  # longer than SIGTERM would let it
    service.wait_until(lambda: service.metric("modeldemo_completion_tokens_total") > 8)
    asking[1].start()
    service.wait_until(lambda: service.metric("modeldemo_waiting") == 1)
    address = service.address
    service.process.send_signal(signal.SIGQUIT)
    service.wait_until(lambda: refuses(address), 2)
    for thread in asking:
        thread.join()
    assert [response.status_code for response in responses] == [200, 200]
    assert service.exit_status(4) == 0
    assert "Traceback" not in service.stderr


def test_an_open_page_does_not_hold_back_the_end() -> None:
    service = Service()
    with service.client() as client, client.stream("GET", "/gradio_api/heartbeat/abc") as page:
        assert page.status_code == 200
        service.process.send_signal(signal.SIGQUIT)
        assert service.exit_status(8) == 0


def test_one_takes_a_port_over_from_another_and_no_question_fails() -> None:
    old = Service("--share-port", MODELDEMO_REVISION="old")
    port = str(old.address[1])
    new = Service(
        "--share-port", "--port", port, "--load-seconds", "2", wait=False, MODELDEMO_REVISION="new"
    )

    def who() -> str:
        with old.client() as client:
            health = client.get("/healthz")
        assert health.status_code == 200
        return str(health.json()["revision"])

    # While it loads, it takes no connection.
    new.wait_until(lambda: who() == "old" and "then listening on" in new.stderr)
    seen: list[str] = []
    new.wait_until(lambda: seen.append(who()) or "answers after" in new.stderr)
    assert seen[:10] == ["old"] * 10
    new.wait_until(lambda: {who() for _ in range(20)} == {"old", "new"})
    old.process.send_signal(signal.SIGQUIT)
    statuses: list[int] = []
    while old.process.poll() is None:
        statuses.append(new.ask(user("Which?", picture())).status_code)
    assert set(statuses) == {200}
    assert {who() for _ in range(10)} == {"new"}
    assert old.exit_status() == new.stop() == 0


def test_who_is_late_lets_nobody_in_while_it_loads() -> None:
    service = Service("--late", "--load-seconds", "1", wait=False)
    service.wait_until(lambda: "then listening on" in service.stderr)
    assert refuses(service.address)
    service.wait_until(lambda: not refuses(service.address))
    with service.client() as client:
        assert client.get("/healthz").status_code == 200
    assert service.stop() == 0


@pytest.mark.parametrize(
    ("number", "options"),
    [(signal.SIGQUIT, []), (signal.SIGQUIT, ["--late"]), (signal.SIGTERM, ["--late"])],
)
def test_who_has_answered_nobody_yet_stops_at_once(
    number: signal.Signals, options: list[str]
) -> None:
    service = Service("--load-seconds", "60", *options, wait=False)
    service.wait_until(lambda: "listening on" in service.stderr)
    service.process.send_signal(number)
    assert service.exit_status(6) == 0
    assert "Traceback" not in service.stderr


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "modeldemo", *arguments],
        env={**os.environ, "PYTHONPATH": str(DEMO)},
        capture_output=True,
        text=True,
        timeout=60,
    )


FILES = ("--model-config", "m.yaml", "--cfg-path", "e.yaml")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["serve"], "--model-config"),
        (["serve", *FILES, "--port", "70000"], "70000"),
        (["serve", *FILES, "--port", "http"], "http"),
        (["serve", *FILES, "--threads", "0"], "--threads"),
        (["serve", *FILES, "--max-seconds", "soon"], "--max-seconds"),
        (["serve", *FILES, "--device", "tpu"], "tpu"),
        (["serve", *FILES, "--examples", "/no/such/folder"], "/no/such/folder"),
        (["launch"], "launch"),
    ],
)
def test_wrong_usage_is_exit_status_2_and_names_the_option(
    arguments: list[str], names: str
) -> None:
    done = command(*arguments)
    assert done.returncode == 2
    assert names in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_configuration_is_one_line_and_exit_status_1(tmp_path: Path) -> None:
    files = ("--model-config", str(tmp_path / "m.yaml"), "--cfg-path", str(tmp_path / "e.yaml"))
    done = command("serve", *files, "--port", "0")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "m.yaml" in done.stderr.splitlines()[-1]


def test_starting_imports_nothing_heavy_before_the_port_is_bound() -> None:
    script = "import sys, modeldemo.serve; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(DEMO)},
        capture_output=True,
        text=True,
        check=True,
    )
    heavy = {"torch", "transformers", "gradio", "fastapi", "uvicorn", "numpy", "PIL"}
    assert not heavy & set(done.stdout.split())
