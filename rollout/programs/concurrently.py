"""Coroutines that run beside each other and end together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
OnError = Callable[[int, BaseException], BaseException]


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
    for place, task in enumerate(tasks):
        if not task.cancelled() and (error := task.exception()) is not None:
            told = on_error(place, error)
            raise told from (None if told is error else error)
    return [task.result() for task in tasks]
