"""The page answers about an uploaded picture, explains bad ones and asks no other host."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from colors import Service, picture, shared
from gradio_client import Client, handle_file
from PIL import Image


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    service = shared()
    yield service
    assert "Traceback" not in service.stderr


def said(chat: list[dict[str, Any]]) -> list[str]:
    """The texts of a conversation, without its pictures."""
    parts = [message["content"][0] for message in chat]
    return [part["text"] for part in parts if part["type"] == "text"]


class Visitor:
    """A browser's session with the page, through the calls that the page itself makes."""

    def __init__(self, service: Service, path: str = "") -> None:
        self._client = Client(service.url + path, verbose=False)
        self.session = self._client.session_hash

    def look(self, data: bytes, folder: Path, name: str = "picture.png") -> dict[str, Any]:
        file = folder / name
        file.write_bytes(data)
        _, chat, note, question = self._client.predict(handle_file(file), api_name="/look")
        return {"chat": chat, "note": note, "question": question}

    def ask(self, question: str, beams: int = 1, temperature: float = 1.0) -> list[str]:
        """What the conversation shows in the end, message by message."""
        chat = self._client.predict(question, beams, temperature, api_name="/answer")[0]
        return said(chat)

    def asking(self, question: str) -> Any:
        return self._client.submit(question, 1, 1.0, api_name="/answer")

    def stop(self) -> None:
        self._client.predict(api_name="/stop")

    def restart(self) -> dict[str, Any]:
        shown, chat, note, question = self._client.predict(api_name="/restart")
        return {"picture": shown, "chat": chat, "note": note, "question": question}


@pytest.fixture
def visitor(service: Service) -> Visitor:
    return Visitor(service)


def test_a_picture_opens_the_question_and_the_answer_is_about_it(
    visitor: Visitor, tmp_path: Path
) -> None:
    seen = visitor.look(picture("green"), tmp_path)
    assert seen["note"] == ""
    assert seen["question"]["interactive"] is True
    assert visitor.ask("Which color?", beams=3, temperature=0) == [
        "Which color?",
        "It is mostly green after 1 turns.",
    ]


def test_the_conversation_goes_on_and_a_new_picture_starts_another(
    visitor: Visitor, tmp_path: Path
) -> None:
    visitor.look(picture("green"), tmp_path)
    visitor.ask("Which color?")
    assert visitor.ask("Sure?")[-1] == "It is mostly green after 3 turns."
    assert visitor.look(picture("blue"), tmp_path, "other.png")["chat"] == []
    assert visitor.ask("And this?") == ["And this?", "It is mostly blue after 1 turns."]


def test_the_answer_is_shown_as_it_grows(visitor: Visitor, tmp_path: Path) -> None:
    visitor.look(picture("red"), tmp_path)
    shown = [step[0][-1]["content"][0]["text"] for step in visitor.asking("slowly")]
    assert "It" in shown
    assert "It is mostly red" in shown
    assert shown[-1] == "It is mostly red after 1 turns."
    assert len(shown) > 5


def test_visitors_do_not_see_each_other(service: Service, tmp_path: Path) -> None:
    one, two = Visitor(service), Visitor(service)
    one.look(picture("red"), tmp_path, "one.png")
    two.look(picture("blue"), tmp_path, "two.png")
    assert one.ask("Which?")[-1] == "It is mostly red after 1 turns."
    assert two.ask("Which?")[-1] == "It is mostly blue after 1 turns."


def test_restart_clears_everything_and_stops_the_running_answer(
    service: Service, visitor: Visitor, tmp_path: Path
) -> None:
    cancelled = 'modeldemo_answers_total{outcome="cancelled"}'
    before, pieces = service.metric(cancelled), service.metric("modeldemo_completion_tokens_total")
    visitor.look(picture("red"), tmp_path)
    visitor.asking("slowly one after the other")
    service.wait_until(lambda: service.metric("modeldemo_completion_tokens_total") > pieces)
    cleared = visitor.restart()
    assert (cleared["picture"], cleared["chat"], cleared["note"]) == (None, [], "")
    assert cleared["question"]["interactive"] is False
    assert cleared["question"]["value"] == ""
    service.wait_until(lambda: service.metric(cancelled) == before + 1, seconds=3)
    visitor.look(picture("blue"), tmp_path)
    assert visitor.ask("Which?") == ["Which?", "It is mostly blue after 1 turns."]


def test_closing_the_page_stops_the_running_answer(
    service: Service, visitor: Visitor, tmp_path: Path
) -> None:
    cancelled = 'modeldemo_answers_total{outcome="cancelled"}'
    before, pieces = service.metric(cancelled), service.metric("modeldemo_completion_tokens_total")
    visitor.look(picture("red"), tmp_path)
    # A browser holds this connection as long as the page is open.
    open_page = f"/gradio_api/heartbeat/{visitor.session}"
    with service.client() as client, client.stream("GET", open_page):
        visitor.asking("slowly one after the other")
        service.wait_until(lambda: service.metric("modeldemo_completion_tokens_total") > pieces)
    service.wait_until(lambda: service.metric(cancelled) == before + 1, seconds=3)


def test_nothing_is_answered_without_a_picture(service: Service, visitor: Visitor) -> None:
    before = service.metric("modeldemo_completion_tokens_total")
    chat, _ = visitor.asking("Which color?").result()
    assert not isinstance(chat, list)  # the conversation stays as it is
    assert service.metric("modeldemo_completion_tokens_total") == before


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (picture()[:80], "The PNG file is damaged or cut off"),
        (b"nonsense", "The upload is not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "The upload is markup"),
        (b"", "The picture is empty"),
    ],
)
def test_a_bad_upload_is_explained_in_one_line(
    visitor: Visitor, tmp_path: Path, data: bytes, reason: str
) -> None:
    seen = visitor.look(data, tmp_path)
    assert seen["note"].startswith(reason)
    assert "\n" not in seen["note"]
    assert seen["question"]["interactive"] is False
    # and a good one after it is welcome
    assert visitor.look(picture("red"), tmp_path, "good.png")["note"] == ""
    assert visitor.ask("Which?")[-1] == "It is mostly red after 1 turns."


def test_pictures_from_phones_and_editors_are_read(visitor: Visitor, tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(file, "WEBP", lossless=True)
    visitor.look(file.getvalue(), tmp_path, "clear.webp")
    assert visitor.ask("Which?")[-1] == "It is mostly white after 1 turns."


def test_an_engine_error_gives_the_question_back(visitor: Visitor, tmp_path: Path) -> None:
    visitor.look(picture("red"), tmp_path)
    job = visitor.asking("fail, please")
    chat, question = job.result()
    assert chat == []
    assert question["value"] == "fail, please"
    assert question["interactive"] is True
    assert visitor.ask("Which?")[-1] == "It is mostly red after 1 turns."


def test_an_upload_over_the_limit_is_refused(service: Service) -> None:
    with service.client() as client:
        files = {"files": ("big.png", bytes(21 * 2**20))}
        assert client.post("/gradio_api/upload", files=files).status_code == 413


@pytest.mark.parametrize("path", ["http://example.org/a.png", "https://huggingface.co/a.png"])
def test_an_address_in_place_of_an_upload_is_not_fetched(service: Service, path: str) -> None:
    assert "fetches no addresses" in _call_look(service, path)


@pytest.mark.parametrize("path", ["/etc/passwd", "/proc/self/environ", "../../etc/passwd"])
def test_a_file_of_the_host_in_place_of_an_upload_is_not_read(service: Service, path: str) -> None:
    answer = _call_look(service, path)
    assert "root:" not in answer
    assert "error" in answer
    with service.client() as client:
        assert client.get(f"/gradio_api/file={path}").status_code in (403, 404)


def _call_look(service: Service, path: str) -> str:
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    with service.client() as client:
        event = client.post("/gradio_api/call/look", json={"data": [file]}).json()["event_id"]
        return client.get(f"/gradio_api/call/look/{event}").text


def test_the_page_names_no_other_host(service: Service) -> None:
    with service.client() as client:
        index = client.get("/")
        config = client.get("/config")
        style = client.get("/theme.css")
    assert index.status_code == 200
    own = httpx.URL(service.url)
    for body in (index.text, config.text, style.text):
        named = {httpx.URL(u).host for u in re.findall(r"https?://[\w.:-]+", body)}
        assert named <= {own.host, "localhost", "www.w3.org"}  # w3.org: the namespace of SVG
    assert not re.findall(r"""(?:src|href)=["']//""", index.text)


def _parts(service: Service, path: str) -> dict[str, dict[str, Any]]:
    """The properties of the page's parts, by their ids."""
    with service.client() as client:
        components = client.get(f"{path}/config").json()["components"]
    return {c["props"]["elem_id"]: c["props"] for c in components if c["props"].get("elem_id")}


@pytest.mark.parametrize("path", ["", "/zh"])
def test_the_page_has_its_stable_ids(service: Service, path: str) -> None:
    props = _parts(service, path)
    wanted = {"picture", "chat", "question", "send", "restart", "beams", "temperature"}
    assert wanted <= set(props)
    beams, heat = props["beams"], props["temperature"]
    assert (beams["minimum"], beams["maximum"], beams["value"]) == (1, 10, 1)
    assert (heat["minimum"], heat["maximum"], heat["value"], heat["step"]) == (0, 2, 1.0, 0.1)
    assert props["question"]["interactive"] is False


def test_each_page_speaks_one_language(service: Service) -> None:
    english, chinese = _parts(service, ""), _parts(service, "/zh")
    assert english["picture"]["label"] == "Picture"
    assert chinese["picture"]["label"] == "图片"
    words = "".join(str(props) for props in english.values()).replace("中文", "")
    assert not re.search("[\u4e00-\u9fff]", words)
    # The names of fields, ids and units stay; sentences do not.
    shown = [chinese[part][key] for part, key in (("send", "value"), ("question", "placeholder"))]
    assert not re.search("[A-Za-z]{2}", "".join(shown))


@pytest.mark.parametrize(
    ("path", "accepted", "tag"),
    [
        ("/", "", "en"),
        ("/", "zh-CN,zh;q=0.9,en;q=0.8", "zh-CN"),
        ("/", "en-GB,en;q=0.9,zh;q=0.8", "en"),
        ("/", "fr,zh;q=0.4,en;q=0.2", "zh-CN"),
        ("/", "zh;q=x, en;q=0", "en"),
        ("/?lang=en", "zh-CN", "en"),
        ("/?lang=zh", "en", "zh-CN"),
        ("/?lang=tlh", "zh", "zh-CN"),
        ("/zh/", "en", "zh-CN"),
        ("/zh/?lang=en", "zh", "en"),
    ],
)
def test_the_browser_or_the_switch_chooses_the_language(
    service: Service, path: str, accepted: str, tag: str
) -> None:
    with service.client(headers={"Accept-Language": accepted}) as client:
        page = client.get(path)
    assert page.status_code == 200
    assert f'<html lang="{tag}"' in " ".join(page.text.split())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (picture()[:80], "PNG 文件已损坏或不完整"),
        (b"nonsense", "上传的不是图片"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "上传的是 SVG 或 HTML"),
        (b"", "图片是空文件"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
    ],
)
def test_the_chinese_page_explains_in_chinese(
    service: Service, tmp_path: Path, data: bytes, reason: str
) -> None:
    seen = Visitor(service, "/zh").look(data, tmp_path)
    assert reason in seen["note"]
    assert "出错了" not in seen["note"]  # it is one of the lines that have a translation


def test_the_page_says_which_model_and_weights_answer(tmp_path: Path) -> None:
    service = Service("--weights", "colors-0123456789abcdef", MODELDEMO_REVISION="feedc0de")
    for path in ("", "/zh"):
        said = _parts(service, path)["served"]["value"]
        assert "colors-0123456789abcdef" in said
        assert "feedc0de" in said
    with service.client() as client:
        assert client.get("/healthz").json()["weights"] == "colors-0123456789abcdef"
        assert 'weights="colors-0123456789abcdef"' in client.get("/metrics").text
    service.stop()


@pytest.fixture(scope="module")
def several() -> Iterator[Service]:
    """A model that looks at several pictures, with every control there is."""
    names = [
        *("temperature", "top_p", "top_k", "num_beams"),
        *("max_new_tokens", "repetition_penalty", "seed"),
    ]
    page = {"pictures": "several", "system_prompt": True, "controls": names}
    service = Service("--page", json.dumps(page))
    yield service
    assert "Traceback" not in service.stderr
    service.stop()


def test_a_conversation_takes_several_pictures(several: Service, tmp_path: Path) -> None:
    client = Client(several.url, verbose=False)

    def look(color: str) -> Any:
        file = tmp_path / f"{color}.png"
        file.write_bytes(picture(color))
        return client.predict(handle_file(file), api_name="/look")

    def ask(question: str) -> list[dict[str, Any]]:
        values = ("be brief", 1.0, 0.9, 50, 1, 300, 1.0, None)
        return list(client.predict(question, *values, api_name="/answer")[0])

    look("red")
    assert said(ask("compare them")) == ["compare them", "They are red"]
    look("blue")
    chat = ask("compare them")
    assert said(chat)[-1] == "They are red blue"
    kinds = [message["content"][0]["type"] for message in chat]
    assert kinds == ["file", "text", "text", "file", "text", "text"]  # each where it was sent
    assert said(ask("compare again"))[-1] == "They are red blue"
    assert said(ask("the system prompt"))[-1] == "be brief"
    assert several.metric("modeldemo_pictures_encoded_total") == 5  # one by the proof at the start
    assert several.metric("modeldemo_pictures_reused_total") == 3


def test_a_picture_that_comes_during_an_answer_goes_with_the_next_question(
    several: Service, tmp_path: Path
) -> None:
    client = Client(several.url, verbose=False)

    def look(color: str) -> Any:
        file = tmp_path / f"{color}.png"
        file.write_bytes(picture(color))
        return client.predict(handle_file(file), api_name="/look")[-1]

    def asking(question: str) -> Any:
        values = ("", 1.0, 0.9, 50, 1, 30, 1.0, None)
        return client.submit(question, *values, api_name="/answer")

    made = "modeldemo_completion_tokens_total"
    assert look("red")["interactive"]
    before = several.metric(made)
    running = asking("slowly one after the other")
    several.wait_until(lambda: several.metric(made) > before)
    assert "interactive" not in look("blue")  # the question is closed until the answer ends
    second, _ = asking("And this?").result()
    assert not isinstance(second, list)  # nor is it asked, and the conversation stays as it is
    assert running.result()[1]["interactive"]
    assert said(asking("compare them").result()[0])[-1] == "They are red blue"


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(
    service: Service, visitor: Visitor, tmp_path: Path
) -> None:
    cancelled = 'modeldemo_answers_total{outcome="cancelled"}'
    before, made = service.metric(cancelled), service.metric("modeldemo_completion_tokens_total")
    visitor.look(picture("red"), tmp_path)
    running = visitor.asking("slowly one after the other")
    service.wait_until(lambda: service.metric("modeldemo_completion_tokens_total") > made + 2)
    visitor.stop()
    chat, question = running.result()
    assert said(chat)[-1].startswith("blue green red")
    assert len(said(chat)[-1].split()) < 100
    assert question["interactive"]
    service.wait_until(lambda: service.metric(cancelled) == before + 1, seconds=3)
    assert visitor.ask("Which?")[-1] == "It is mostly red after 3 turns."


def test_an_emptied_conversation_begins_again_with_the_same_picture(
    several: Service, tmp_path: Path
) -> None:
    client = Client(several.url, verbose=False)
    file = tmp_path / "picture.png"
    file.write_bytes(picture("green"))
    client.predict(handle_file(file), api_name="/look")

    def ask() -> list[str]:
        values = ("", 1.0, 0.9, 50, 1, 30, 1.0, None)
        return said(client.predict("Which?", *values, api_name="/answer")[0])

    assert ask()[-1] == "It is mostly green after 1 turns."
    shown, question = client.predict(api_name="/forget")
    assert (shown, question["interactive"]) == ([], True)
    assert ask() == ["Which?", "It is mostly green after 1 turns."]


def test_every_control_that_the_model_names_is_on_its_page(several: Service) -> None:
    parts = _parts(several, "")
    shown = [part for part in parts if part in {"beams", *several_controls()}]
    assert shown == [*several_controls()[:3], "beams", *several_controls()[3:]]
    assert "system" in parts


def several_controls() -> list[str]:
    return ["temperature", "top_p", "top_k", "max_new_tokens", "repetition_penalty", "seed"]


def test_labels_become_bars(tmp_path: Path) -> None:
    service = Service("--page", json.dumps({"kind": "labels", "controls": []}))
    client = Client(service.url, verbose=False)
    file = tmp_path / "picture.png"
    file.write_bytes(picture("green"))
    client.predict(handle_file(file), api_name="/look")
    shown = client.predict("red\ngreen\n<b>x</b>", api_name="/compare")
    assert re.findall("<li><span>(.*?)</span>", shown) == ["green", "red", "&lt;b&gt;x&lt;/b&gt;"]
    assert re.findall(r"width: ([\d.]+)%", shown) == ["100.00", "0.00", "0.00"]
    assert "Traceback" not in service.stderr
    service.stop()


def test_analytics_and_footer_links_are_off(service: Service) -> None:
    with service.client() as client:
        config = client.get("/config").json()
    assert config["analytics_enabled"] is False
    assert config["footer_links"] == []
