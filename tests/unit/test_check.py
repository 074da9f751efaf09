"""`fleet demo --check` against servers of known quality that speak the demo's API."""

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from gpufleet.demo import check
from gpufleet.errors import FleetError

Answering = Callable[[bytes, str], str | None]


@contextmanager
def serving(answer: Answering) -> Iterator[str]:
    """A server of the API that answers (png, question) by `answer`; None is an HTTP 503."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            """Keep the tests' output clean."""

        def reply(self, status: int, body: dict[str, object]) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def do_GET(self) -> None:
            self.reply(200, {"object": "list", "data": [{"id": "pico"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert (body["model"], body["temperature"]) == ("pico", 0)
            picture, text = body["messages"][0]["content"]
            head, _, data = picture["image_url"]["url"].partition(",")
            assert head == "data:image/png;base64"
            said = answer(base64.b64decode(data), text["text"])
            if said is None:
                self.reply(503, {"error": {"message": "the queue is full"}})
            else:
                message = {"role": "assistant", "content": said}
                self.reply(200, {"choices": [{"index": 0, "message": message}]})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def questions() -> list[check.Question]:
    return check.questions(40)


def knowing(questions: list[check.Question], wrong: int = 0) -> Answering:
    """Knows every answer but those of the first `wrong` questions."""
    answers = {(q.png, q.text): q.expected for q in questions[wrong:]}
    return lambda png, text: answers.get((png, text), "I do not know.")


def test_forty_questions_are_about_forty_pictures_and_every_kind(questions):
    assert len({question.png for question in questions}) == 40
    kinds = [question.kind for question in questions]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "color": 10,
        "shape": 10,
        "count": 10,
        "relation": 10,
    }
    assert Image.open(io.BytesIO(questions[0].png)).size == (224, 224)


def test_a_demo_that_knows_everything_passes(questions):
    with serving(knowing(questions)) as url:
        report = check.report(url, questions, "gpu1")
    assert report.accuracy == 1
    assert report.passed
    assert set(report.kinds.values()) == {(10, 10)}


@pytest.mark.parametrize(("wrong", "passes"), [(2, True), (3, False)])
def test_the_line_is_at_95_percent(questions, wrong, passes):
    with serving(knowing(questions, wrong)) as url:
        report = check.report(url, questions, "gpu1")
    assert report.accuracy == pytest.approx(1 - wrong / 40)
    assert report.passed is passes
    assert len(report.as_dict()["wrong"]) == wrong


def test_case_spaces_and_the_full_stop_do_not_count(questions):
    answer = knowing(questions)
    with serving(lambda png, text: f" {answer(png, text).upper().rstrip('.')} ") as url:
        assert check.report(url, questions, "gpu1").accuracy == 1


def test_too_few_pictures_are_no_proof(questions):
    with serving(knowing(questions)) as url:
        report = check.report(url, questions[:39], "gpu1")
    assert report.accuracy == 1
    assert not report.passed


def test_a_demo_that_refuses_is_wrong_and_says_why(questions):
    with serving(lambda png, text: None) as url:
        report = check.report(url, questions[:4], "gpu1")
    assert report.accuracy == 0
    assert report.answers[0].error == "HTTP 503: the queue is full"


def test_a_demo_that_is_not_there_is_one_line():
    with serving(lambda png, text: "") as url:
        pass
    with pytest.raises(FleetError, match=r"^gpu1: the demo does not say what it serves"):
        check.report(url, [], "gpu1")


def test_latency_is_the_median_and_the_95th_percentile(questions):
    answers = tuple(
        check.Answer(questions[0], "", False, seconds=float(number)) for number in range(1, 41)
    )
    assert check.Report("gpu1", answers).latency() == (20.5, 38.0)
