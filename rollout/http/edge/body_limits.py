"""The body of one request on its way in: how large it may be, and how long it may take."""

from __future__ import annotations

import asyncio
import time

from starlette.types import Message, Receive

from engine.errors import SlipstreamError
from rollout.http.config import ServeConfig
from rollout.http.edge.browsers import Headers
from rollout.http.edge.departure import Departure
from rollout.http.edge.errors import BodyTooLarge

_BYTES_PER_S = 1 << 20
"""Slowest that a large body may come, beside the time every body has."""

_MAX_DIGITS = 18
_SMALL_BYTES = 1 << 20


class BodyTimeout(SlipstreamError):
    """The body did not arrive in time."""

    status = 408


class BodiesFull(SlipstreamError):
    """The server holds as many bytes of bodies as it may."""

    status = 503


class BodyBudget:
    """How many bytes of bodies a server holds at a time: of those that are on their way, and of
    large ones until their replies. A quarter is for small bodies alone, so that a few large ones
    that do not end keep no request out.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0

    def check(self, count: int, *, small: bool) -> None:
        """Raise BodiesFull unless `count` more bytes fit."""
        limit = self._limit if small else self._limit - self._limit // 4
        if self._held + count > limit:
            raise BodiesFull(
                f"{self._held} bytes of bodies are held and {count} more would not fit into "
                f"{limit}; try again later, or start the server with a larger "
                "--max-held-body-mib",
                field="body",
            )

    def take(self, count: int) -> None:
        """Hold `count` more bytes."""
        self._held += count

    def give_back(self, count: int) -> None:
        """Hold `count` fewer."""
        self._held -= count


class BodyReader:
    """The `receive` of one request. It raises BodyTooLarge, BodyTimeout or BodiesFull into the
    handler that reads the body; once that is complete, it waits for the client to leave, without
    a limit. departure: of the connection, if its server gives one.

    failed: the body was given up; what still comes of it must not be taken for a request.
    """

    def __init__(
        self,
        receive: Receive,
        config: ServeConfig,
        headers: Headers,
        budget: BodyBudget,
        *,
        control: bool,
        departure: Departure | None = None,
    ) -> None:
        self._receive = receive
        self._departure = departure
        self._budget = budget
        self._held = 0
        self._option = "--max-control-body-mib" if control else "--max-body-mib"
        self._limit = config.max_control_body_bytes if control else config.max_body_bytes
        self._announced = _announced(headers.get("content-length"))
        self._allowed_s = config.receive_timeout_s + self._announced / _BYTES_PER_S
        self._deadline = time.monotonic() + self._allowed_s
        self._num_bytes = 0
        self._complete = False
        self.failed = False

    def check_length(self) -> None:
        """Raise BodyTooLarge, or BodiesFull, by the announced length."""
        self.failed = True
        if self._announced > self._limit:
            raise self._too_large(self._announced)
        self._budget.check(self._announced, small=self._announced <= _SMALL_BYTES)
        self.failed = False

    def release(self) -> None:
        """The request has ended, or its body is small and complete: it counts no longer."""
        self._budget.give_back(self._held)
        self._held = 0

    async def __call__(self) -> Message:
        """The next message of the ASGI protocol."""
        if self._complete:
            return await self._receive()
        if self._departure is not None and self._departure.body_arrived:
            message = await self._receive()
        else:
            message = await self._received_in_time()
        self._complete = not message.get("more_body", False)
        self._count(len(message.get("body", b"")))
        return message

    async def _received_in_time(self) -> Message:
        left_s = self._deadline - time.monotonic()
        try:
            async with asyncio.timeout(max(left_s, 0.0)):
                return await self._receive()
        except TimeoutError as error:
            self.failed = True
            raise BodyTimeout(
                f"the body was not complete within {self._allowed_s:g} s; send it faster or start "
                "the server with a larger --receive-timeout-s",
                field="body",
            ) from error

    def _count(self, count: int) -> None:
        self._num_bytes += count
        small = self._num_bytes <= _SMALL_BYTES
        self.failed = True
        if self._num_bytes > self._limit:
            raise self._too_large(self._num_bytes)
        self._budget.check(count, small=small)
        self.failed = False
        if self._complete and small:
            self.release()
        else:
            self._budget.take(count)
            self._held += count

    def _too_large(self, found: int) -> BodyTooLarge:
        return BodyTooLarge(
            f"the body has {found} bytes or more, the limit is {self._limit}; send less at once "
            f"or start the server with a larger {self._option}",
            field="body",
        )


def _announced(length: str) -> int:
    """The announced length; 0 for none. What has too many digits is too long in any case."""
    if not (length.isascii() and length.isdigit()):
        return 0
    return int(length) if len(length) <= _MAX_DIGITS else 10**_MAX_DIGITS
