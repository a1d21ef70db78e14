"""The live stream: readers catch up from their cursors, whatever they missed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from rollout.dashboard.figures import Live
from rollout.dashboard.live import LiveQuery, behind, live, look
from tests.helpers.dashboard_source import PAGE_ROWS, MadeUpSource


def steps(message: Live) -> list[float]:
    return message.series.x


async def take(stream: AsyncGenerator[Live, None], count: int) -> list[Live]:
    return [await asyncio.wait_for(anext(stream), 30) for _ in range(count)]


def test_rows_that_are_there_come_at_once_page_by_page() -> None:
    async def test() -> None:
        source = MadeUpSource(steps=2 * PAGE_ROWS + 10)
        # A period that would be noticed.
        stream = live(source, LiveQuery(), period_s=1000.0)
        found = [x for message in await take(stream, 3) for x in steps(message)]
        assert found == [float(step) for step in range(source.steps)]
        await stream.aclose()

    asyncio.run(test())


def test_only_what_is_new_follows() -> None:
    async def test() -> None:
        source = MadeUpSource(steps=3)
        stream = live(source, LiveQuery(), period_s=0.001)
        (first,) = await take(stream, 1)
        following = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.05)
        assert not following.done()
        source.steps = 5
        second = await following
        assert (steps(first), steps(second)) == ([0.0, 1.0, 2.0], [3.0, 4.0])
        assert (len(first.events.events), second.events.events) == (1, [])
        await stream.aclose()

    asyncio.run(test())


def test_a_reader_that_was_away_gets_what_it_missed_and_one_of_another_epoch_all() -> None:
    async def test() -> None:
        source = MadeUpSource(steps=3)
        query = behind(await look(source, LiveQuery()))
        source.steps = 6
        assert steps(await look(source, query)) == [3.0, 4.0, 5.0]
        source.epoch = "another"
        assert len(steps(await look(source, query))) == 6

    asyncio.run(test())
