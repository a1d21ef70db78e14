"""A service of one address that answers as a test says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """body: bytes as they are, anything else as JSON."""

    body: Any = None
    status: int = 200
    delay_s: float = 0.0


@dataclass
class StubService:
    """asked: (path, body) of each POST so far."""

    answer: Callable[[Any], Answer]
    url: str = ""
    asked: list[tuple[str, Any]] = field(default_factory=list)


@contextmanager
def stub_service(answer: Callable[[Any], Answer]) -> Iterator[StubService]:
    """A server in threads of this process; `answer` is called with the body of each POST."""
    stub = StubService(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(Answer({"object": "list", "data": [{"id": "stub", "object": "model"}]}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            stub.asked.append((self.path, body))
            self._send(stub.answer(body))

        def _send(self, answer: Answer) -> None:
            time.sleep(answer.delay_s)
            body = answer.body
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            try:
                self.send_response(answer.status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass  # who asked is gone

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # more connect at once than its own five

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
