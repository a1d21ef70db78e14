"""Asking a service again, until it answers or the time is over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from recipes.rewards.base import Failed, FailureKind

T = TypeVar("T")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
_SHOWN_CHARS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """An answer after which it is worth to ask again; otherwise a `Failed` of this kind."""

    kind: FailureKind
    reason: str


def refusal(reply: httpx.Response, who: str) -> tuple[str, str]:
    """Kind and text of an error that a server, called `who`, answered with."""
    said: Any = None
    with suppress(ValueError):
        said = reply.json()
    error = said.get("error") if isinstance(said, dict) else None
    found = error if isinstance(error, dict) else {}
    message = found.get("message") or reply.text[:_SHOWN_CHARS]
    return str(found.get("type")), f"{who} answered {reply.status_code}: {message}"


async def until_deadline(
    ask: Callable[[], Awaitable[T | Failed | Retry]],
    timeout_s: float,
    *,
    most: int | None = None,
) -> T | Failed:
    """The first answer that is no `Retry`; pauses double. After `most` answers, or at the deadline,
    the last one is a failure."""
    last: Retry | None = None
    pause_s, num = FIRST_PAUSE_S, 0
    try:
        async with asyncio.timeout(timeout_s):
            while isinstance(found := await ask(), Retry):
                last, num = found, num + 1
                if num == most:
                    break
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                return found
    except TimeoutError:
        if last is None:
            return Failed(kind="timeout", reason=f"no answer in {timeout_s:g} s")
    assert last is not None
    return Failed(kind=last.kind, reason=f"{last.reason} ({num} times)")
