"""Run a router: bind, route until told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time

import uvloop

from engine.errors import InvalidRequest
from engine.protocol.urls import url_fault
from rollout.http.file_limit import raise_file_limit
from rollout.http.http_server import BACKLOG
from rollout.http.listeners import bind
from rollout.router.app import Router
from rollout.router.config import RouterConfig
from rollout.router.wire.client_connection import ClientConnection

logger = logging.getLogger(__name__)

_TICK_S = 1.0
_DRAIN_S = 30.0


def route(config: RouterConfig) -> None:
    """Route until SIGTERM, SIGHUP or SIGINT; what is open is answered first, a second signal ends
    it.

    Raises InvalidRequest if the address cannot be bound or a worker has no URL, KeyboardInterrupt
    after SIGINT.
    """
    for url in config.workers:
        if fault := url_fault(url):
            raise InvalidRequest(fault, field="--worker")
    raise_file_limit()
    with bind(config) as listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        signals = runner.run(_serve(config, listener))
    if signals and signals[0] == signal.SIGINT:
        raise KeyboardInterrupt


async def _serve(config: RouterConfig, listener: socket.socket) -> list[int]:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    signals: list[int] = []

    def told(number: int) -> None:
        signals.append(number)
        stop.set()

    ends = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        # A terminal that closes; `nohup` has it ignored.
        ends.append(signal.SIGHUP)
    for number in ends:
        loop.add_signal_handler(number, told, number)
    router = Router(config)
    server = await loop.create_server(
        lambda: ClientConnection(router), sock=listener, backlog=BACKLOG
    )
    host, port = listener.getsockname()[:2]
    logger.info("serving a fleet of %d at http://%s:%d", len(router.fleet), host, port)
    ticking = asyncio.create_task(_tick(router))
    await stop.wait()
    server.close()
    closing = asyncio.create_task(router.close(_DRAIN_S))
    while not closing.done() and len(signals) < 2:
        await asyncio.wait([closing], timeout=0.05)
    ticking.cancel()
    closing.cancel()
    await asyncio.gather(ticking, closing, return_exceptions=True)
    return signals


async def _tick(router: Router) -> None:
    while True:
        await asyncio.sleep(_TICK_S)
        router.tick(time.monotonic())
