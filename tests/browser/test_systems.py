"""StarChat's page and CLIP's, with tiny models in their real formats that this machine serves."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import fleets
import pytest
from fleets import ROOT
from modeldemo.pico import pictures
from pages import PATIENCE, Page
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from gpufleet.cli.test import demo_python

USER, PASSWORD = "ada", "correct-horse"


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of the demo's own environment."""
    python = demo_python()
    if python is None:
        pytest.skip("no Python of the version that the demo's environment is locked for")
    return python


@pytest.fixture(scope="module")
def models(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of both tiny models."""
    folder = tmp_path_factory.mktemp("models")
    script = ROOT / "tests" / "demo" / "tiny_systems.py"
    subprocess.run([python, script, folder], check=True)
    return folder


def serve(python: Path, model: Path, arch: str, *options: str) -> Iterator[str]:
    """The address of a demo of the model, as the service runs it, until the test is over."""
    config = model / "demo.yaml"
    config.write_text(f"model:\n  arch: {arch}\n  path: {model}\n")
    command = [
        *(python, "-m", "modeldemo", "serve", "--cfg-path", config),
        *("--model-id", model.name, "--weights", f"{model.name}-0123456789abcdef"),
        *("--threads", "1", *options),
    ]
    yield from running(command, model / "log")


def running(command: Sequence[str | Path], log: Path) -> Iterator[str]:
    """The address of a demo that the command starts, until the test is over."""
    port = fleets.free_port()
    with log.open("w") as said:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=said,
            stderr=said,
            env={**os.environ, "PYTHONPATH": str(ROOT / "files" / "demo")},
        )
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        return fleets.listens(port) and fleets.get(f"{address}/healthz").status_code == 200

    try:
        fleets.until(answers, "the demo answers", PATIENCE * 4)
        yield address
    finally:
        process.terminate()
        process.wait(20)
    assert "Traceback" not in log.read_text()


@pytest.fixture
def slow(python: Path, tmp_path: Path) -> Iterator[str]:
    """A demo whose model takes a tenth of a second for a word."""
    script = ROOT / "tests" / "demo" / "colors.py"
    yield from running([python, script], tmp_path / "log")


@pytest.fixture(scope="module")
def starchat(python: Path, models: Path) -> Iterator[str]:
    secret = models / "auth"
    secret.write_text(f"{USER}:{PASSWORD}\n")
    secret.chmod(0o600)
    yield from serve(python, models / "starchat-tiny", "starchat", "--auth-file", str(secret))


@pytest.fixture(scope="module")
def clip(python: Path, models: Path) -> Iterator[str]:
    yield from serve(python, models / "clip-tiny", "clip")


def give_password(browser: webdriver.Chrome, address: str) -> None:
    """As a person does in the browser's own dialog, which a driver cannot reach."""
    browser.get(address.replace("://", f"://{USER}:{PASSWORD}@") + "/metrics")


def picture(folder: Path) -> Path:
    file = folder / "picture.png"
    file.write_bytes(fleets.png(pictures.held_out_examples(seed=29, count=1)[0]))
    return file


def choose(page: Page, part: str, value: str) -> None:
    """Give a slider's number field a value."""
    field = page.all(f"#{part} input[type=number]")[0]
    page.browser.execute_script(
        "arguments[0].value = arguments[1];"
        "for (const name of ['input', 'change', 'blur', 'pointerup'])"
        " arguments[0].dispatchEvent(new Event(name, {bubbles: true}));",
        field,
        value,
    )


def test_starchat_answers_a_person_who_gave_the_password(
    browser: webdriver.Chrome, starchat: str
) -> None:
    give_password(browser, starchat)
    page = Page(browser, starchat)
    assert page.all("#picture") == [] or not page.all("#picture")[0].is_displayed()
    page.all("#system textarea")[0].send_keys("You answer in one word.")
    choose(page, "max_new_tokens", "8")
    answer = page.ask("Write a function that adds two numbers.")
    assert answer
    assert "<|end|>" not in answer
    assert page.asked == ["Write a function that adds two numbers."]
    page.ask("And now one that multiplies them.")
    assert len(page.said) == 2
    assert "starchat-tiny-0123456789abcdef" in page.text("served")
    page.all("button#restart")[0].click()
    fleets.until(lambda: page.said == [], "the conversation is empty", PATIENCE)
    assert page.ready()  # no picture is needed for the next question
    assert page.requested() == {starchat}


def test_stop_keeps_what_was_said_and_the_conversation_goes_on(
    browser: webdriver.Chrome, slow: str, tmp_path: Path
) -> None:
    page = Page(browser, slow)
    stop = page.all("button#stop")[0]
    page.upload(picture(tmp_path))
    fleets.until(page.ready, "a question can be asked", PATIENCE)
    assert not stop.is_displayed()
    page.question.send_keys("slowly one after the other")  # half a minute long
    page.all("button#send")[0].click()
    fleets.until(lambda: stop.is_displayed() and page.said, "an answer comes", PATIENCE)
    stop.click()
    fleets.until(page.ready, "the next question can be asked", PATIENCE)
    assert not stop.is_displayed()
    (kept,) = page.said
    assert kept
    page.ask("What color is it?")
    assert page.said[0] == kept
    assert len(page.said) == 2
    assert 'outcome="cancelled"} 1.0' in fleets.get(f"{slow}/metrics").text


def test_without_the_password_there_is_no_page(starchat: str) -> None:
    refused = fleets.get(starchat)
    assert refused.status_code == 401
    assert "starchat" not in refused.text


def test_clip_compares_a_picture_with_labels(
    browser: webdriver.Chrome, clip: str, tmp_path: Path
) -> None:
    page = Page(browser, clip)
    assert not page.all("button#send")[0].is_enabled()
    page.upload(picture(tmp_path))
    fleets.until(page.ready, "labels can be compared", PATIENCE)
    page.question.send_keys("a red square\na blue circle\na <b>photo</b> of a cat")
    page.all("button#send")[0].click()
    bars = fleets.until(lambda: page.all("#shares li"), "the result is shown", PATIENCE)
    shares = [float(bar.find_element("css selector", "b").text.rstrip("%")) for bar in bars]
    assert sorted(shares, reverse=True) == shares
    assert sum(shares) == pytest.approx(100, abs=0.02)
    labels = {bar.find_element("css selector", "span").text for bar in bars}
    assert labels == {"a red square", "a blue circle", "a <b>photo</b> of a cat"}
    widths = [bar.find_element("css selector", "i").size["width"] for bar in bars]
    assert sorted(widths, reverse=True) == widths
    page.question.clear()
    page.question.send_keys("a red square")
    page.all("button#send")[0].click()
    fleets.until(lambda: len(page.all("#shares li")) == 1, "the result is replaced", PATIENCE)
    assert "%" not in page.all("#shares li")[0].text
    assert "nothing to be compared with" in page.text("shares")
    assert page.requested() == {clip}


def test_the_switch_changes_the_language_of_all_that_is_shown(
    browser: webdriver.Chrome, clip: str
) -> None:
    page = Page(browser, f"{clip}/?lang=zh")
    assert browser.execute_script("return document.documentElement.lang") == "zh-CN"
    assert page.text("send") == "比较"
    assert "拖放图片" in page.text("picture")
    assert "English" in page.text("language")
    page.all("#language a")[0].click()
    fleets.until(lambda: page.all("#send") and page.text("send") == "Compare", "English", PATIENCE)
    assert browser.execute_script("return document.documentElement.lang") == "en"
    shown = page.all("body")[0].text.replace("中文", "")
    assert not any("\u4e00" <= letter <= "\u9fff" for letter in shown)


def test_who_goes_by_keyboard_sees_where_they_are(browser: webdriver.Chrome, starchat: str) -> None:
    give_password(browser, starchat)
    Page(browser, starchat)
    passed = set()
    for _ in range(40):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        part, outline = browser.execute_script(
            "const e = document.activeElement;"
            "return [`${e.closest('[id]').id} ${e.type}`, getComputedStyle(e).outlineStyle]"
        )
        if part.startswith("send"):
            break
        assert outline != "none", part
        passed.add(part)
    assert {"question textarea", "system textarea", "temperature number"} <= passed
    assert any("range" in part for part in passed)


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("system", ["starchat", "clip"])
def test_nothing_sticks_out_of_a_phone_or_a_laptop(
    request: pytest.FixtureRequest, browser: webdriver.Chrome, system: str, width: int
) -> None:
    address = request.getfixturevalue(system)
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        give_password(browser, address)
        page = Page(browser, address)
        fleets.until(lambda: page.all("#send")[0].is_displayed(), "it is laid out", PATIENCE)
        wide = browser.execute_script("return document.scrollingElement.scrollWidth")
        assert wide <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
