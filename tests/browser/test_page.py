"""The page as a person meets it: Chromium, through `fleet tunnel`, on a lab host."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import fleets
import pytest
from fleets import ROOT, Fleet, Running
from modeldemo.pico import pictures
from pages import PATIENCE, Page
from selenium import webdriver


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
