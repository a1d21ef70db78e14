"""Coroutines that run beside each other and end together."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from engine.errors import InvalidRequest

T = TypeVar("T")
OnError = Callable[[int, BaseException], BaseException]


async def awaited(function: Callable[..., Awaitable[T]], *args: Any, **named: Any) -> T:
    """What an async function of a program returns. Raises InvalidRequest (its name) for one that
    is not async."""
    found: Any = function(*args, **named)
    if not inspect.isawaitable(found):
        name = getattr(function, "__name__", "the program")
        raise InvalidRequest(
            f"{name} is no async function: it returned {type(found).__name__}", field=name
        )
    result: T = await found
    return result


async def together(
    coroutines: Sequence[Coroutine[Any, Any, T]], on_error: OnError = lambda _, error: error
) -> list[T]:
    """The results of all, in order. Where one raises, or the caller is cancelled, the others are
    cancelled, and this ends once all have; the first error in their order is raised, as what
    `on_error` makes of it and the place of its coroutine."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    if not tasks:
        return []
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    # Those that were cancelled beside an error were so by this function.
    for place, task in enumerate(tasks):
        if not task.cancelled() and (error := task.exception()) is not None:
            told = on_error(place, error)
            raise told from (None if told is error else error)
    for place, task in enumerate(tasks):
        if task.cancelled():
            raise on_error(place, asyncio.CancelledError("it cancelled itself"))
    return [task.result() for task in tasks]
