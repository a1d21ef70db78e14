"""The sockets of a server: one port for all its processes, and connections that end."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

from engine.config import EngineConfig
from engine.errors import InvalidRequest
from rollout.http.config import ServeConfig
from rollout.http.listeners import bind, listen

ONE = ServeConfig(engine=EngineConfig(model="m"), port=0)
THREE = replace(ONE, http_processes=3)


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as found:
        yield found


def listening(closing: ExitStack, config: ServeConfig) -> list[socket.socket]:
    return [closing.enter_context(each) for each in listen(bind(config), config)]


def test_every_process_has_a_socket_of_one_port_and_each_gets_connections(
    closing: ExitStack,
) -> None:
    sockets = listening(closing, THREE)
    (address,) = {each.getsockname() for each in sockets}
    assert len(sockets) == 3
    for _ in range(200):
        closing.enter_context(socket.create_connection(address))
    for each in sockets:
        each.setblocking(False)
        closing.enter_context(each.accept()[0])


@pytest.mark.parametrize("others", [ONE, THREE])
def test_a_port_in_use_is_refused_whoever_shares_it(
    closing: ExitStack, others: ServeConfig
) -> None:
    first, *_ = listening(closing, THREE)
    with pytest.raises(InvalidRequest, match="another server is there") as caught:
        bind(replace(others, port=first.getsockname()[1]))
    assert caught.value.field == "--host, --port"


def test_of_two_servers_that_start_together_one_gets_the_port(closing: ExitStack) -> None:
    """Both bind it while their models load, which the system allows; one is heard."""
    first = closing.enter_context(bind(THREE))
    second = closing.enter_context(bind(replace(THREE, port=first.getsockname()[1])))
    for each in listen(first, THREE):
        closing.enter_context(each)
    with pytest.raises(OSError, match="in use"):
        listen(second, THREE)


def test_a_connection_ends_whose_client_takes_nothing(closing: ExitStack) -> None:
    config = replace(ONE, send_timeout_s=0.5)
    (listener,) = listening(closing, config)
    client = closing.enter_context(socket.create_connection(listener.getsockname()))
    server = closing.enter_context(listener.accept()[0])
    assert server.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert server.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 500
    server.settimeout(60)
    with pytest.raises((TimeoutError, BrokenPipeError, ConnectionResetError)) as caught:
        while True:
            server.sendall(bytes(1 << 20))
    assert str(caught.value) != "timed out", "the system ended the connection, not this test"
    assert client.fileno() >= 0


def test_a_port_that_there_cannot_be_is_refused_by_its_flag() -> None:
    with pytest.raises(InvalidRequest, match="port must be 0-65535") as caught:
        bind(replace(ONE, port=99999))
    assert caught.value.field == "--host, --port"
