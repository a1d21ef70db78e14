"""Servers of the fake engine that listen, in this process."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from tests.helpers.http_app import Server, serving


@dataclass
class Live:
    """A server that listens at `url`."""

    server: Server
    url: str


@asynccontextmanager
async def live(**options: Any) -> AsyncIterator[Live]:
    """A server; `options` are those of `serving`."""
    async with serving(**options) as server:
        config = uvicorn.Config(server.app, log_config=None, lifespan="off", access_log=False)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            listening = uvicorn.Server(config)
            # Not `serve`, which takes over this process's signals.
            task = asyncio.create_task(listening._serve([listener]))
            try:
                while not listening.started:
                    await asyncio.sleep(0.005)
                yield Live(server, url)
            finally:
                listening.should_exit = listening.force_exit = True
                await task
