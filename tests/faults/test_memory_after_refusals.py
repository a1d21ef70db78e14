"""What is refused, cut short or aborted leaves nothing behind in server and engine."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter

import pytest

from engine.protocol import FlushCache
from tests.helpers.hostile_json import HOSTILE, with_value
from tests.helpers.http_app import Server, serving, until
from tests.helpers.route_bodies import RouteBody, route_bodies
from tests.helpers.shared_server import answered

pytestmark = pytest.mark.slow

# Routes that change nothing for long, so that a server can take them over and over.
STEADY = ("/generate", "/v1/completions", "/v1/chat/completions", "/abort_request")
ROUNDS = 3
# Objects that a round may leave without growth: caches of counters by label, pools of sockets.
SLACK = 100
# Timers that were cancelled leave an event loop's heap some time later.
PASSING = ("TimerHandle", "Context")


async def one_round(server: Server, routes: list[RouteBody], stride: int) -> None:
    """Some of all values in all fields, the same each time."""
    cases = [(route, path, text) for route in routes for path in route.paths for text in texts()]
    for route, path, text in cases[::stride]:
        content = with_value(route.body, path, text)
        await answered(server, route.method, route.path, content=content)
    leader = server.link.leader
    await until(lambda: not leader.can_step())
    # The tree keeps a bounded number of outdated entries of leaves it may evict.
    await server.engine.send(FlushCache())
    # What the helper notes for other tests.
    server.link.requests.clear()
    server.link.commands.clear()


def texts() -> list[str]:
    """Without those that take long to read or to generate."""
    return [text for text in HOSTILE.values() if len(text) < 6_000]


def living() -> Counter[str]:
    gc.collect()
    kinds = (type(found).__qualname__ for found in gc.get_objects())
    return Counter(kind for kind in kinds if kind not in PASSING)


@pytest.mark.parametrize("stride", [23, pytest.param(7, marks=pytest.mark.long)])
def test_refusals_leave_nothing_behind(stride: int) -> None:
    async def check() -> None:
        routes = [route for route in route_bodies() if route.path in STEADY]
        async with serving() as server:
            counts = []
            for _ in range(ROUNDS):
                await one_round(server, routes, stride)
                counts.append(living())
        grown = counts[-1] - counts[-2]
        assert sum(grown.values()) < SLACK, grown.most_common(10)

    asyncio.run(check())
