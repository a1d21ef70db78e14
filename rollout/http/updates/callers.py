"""Control calls that wait for a peer, and end when their caller leaves.

A trainer keeps the connection of a join or a receive open until the reply. One that closes it is
gone: nobody is going to send the tensors, and what its call holds is needed by the next.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request

from engine.errors import SlipstreamError
from engine.protocol import (
    Command,
    JoinGroup,
    LeaveGroup,
    ReceiveBroadcast,
    ReceiveExcerpts,
    Reply,
)
from rollout.http.updates.lifecycle import Lifecycle

logger = logging.getLogger(__name__)

T = TypeVar("T")


async def join(lifecycle: Lifecycle, command: JoinGroup, request: Request) -> Reply:
    """Form a group; the engine gives it up when the caller leaves."""

    async def leave() -> None:
        await lifecycle.send(LeaveGroup(name=command.name))

    return await _while_there(request, lifecycle.send(command), leave, f"group {command.name!r}")


async def received(
    lifecycle: Lifecycle,
    command: ReceiveBroadcast | ReceiveExcerpts,
    request: Request,
    work: Coroutine[Any, Any, T],
) -> T:
    """Result of `work`, which has the engine receive by `command`; when the caller leaves while
    it does, the update is aborted."""
    what = f"the receive from group {command.group!r}"
    return await _while_there(request, work, lambda: lifecycle.updates.abandon(command), what)


async def forward(lifecycle: Lifecycle, command: Command, request: Request) -> Reply:
    """Run a command of a caller that speaks the protocol itself."""
    match command:
        case JoinGroup():
            return await join(lifecycle, command, request)
        case ReceiveBroadcast() | ReceiveExcerpts():
            return await received(lifecycle, command, request, lifecycle.forward(command))
        case _:
            return await lifecycle.forward(command)


async def _while_there(
    request: Request,
    work: Coroutine[Any, Any, T],
    give_up: Callable[[], Awaitable[None]],
    what: str,
) -> T:
    """Result of `work`. Once the client has closed its connection, `give_up` has it end early;
    what it comes to is nobody's to read."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            logger.warning("%s is given up: its caller has left", what)
            try:
                await give_up()
            except SlipstreamError as error:
                logger.warning("%s: %s", what, error)
        return await task
    finally:
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
