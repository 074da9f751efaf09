"""The demo's page in a browser, by the ids of its parts."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import fleets
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
        return self._words("bot")

    @property
    def asked(self) -> list[str]:
        """The person's questions in the conversation."""
        return self._words("user")

    def _words(self, role: str) -> list[str]:
        """What the bubbles of one side say, read at once: the page replaces them as they grow."""
        return list(
            self.browser.execute_script(
                "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText.trim())",
                f"#chat [data-testid='{role}'] .message-content",
            )
        )

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
