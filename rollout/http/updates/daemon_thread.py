"""Work on files that may never come back, such as on a network drive whose server is gone."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def in_daemon_thread(call: Callable[[], T], *, timeout_s: float) -> T:
    """Result or error of `call`, which runs in a thread of its own. Unlike one of
    `asyncio.to_thread`, the process does not wait for it at its end.

    Raises TimeoutError after `timeout_s`; the thread then ends when it can.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(set_it: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            loop.call_soon_threadsafe(lambda: None if future.done() else set_it())

    def main() -> None:
        try:
            result = call()
        except BaseException as error:
            failure = error
            settle(lambda: future.set_exception(failure))
        else:
            settle(lambda: future.set_result(result))

    threading.Thread(target=main, name="files", daemon=True).start()
    async with asyncio.timeout(timeout_s):
        return await future
