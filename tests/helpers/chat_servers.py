"""A server of OpenAI's chat that answers as a test says, one connection a request."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Sequence
from typing import Any, Self

MODELS = {"data": [{"id": "scripted"}]}


def chunk(text: str, logprob: float | None = None, **delta: str) -> str:
    """A frame that brings a text, as one token."""
    choice: dict[str, Any] = {"index": 0, "delta": {"content": text, **delta}}
    if logprob is not None:
        choice["logprobs"] = {"content": [{"token": text, "logprob": logprob}]}
    return json.dumps({"choices": [choice]})


USAGE = json.dumps({"choices": [], "usage": {"completion_tokens": 7}})


class ChatServer:
    """At `url`, in a thread. replies: of the next requests, frames each; one that does not end with
    "[DONE]" ends its connection in the middle, and "wait" holds it until the test is over. bodies:
    what was asked."""

    def __init__(self, *replies: Sequence[str]) -> None:
        self.bodies: list[Any] = []
        self.replies = [list(reply) for reply in replies]
        self.keys: list[str] = []
        self.over = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(30)

    def _accept(self) -> None:
        while not self.over.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines:
            request = lines.readline().decode()
            size = 0
            while (line := lines.readline().strip()) and line:
                name, _, value = line.decode().partition(": ")
                if name.lower() == "content-length":
                    size = int(value)
                if name.lower() == "authorization":
                    self.keys.append(value)
            body = lines.read(size)
            head = "HTTP/1.1 200 OK\r\nConnection: close\r\n"
            if request.startswith("GET"):
                connection.sendall(
                    f"{head}Content-Type: application/json\r\n\r\n{json.dumps(MODELS)}".encode()
                )
                return
            self.bodies.append(json.loads(body))
            head += "Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            connection.sendall(head.encode())
            self._stream(connection, self.replies.pop(0))

    def _stream(self, connection: socket.socket, frames: Sequence[str]) -> None:
        for frame in frames:
            if frame == "wait":
                self.over.wait(60)
                return
            data = f"data: {frame}\n\n".encode()
            connection.sendall(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        if frames[-1] == "[DONE]":
            connection.sendall(b"0\r\n\r\n")
