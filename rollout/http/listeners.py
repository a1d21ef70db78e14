"""The sockets that a server listens at."""

from __future__ import annotations

import errno
import socket
from typing import Protocol

from engine.errors import InvalidRequest
from rollout.http.config import ServeConfig
from rollout.http.http_server import BACKLOG

_PROBE_AFTER_S = 60
_PROBE_EVERY_S = 15
_NUM_PROBES = 4


class Address(Protocol):
    """Where to listen, and how long a client that takes nothing keeps its connection."""

    @property
    def host(self) -> str:
        """Address to bind."""
        ...

    @property
    def port(self) -> int:
        """Port to bind; 0 takes a free one."""
        ...

    @property
    def send_timeout_s(self) -> float:
        """Seconds after which such a connection ends."""
        ...


def bind(config: Address) -> socket.socket:
    """A bound socket, which nobody is heard at yet: bound before the model is loaded, so that a
    port in use shows at once. Raises InvalidRequest (`--host, --port`)."""
    listener = _socket(config)
    try:
        listener.bind((config.host, config.port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise InvalidRequest(
            f"cannot bind {config.host}:{config.port}: {error}; "
            + (
                "another server is there: end it, or give another --port (0 takes a free one)"
                if isinstance(error, OSError) and error.errno == errno.EADDRINUSE
                else "give an address of this machine, and a port that you may bind"
            ),
            field="--host, --port",
        ) from error
    return listener


def listen(first: socket.socket, config: ServeConfig) -> list[socket.socket]:
    """Listen at what `bind` returned, and at as many more sockets of that port as there are
    further processes: the system gives every connection to one of them, by its address.

    The first listens before the port is shared, so that of two servers one is told that it is in
    use. Raises OSError.
    """
    first.listen(BACKLOG)
    sockets = [first]
    if config.http_processes > 1:
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    for _ in range(config.http_processes - 1):
        further = _socket(config)
        sockets.append(further)
        further.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        further.bind(first.getsockname())
        further.listen(BACKLOG)
    return sockets


def _socket(config: Address) -> socket.socket:
    """A socket whose connections, which have its options, end once the other side has vanished or
    has taken nothing for `send_timeout_s`: TCP_USER_TIMEOUT of tcp(7) is about both."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    waits_s = config.send_timeout_s
    for name, value in {
        "TCP_KEEPIDLE": max(1, int(min(_PROBE_AFTER_S, waits_s))),
        "TCP_KEEPINTVL": max(1, int(min(_PROBE_EVERY_S, waits_s / _NUM_PROBES))),
        "TCP_KEEPCNT": _NUM_PROBES,
        "TCP_USER_TIMEOUT": max(1, int(1000 * waits_s)),
    }.items():
        # Systems differ in which of them they have.
        if hasattr(socket, name):
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return made
