"""Servers that are not what they should be, as a trainer's target."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from engine.errors import (
    EngineDead,
    InvalidRequest,
    SlipstreamError,
    UpdateOrder,
    WeightUpdateError,
)
from engine.protocol import GetState
from trainer_bridge.http_target import HttpTarget


@contextmanager
def peer(answer: bytes | None) -> Iterator[str]:
    """A server that reads a request and sends `answer`, whatever it is, or nothing at all."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        held = []

        def serve() -> None:
            connection, _ = listening.accept()
            connection.recv(65536)
            if answer is None:
                held.append(connection)
                return
            connection.sendall(answer)
            connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join(10)
        for connection in held:
            connection.close()


def reply(status: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


REFUSAL = b'{"error": {"type": "UpdateOrder", "message": "busy", "field": "version"}}'
NO_HOST = f"http://{'a' * 64}:30000"
HOLDS_NONE = b'{"error": {"type": "WeightUpdateError", "message": "was 7"}}'


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (reply("409 Conflict", REFUSAL), UpdateOrder, "busy"),
        (reply("503 Service Unavailable", HOLDS_NONE), WeightUpdateError, "was 7"),
        (reply("502 Bad Gateway", b"<html>"), SlipstreamError, "answered 502: <html>"),
        (reply("409 Conflict", b'{"error": "x"}'), SlipstreamError, "answered 409"),
        (reply("200 OK", b"[1, 2]"), SlipstreamError, "no server of ours"),
        (reply("200 OK", b"{}")[:-2], EngineDead, "does not answer"),
        (b"", EngineDead, "does not answer"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", EngineDead, "does not answer"),
    ],
)
def test_what_a_server_says_is_a_typed_error(answer: bytes, error: type, message: str) -> None:
    with peer(answer) as url, pytest.raises(SlipstreamError, match=message) as told:
        HttpTarget(url, timeout_s=30.0).send(GetState())
    assert type(told.value) is error


def test_a_silent_server_is_given_up() -> None:
    with peer(None) as url, pytest.raises(EngineDead, match="timed out"):
        HttpTarget(url, timeout_s=0.2).send(GetState())


def test_nobody_at_the_address_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(EngineDead, match=str(port)):
        HttpTarget(f"http://127.0.0.1:{port}").send(GetState())


@pytest.mark.parametrize("url", ["127.0.0.1:30000", "ftp://host", "", "http://[::1", NO_HOST])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="no URL"):
        HttpTarget(url)
