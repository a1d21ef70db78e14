"""Operations that end as a whole, whoever waits for them."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


class Operations:
    """Runs each operation in a task of its own, so that a caller who is cancelled, as when its
    client leaves, neither cuts one in half nor keeps a lock."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self, operation: Coroutine[Any, Any, T]) -> T:
        """Result or error of `operation`, which goes on if this call is cancelled."""
        task = asyncio.ensure_future(operation)
        # The loop itself keeps no strong reference to a task.
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Looked at: an error that nobody waits for any more is no warning of the loop.
            task.exception()


class Operates(Protocol):
    """What has methods that end as a whole."""

    operations: Operations


Owner = TypeVar("Owner", bound=Operates)


def as_a_whole(
    method: Callable[Concatenate[Owner, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Owner, P], Coroutine[Any, Any, T]]:
    """Have every call of a method run by `Operations.run` of its object."""

    @functools.wraps(method)
    async def run(self: Owner, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.operations.run(method(self, *args, **kwargs))

    return run
