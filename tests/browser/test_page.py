"""The page as a person meets it: Chromium, through `fleet tunnel`, on a lab host."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import fleets
import pytest
from fleets import ROOT, Fleet, Running
from modeldemo.pico import pictures
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

PATIENCE = 60


class Page:
    """The demo's page in a browser, by the ids of its parts."""

    def __init__(self, browser: webdriver.Chrome, address: str) -> None:
        self.browser = browser
        self.address = address
        browser.get(address)
        fleets.until(lambda: self.all("#question textarea"), "the page is built", PATIENCE)

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def text(self, part: str) -> str:
        """What a part shows."""
        return self.all(f"#{part}")[0].text

    @property
    def question(self) -> WebElement:
        return self.all("#question textarea")[0]

    @property
    def said(self) -> list[str]:
        """The demo's answers in the conversation."""
        return [bubble.text.strip() for bubble in self.all("#chat .bot.message")]

    @property
    def asked(self) -> list[str]:
        """The person's questions in the conversation."""
        return [bubble.text.strip() for bubble in self.all("#chat .user.message")]

    def upload(self, file: Path) -> None:
        """Give the picture's file input a file, as the file chooser does."""
        self.all("#picture input[type=file]")[0].send_keys(str(file))

    def ready(self) -> bool:
        """Whether a question can be asked now."""
        return self.question.is_enabled() and self.all("button#send")[0].is_enabled()

    def ask(self, question: str) -> str:
        """Type a question, send it, wait for the whole answer and return it."""
        before = len(self.asked)
        fleets.until(self.ready, "the question box is open", PATIENCE)
        self.question.send_keys(question)
        self.all("button#send")[0].click()
        fleets.until(lambda: len(self.asked) > before, "the question is shown", PATIENCE)
        # While an answer comes, no other question can be asked.
        fleets.until(self.ready, "the answer is whole", PATIENCE)
        return self.said[-1]

    def requested(self) -> set[str]:
        """Where the page has loaded anything from: scheme, host and port."""
        names = self.browser.execute_script(
            "return performance.getEntries().map(e => e.name).filter(n => n.includes('://'))"
        )
        return {"{0.scheme}://{0.netloc}".format(urlsplit(name)) for name in names}


@pytest.fixture(scope="module")
def address(deployed: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The demo's address on this machine, through the command that people use."""
    port = fleets.free_port()
    folder = tmp_path_factory.mktemp("tunnel")
    tunnel = Running(folder, "tunnel", deployed.hosts[0].name, "--local", str(port))
    try:
        fleets.until(lambda: fleets.listens(port), "the tunnel listens", PATIENCE)
        yield f"http://127.0.0.1:{port}"
    finally:
        tunnel.kill()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """Chromium without a window, in a profile of its own."""
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    for name, path in programs.items():
        if path is None:
            pytest.skip(f"no {name} on PATH; `./fleet test browser` installs it on Debian")
    options = webdriver.ChromeOptions()
    options.binary_location = str(programs["chromium"])
    for flag in (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
        *("hide-scrollbars", "window-size=1280,860", "lang=en"),
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(f"--{flag}")
    service = webdriver.ChromeService(str(programs["chromedriver"]))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: webdriver.Chrome, address: str) -> Page:
    """The page, just opened."""
    return Page(browser, address)


def _picture(folder: Path, example: pictures.Example) -> Path:
    file = folder / "picture.png"
    file.write_bytes(fleets.png(example))
    return file


def _examples() -> list[pictures.Example]:
    """One held-out picture for each kind of question."""
    return pictures.held_out_examples(seed=29, count=len(pictures.KINDS))


def test_a_person_uploads_asks_reads_the_answer_and_starts_again(
    page: Page, tmp_path: Path
) -> None:
    assert not page.question.is_enabled()
    assert not page.all("button#send")[0].is_enabled()
    example = next(e for e in _examples() if e.kind == "count")
    page.upload(_picture(tmp_path, example))
    answer = page.ask(example.question)
    assert pictures.is_right(answer, example.answer), f"{answer!r} is not {example.answer!r}"
    assert page.asked == [example.question]
    # A second question to the same picture goes on in the same conversation.
    page.ask(example.question)
    assert page.asked == [example.question] * 2
    assert len(page.said) == 2
    _save_screenshot(page)
    page.all("button#restart")[0].click()
    fleets.until(lambda: not page.question.is_enabled(), "the question box is closed", PATIENCE)
    assert page.asked == []
    assert page.said == []
    assert page.all("#picture img") == []
    assert page.requested() == {page.address}


@pytest.mark.parametrize("kind", pictures.KINDS)
def test_every_kind_of_question_is_answered(page: Page, tmp_path: Path, kind: str) -> None:
    example = next(e for e in _examples() if e.kind == kind)
    page.upload(_picture(tmp_path, example))
    answer = page.ask(example.question)
    assert pictures.is_right(answer, example.answer), f"{answer!r} is not {example.answer!r}"


BROKEN = {
    "cut off": lambda picture: picture[: len(picture) // 3],
    "not a picture": lambda picture: b"%PDF-1.7 an invoice",
    "empty": lambda picture: b"",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_upload_gets_a_clear_error_and_the_next_one_works(
    page: Page, tmp_path: Path, kind: str
) -> None:
    example = _examples()[0]
    whole = _picture(tmp_path, example)
    broken = tmp_path / "broken.png"
    broken.write_bytes(BROKEN[kind](whole.read_bytes()))
    page.upload(broken)
    said = fleets.until(lambda: page.text("note") or _toast(page), "an error is shown", PATIENCE)
    expected = {
        "cut off": "damaged or cut off",
        "not a picture": "is not a picture",
        "empty": "empty",
    }[kind]
    assert expected in said, said
    assert "Traceback" not in said
    assert not page.question.is_enabled()
    page.upload(whole)
    answer = page.ask(example.question)
    assert pictures.is_right(answer, example.answer)
    assert page.text("note") == ""
    assert page.requested() == {page.address}


def _toast(page: Page) -> str:
    """What the page's own alert says, if there is one."""
    return " ".join(toast.text for toast in page.all(".toast-body"))


def test_the_sliders_have_the_limits_that_the_model_takes(page: Page) -> None:
    limits = {
        part: tuple(
            float(page.all(f"#{part} input[type=range]")[0].get_attribute(name) or "nan")
            for name in ("min", "max", "value")
        )
        for part in ("beams", "temperature")
    }
    assert limits == {"beams": (1, 10, 1), "temperature": (0, 2, 1)}


def _save_screenshot(page: Page) -> None:
    """The README's picture, when it is asked for."""
    if os.environ.get("GPUFLEET_SCREENSHOT"):
        (ROOT / "docs").mkdir(exist_ok=True)
        page.browser.save_screenshot(str(ROOT / "docs" / "page.png"))
