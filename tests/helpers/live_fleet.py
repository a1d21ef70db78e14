"""A router and servers of the fake engine behind it, in a thread of this process, for callers that
wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from tests.helpers.live_servers import Live, live
from tests.helpers.routers import PATIENCE_S, Routed, routing

T = TypeVar("T")


@dataclass
class LiveFleet:
    """routed, servers: of the loop's thread; `wait` calls them there."""

    loop: asyncio.AbstractEventLoop
    routed: Routed
    servers: list[Live]

    @property
    def url(self) -> str:
        """The router's."""
        return self.routed.url

    def wait(self, work: Awaitable[T]) -> T:
        """What comes of `work` in the loop."""

        async def run() -> T:
            return await work

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(PATIENCE_S)


@contextmanager
def live_fleet(count: int, **options: Any) -> Iterator[LiveFleet]:
    """`count` servers, joined. options: of the router."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    stack = AsyncExitStack()

    async def start() -> LiveFleet:
        servers = [await stack.enter_async_context(live()) for _ in range(count)]
        routed = await stack.enter_async_context(routing(**options))
        headers = {"authorization": f"Bearer {options.get('admin_api_key', 'none')}"}
        for server in servers:
            await routed.http.post("/workers", json={"url": server.url}, headers=headers)
        await routed.until_ready(count)
        return LiveFleet(loop, routed, servers)

    try:
        yield asyncio.run_coroutine_threadsafe(start(), loop).result(PATIENCE_S)
    finally:
        asyncio.run_coroutine_threadsafe(stack.aclose(), loop).result(PATIENCE_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
