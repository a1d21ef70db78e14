"""HTTP connections that do not wait for ever for a request to arrive."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from engine.errors import SlipstreamError
from rollout.http.errors import error_body

logger = logging.getLogger(__name__)


class HeadersTimeout(SlipstreamError):
    """The headers of a request did not arrive in time."""

    status = 408


class PatientProtocol(H11Protocol):
    """uvicorn's protocol, which closes a connection whose request is not there in time.

    receive_s: from the connection, or from the first byte of a later request, to the end of the
    headers; and, where a reply was sent to a request whose body nobody read, to the end of it.
    The body of a request that is being handled has its own deadline (`body.BodyReader`), and a
    connection idle between two requests is uvicorn's `timeout_keep_alive`.
    """

    def __init__(self, *args: Any, receive_s: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._receive_s = receive_s
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected; it has to say what it wants."""
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A part of a request, a whole one, or several."""
        super().data_received(data)
        if self._handling():
            self._disarm()
        elif self._timer is None and not self.transport.is_closing():
            self._arm()

    def on_response_complete(self) -> None:
        """The reply is sent; what is left of the body must still come to an end."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self._arm()

    def _handling(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _arm(self) -> None:
        self._disarm()
        self._timer = self.loop.call_later(self._receive_s, self._expire)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        self._timer = None
        if self._handling() or self.transport.is_closing():
            return
        begun = bool(self.conn.trailing_data[0])
        if begun and self.conn.our_state is h11.IDLE:
            self._refuse()
        self.transport.close()

    def _refuse(self) -> None:
        error = HeadersTimeout(
            f"the headers were not complete within {self._receive_s:g} s; send them faster or "
            "start the server with a larger --receive-timeout-s",
            field="headers",
        )
        body = msgspec.json.encode(error_body(error))
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        response = h11.Response(status_code=error.status, headers=headers)
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
