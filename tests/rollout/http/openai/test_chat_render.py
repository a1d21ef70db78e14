"""Conversations become text where they delay nobody, and a caller that leaves ends its job."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from engine.errors import ContextTooLong, InvalidRequest
from rollout.http.openai.chat_render import ChatRenderer
from tests.helpers.http_app import run
from tests.helpers.tiny_tokenizer import tiny_tokenizer

MESSAGES = [{"role": "user", "content": "ab"}]
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ECHO = "{{ messages[0].content }}"


@pytest.fixture
def renderer() -> Iterator[ChatRenderer]:
    # A job that nobody ends would outlast the test.
    made = ChatRenderer(tiny_tokenizer(), trusted=True, limit_s=600.0)
    yield made
    made.close()


async def render(renderer: ChatRenderer, source: str | None = None, **options: Any) -> str:
    options = {"num_bytes": 100, "max_chars": 1000, **options}
    return await renderer.render(options.pop("messages", MESSAGES), {}, source=source, **options)


def test_the_process_writes_what_is_written_here(renderer: ChatRenderer) -> None:
    async def test() -> None:
        here = await render(renderer)
        assert await render(renderer, num_bytes=1 << 20) == here
        assert await render(renderer, tiny_tokenizer().chat_template) == here
        assert "ab" in here

    run(test)


def test_output_has_a_limit_in_either_place(renderer: ChatRenderer) -> None:
    async def test() -> None:
        long = [{"role": "user", "content": "x" * 2000}]
        for num_bytes in (100, 1 << 20):
            with pytest.raises(ContextTooLong, match="1000 characters"):
                await render(renderer, messages=long, num_bytes=num_bytes)

    run(test)


def test_a_caller_that_leaves_ends_its_job(renderer: ChatRenderer) -> None:
    async def test() -> None:
        # Before it has begun, while its process starts, and while it runs.
        for wait_s in (0.0, 0.05, 1.0):
            running, queued = (asyncio.create_task(render(renderer, ENDLESS)) for _ in range(2))
            await asyncio.sleep(wait_s)
            queued.cancel()
            running.cancel()
            await asyncio.gather(running, queued, return_exceptions=True)
            assert await render(renderer, ECHO) == "ab"

    run(test)


def test_an_endless_template_delays_no_conversation_by_the_models_own(
    renderer: ChatRenderer,
) -> None:
    async def test() -> None:
        endless = asyncio.create_task(render(renderer, ENDLESS))
        await asyncio.sleep(0.2)
        assert "ab" in await render(renderer, num_bytes=1 << 20)
        assert not endless.done()
        endless.cancel()
        await asyncio.gather(endless, return_exceptions=True)

    run(test)


def test_a_job_that_misses_its_time_is_ended() -> None:
    renderer = ChatRenderer(tiny_tokenizer(), trusted=True, limit_s=1.0)

    async def test() -> None:
        with pytest.raises(InvalidRequest, match="longer than 1 s"):
            await render(renderer, ENDLESS)

    run(test)
    renderer.close()


def test_what_json_cannot_carry_is_refused(renderer: ChatRenderer) -> None:
    async def test() -> None:
        for value in (10**5000, {1, 2}):
            with pytest.raises(InvalidRequest, match="cannot be rendered"):
                await render(renderer, ECHO, messages=[{"role": "user", "content": value}])

    run(test)
