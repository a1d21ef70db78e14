"""Serves a page by uvicorn, at a socket that is bound already, until it is told to stop."""

from __future__ import annotations

import socket

import uvicorn
from starlette.types import ASGIApp

_GRACE_S = 1
"""For what is under way at the end; a live stream would never be over."""


def serve_page(app: ASGIApp, listener: socket.socket) -> None:
    """Serve until SIGTERM, or SIGINT, which is KeyboardInterrupt afterwards. Many connections may
    wait before the first is answered."""
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=_GRACE_S,
    )
    uvicorn.Server(config).run(sockets=[listener])
