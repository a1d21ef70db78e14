"""The key, a connection that breaks, and a chat."""

from __future__ import annotations

from typing import Any

from tests.helpers.dashboard_source import MadeUpSource
from tests.helpers.page_server import serve_page
from tests.helpers.serve_process import ServerProcess, fake_server

KEY = "sesame-9271"


def test_the_page_asks_for_the_key_and_sends_it_in_a_header(visit: Any) -> None:
    with serve_page(MadeUpSource(groups=2), api_key=KEY) as url:
        tab = visit()
        page = tab.page
        page.goto(f"{url}/dashboard")
        page.wait_for_selector("dialog[open]")
        assert page.locator(".figure, .row .reply, .chart").count() == 0
        page.keyboard.press("Escape")
        assert page.locator("dialog[open]").count() == 1
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#wrong:not([hidden])")
        # No header can hold it.
        page.fill("#key", "\u2603")
        page.keyboard.press("Enter")
        tab.until("document.getElementById('key').value === ''")
        page.wait_for_selector("dialog[open]")
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#list .row .reply")
        tab.open_row(0)
        assert not any(KEY in request.url for request in tab.asked)
        page.reload()
        page.wait_for_selector("#list .row .reply")
        assert page.locator("dialog[open]").count() == 0
        assert KEY not in page.content()


def test_a_page_that_was_cut_off_catches_up(visit: Any) -> None:
    source = MadeUpSource(steps=20, groups=1)
    tab = visit()
    with serve_page(source) as url:
        tab.page.goto(f"{url}/dashboard")
        tab.until("document.querySelectorAll('#events li').length === 2")
    tab.until("document.getElementById('link').textContent === 'not connected'")
    grown = MadeUpSource(steps=41, groups=1)
    with serve_page(grown, port=int(url.rpartition(":")[2])):
        tab.until("document.getElementById('link').textContent === 'live'")
        tab.until("document.querySelectorAll('#events li').length === 5")
        tab.page.focus(".chart canvas")
        tab.page.keyboard.press("End")
        tab.page.keyboard.press("ArrowLeft")
        assert "step 39" in tab.page.inner_text("#spoken")
        assert tab.page.locator("#problem:not([hidden])").count() == 0
        asked = [request.url for request in tab.asked if "/live" in request.url]
        assert "series=20" in asked[-1]


def test_a_source_of_another_epoch_is_shown_from_its_begin(visit: Any) -> None:
    tab = visit()
    with serve_page(MadeUpSource(steps=40)) as url:
        tab.page.goto(f"{url}/dashboard")
        tab.until("document.querySelectorAll('#events li').length === 4")
    other = MadeUpSource(steps=5)
    other.epoch = "another"
    with serve_page(other, port=int(url.rpartition(":")[2])):
        tab.until("document.querySelectorAll('#events li').length === 1")


def test_a_chat_on_the_weights_that_serve(visit: Any) -> None:
    code = fake_server(server=f'api_key="{KEY}"').replace(
        "server.find_tokenizer = lambda model: None",
        "from tests.helpers.tiny_tokenizer import tiny_tokenizer\n"
        "server.find_tokenizer = lambda model: tiny_tokenizer()",
    )
    with ServerProcess(["-c", code]) as server:
        tab = visit(viewport={"width": 1280, "height": 900})
        page = tab.page
        page.goto(f"{server.url}/dashboard")
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#chat:not([hidden])")
        page.fill("#say textarea", "hello <b>you</b>")
        page.fill("#say [name=max_tokens]", "8")
        page.focus("#say textarea")
        page.keyboard.press("Enter")
        tab.until("document.querySelector('.assistant .who')?.textContent.includes('8 tokens')")
        assert page.inner_text(".turn.user .text") == "hello <b>you</b>"
        assert page.inner_text(".turn.assistant .text")
        page.fill("#say textarea", "too long " * 20_000)
        page.focus("#say textarea")
        page.keyboard.press("Enter")
        page.wait_for_selector(".turn.failed")
        assert "context" in page.inner_text(".turn.failed .text")
        assert not any(KEY in request.url for request in tab.asked)
        tab.picture("server")
