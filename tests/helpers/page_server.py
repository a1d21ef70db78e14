"""Applications that listen, in a thread of this process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from rollout.dashboard.source import Source
from rollout.dashboard.standalone import PageConfig, page_app


@contextmanager
def listening(app: ASGIApp, port: int = 0) -> Iterator[str]:
    """The URL of a server of `app`, which leaves with its open streams at the end."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        config = uvicorn.Config(app, log_config=None, lifespan="off", access_log=False)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join(30)


def serve_page(source: Source, *, port: int = 0, **config: Any) -> AbstractContextManager[str]:
    """The page of a source; yields its address."""
    return listening(page_app(source, PageConfig(**config)), port)
