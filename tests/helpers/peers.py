"""Peers at a rendezvous address that are no trainers: silent, slow, gone, or speaking HTTP."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

Act = Callable[[socket.socket, threading.Event], None]


def silent(peer: socket.socket, closed: threading.Event) -> None:
    """Accepts and says nothing."""
    closed.wait(300)


def slow(peer: socket.socket, closed: threading.Event) -> None:
    """Says one byte a second, for ever."""
    while not closed.wait(1.0):
        peer.sendall(b"\0")


def closing(peer: socket.socket, closed: threading.Event) -> None:
    """Hangs up at once."""


def http(peer: socket.socket, closed: threading.Event) -> None:
    """Answers as a web server does."""
    peer.recv(100)
    peer.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
    closed.wait(300)


def cunning(peer: socket.socket, closed: threading.Event) -> None:
    """Answers the first question as a store does, and nothing after that."""
    peer.recv(100)
    peer.sendall(bytes(8))
    closed.wait(300)


ALL: list[Act] = [silent, slow, closing, http, cunning]


@contextmanager
def listening(act: Act) -> Iterator[int]:
    """The port of a peer that treats every connection so."""
    closed = threading.Event()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(64)

    def treat(peer: socket.socket) -> None:
        with suppress(OSError), peer:
            act(peer, closed)

    def accept() -> None:
        with suppress(OSError):
            while not closed.is_set():
                peer, _ = listener.accept()
                threading.Thread(target=treat, args=(peer,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        closed.set()
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


def until(what: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Wait for something that will happen."""
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.002)
