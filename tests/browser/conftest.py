"""The dashboard in the system's Chromium, without a window. `make browser-test` brings what drives
it; elsewhere these tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)


def _missing() -> str:
    """What these tests need and is not there."""
    if find_spec("playwright") is None:
        return "playwright is not installed: make browser-test"
    return "" if CHROMIUM else f"there is no Chromium: none of {', '.join(NAMES)} is in PATH"


class Skipped(pytest.Module):
    """A module that is not imported, since it could not be."""

    def collect(self) -> Iterator[pytest.Item]:
        """Nothing, with the reason."""
        pytest.skip(_missing(), allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> Skipped | None:
    """Skip the modules of this folder where something is missing."""
    return Skipped.from_parent(parent, path=module_path) if _missing() else None


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A Chromium."""
    from playwright.sync_api import sync_playwright

    # No sandbox: it cannot be had as root in a container.
    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Visit:
    """One tab. asked: the URLs of its requests; said: what its console and scripts complained of.

    pictures: a folder for screenshots, or "".
    """

    def __init__(self, browser: Any, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.asked: list[Any] = []
        self.said: list[str] = []
        self.page.set_default_timeout(60_000)
        self.page.on("request", lambda request: self.asked.append(request))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))

    def until(self, condition: str) -> None:
        """Wait for a condition in JavaScript, a minute at most. The page forbids what the driver's
        own waiting does, which is to evaluate text on the page's side."""
        deadline = time.monotonic() + 60
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, condition
            self.page.wait_for_timeout(20)

    def longest_task_ms(self, action: Callable[[], None]) -> float:
        """Processor time of the longest task of the page's thread while `action` runs."""
        browser = self.context.browser
        browser.start_tracing(page=self.page, categories=["disabled-by-default-devtools.timeline"])
        action()
        self.page.wait_for_timeout(300)
        events = json.loads(browser.stop_tracing())["traceEvents"]
        pages = {
            (event["pid"], event["tid"])
            for event in events
            if event.get("name") == "thread_name" and event["args"]["name"] == "CrRendererMain"
        }
        times = [
            event["tdur"] / 1000
            for event in events
            if event.get("name") == "RunTask" and (event["pid"], event["tid"]) in pages
            if "tdur" in event
        ]
        assert len(times) > 20, "the trace has no tasks"
        return max(times)

    def picture(self, name: str) -> None:
        """Keep a screenshot of the whole page in $SCREENSHOTS, where that is set."""
        if folder := os.environ.get("SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=str(Path(folder, f"{name}.png")), full_page=True)

    def open_row(self, number: int) -> None:
        """Choose a rollout, and wait for its group."""
        self.page.click(f"#row-{number} .reply")
        self.page.wait_for_selector(".sample")


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Makes tabs, which end with the test."""
    made: list[Visit] = []

    def new(**options: Any) -> Visit:
        made.append(Visit(browser, **options))
        return made[-1]

    yield new
    for tab in made:
        tab.context.close()
