"""The rollouts of a long run, whatever their texts are."""

from __future__ import annotations

from typing import Any

from tests.helpers.dashboard_source import MadeUpSource
from tests.helpers.page_server import serve_page

MOST_MS = 100.0
"""Processor time of one task of the page's thread: others may use the machine, too."""
HOSTILE = (
    '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script>\u0000\u001b[31m\u202eevil',
    "<b>bold</b>\u0007 \u200bzero\ufeff <iframe src=javascript:pwned=1></iframe>",
)


def test_ten_thousand_rollouts_are_browsed_without_a_stall(visit: Any) -> None:
    texts = ("Prompt " * 300, " ".join(f"word{i}" for i in range(900)))
    with serve_page(MadeUpSource(steps=2000, groups=1250, texts=texts)) as url:
        tab = visit(viewport={"width": 1280, "height": 900})

        def open_page() -> None:
            tab.page.goto(f"{url}/dashboard")
            tab.page.wait_for_selector("#list .row .reply")
            tab.until("document.querySelectorAll('.chart').length === 2")

        assert tab.longest_task_ms(open_page) < MOST_MS
        assert tab.page.inner_text("#count") == "10,000 rollouts"
        assert tab.longest_task_ms(lambda: browse(tab)) < MOST_MS
        assert tab.page.evaluate("document.querySelectorAll('#list .row').length") < 60


def browse(tab: Any) -> None:
    """Scroll far and near, sort, filter, and open groups."""
    page = tab.page
    page.focus("#list")
    page.mouse.move(200, 500)
    for to in (0.2, 0.9, 0.5, 1.0):
        page.evaluate(f"list.scrollTop = list.scrollHeight * {to}")
        tab.until("document.querySelectorAll('#list .reply').length > 10")
    for key in ("PageUp", "PageUp", "Home", "End", "Home"):
        page.keyboard.press(key)
    for _ in range(20):
        page.mouse.wheel(0, 400)
    page.select_option("[name=sort]", "reward")
    page.fill("[name=step]", "3")
    tab.until("document.getElementById('count').textContent === '32 rollouts'")
    tab.open_row(1)
    tab.until("document.querySelectorAll('.sample').length === 8")
    page.check("input[value=entropies]")
    page.fill("[name=step]", "")
    tab.until("document.getElementById('count').textContent === '10,000 rollouts'")


def test_hostile_texts_are_texts(visit: Any) -> None:
    with serve_page(MadeUpSource(groups=2, texts=HOSTILE)) as url:
        tab = visit()
        tab.page.goto(f"{url}/dashboard")
        tab.open_row(1)
        tab.until("document.querySelectorAll('.sample').length === 8")
        assert tab.page.evaluate("window.pwned") is None
        assert tab.page.locator("main :is(img, iframe, b b, script)").count() == 0
        shown = tab.page.inner_text("#group") + tab.page.inner_text("#list")
        for text in ("<img src=x onerror=", "<script>", "␀␛[31m", "⟨U+202E⟩evil", "␇", "⟨U+200B⟩"):
            assert text in shown, text
        assert not set(shown) & {"\u0000", "\u001b", "\u202e", "\u200b", "\ufeff"}
        assert tab.said == []
        assert all(request.url.startswith(f"{url}/") for request in tab.asked)


def test_a_huge_reply_is_cut_and_the_rest_comes_when_asked_for(visit: Any) -> None:
    huge = " ".join(["word"] * 60_000)
    with serve_page(MadeUpSource(groups=1, texts=("p" * 100_000, huge))) as url:
        tab = visit()
        tab.page.goto(f"{url}/dashboard")
        tab.open_row(0)
        tab.until("document.querySelectorAll('.sample').length === 8")
        sampled = "document.querySelectorAll('.sample.chosen .tokens span').length"
        tab.until(f"{sampled} === 200")
        tab.page.click(".sample.chosen .more")
        tab.until(f"{sampled} === 1200")
        assert "58,800 tokens left" in tab.page.inner_text(".sample.chosen .more")
        assert "96,000 characters left" in tab.page.inner_text(".prompt .more")
        tab.page.click(".prompt .more")
        assert "76,000 characters left" in tab.page.inner_text(".prompt .more")


def test_what_is_not_finite_is_named_and_left_out_of_lines(visit: Any) -> None:
    with serve_page(MadeUpSource(steps=8, groups=1)) as url:
        tab = visit()
        tab.page.goto(f"{url}/dashboard")
        tab.page.wait_for_selector(".chart canvas")
        assert "NaN" in tab.page.inner_text("[data-name=kl]")
        # Step 7, the last one, has no finite reward.
        label = tab.page.get_attribute(".chart canvas", "aria-label")
        assert label.startswith("Reward. mean –.")
        tab.open_row(3)
        assert "Infinity" in tab.page.inner_text(".sample.chosen .facts")
