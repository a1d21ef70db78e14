"""The body of one request on its way in: how large it may be, and how long it may take."""

from __future__ import annotations

import asyncio
import time

from starlette.types import Message, Receive

from engine.errors import SlipstreamError
from rollout.http.browsers import Headers
from rollout.http.config import ServeConfig
from rollout.http.errors import BodyTooLarge

_BYTES_PER_S = 1 << 20
"""Slowest that a large body may come, beside the time every body has."""

_MAX_DIGITS = 18


class BodyTimeout(SlipstreamError):
    """The body did not arrive in time."""

    status = 408


class BodyReader:
    """The `receive` of one request. It raises BodyTooLarge or BodyTimeout into the handler that
    reads the body; once that is complete, it waits for the client to leave, without a limit.

    failed: the body was given up; what still comes of it must not be taken for a request.
    """

    def __init__(
        self, receive: Receive, config: ServeConfig, headers: Headers, *, control: bool
    ) -> None:
        self._receive = receive
        self._option = "--max-control-body-mib" if control else "--max-body-mib"
        self._limit = config.max_control_body_bytes if control else config.max_body_bytes
        self._announced = _announced(headers.get("content-length"))
        self._allowed_s = config.receive_timeout_s + self._announced / _BYTES_PER_S
        self._deadline = time.monotonic() + self._allowed_s
        self._num_bytes = 0
        self._complete = False
        self.failed = False

    def check_length(self) -> None:
        """Raise BodyTooLarge by the announced length."""
        if self._announced > self._limit:
            self.failed = True
            raise self._too_large(self._announced)

    async def __call__(self) -> Message:
        """The next message of the ASGI protocol."""
        if self._complete:
            return await self._receive()
        left_s = self._deadline - time.monotonic()
        try:
            async with asyncio.timeout(max(left_s, 0.0)):
                message = await self._receive()
        except TimeoutError as error:
            self.failed = True
            raise BodyTimeout(
                f"the body was not complete within {self._allowed_s:g} s; send it faster or start "
                "the server with a larger --receive-timeout-s",
                field="body",
            ) from error
        self._num_bytes += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._num_bytes > self._limit:
            self.failed = True
            raise self._too_large(self._num_bytes)
        return message

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
