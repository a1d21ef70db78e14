"""Work on long texts beside the event loop: a few threads, and calls that can be given up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_NUM_THREADS = 2


class TextWorkers:
    """Threads that encode and decode long texts, which lets go of the interpreter.

    At most `num_threads` calls run at once; the others wait. A caller that is cancelled, because
    its client left, gives up its place; what runs already runs to its end, which the limit on
    texts bounds.
    """

    def __init__(self, num_threads: int = _NUM_THREADS) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="text")

    async def run(self, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """What `work` returns or raises."""
        return await asyncio.wrap_future(self._pool.submit(work, *args, **options))
