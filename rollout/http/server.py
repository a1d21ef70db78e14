"""Run a server: spawn the engine, bind, serve until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import resource
import signal
import socket
import threading
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
import uvloop
from starlette.types import ASGIApp

from engine.config import EngineConfig
from engine.errors import EngineDead, InvalidRequest
from rollout.http.app import build_app
from rollout.http.config import ServeConfig
from rollout.http.edge.access import is_loopback
from rollout.http.edge.connection import PatientProtocol
from rollout.http.engine.client import AsyncEngine
from rollout.http.engine.link import ProcessLink
from rollout.http.engine.supervisor import Supervisor
from rollout.http.services import make_services
from rollout.replica.leave import leave_at_once
from rollout.replica.spawned import ProcessReplica
from rollout.text.tokenizer import Tokenizer, find_tokenizer

logger = logging.getLogger(__name__)

_GRACE_S = 3
_PATIENCE_S = 4.0
"""For the engine to end what is open, once the server is told to stop."""
_LAST_ANSWERS_S = 2.0
"""Between the engine's death and the server's: whoever calls meanwhile is told why."""
_MAX_FILES = 65536
_BACKLOG = 4096
_FACTORY = "engine.executor:build_executor"


def serve(config: ServeConfig, *, factory: str = _FACTORY) -> None:
    """Serve until SIGTERM or SIGINT; no process is left then. A second signal leaves at once.

    factory: "module:function" that builds the executor in the leader's process.
    Raises InvalidRequest (`--host, --port`) if the address cannot be bound, ModelError or
    OutOfMemory if the engine cannot start, EngineDead if it died and is not started again,
    KeyboardInterrupt after SIGINT.
    """
    _leave_by_exception()
    _raise_file_limit()
    with _bind(config) as listener:
        tokenizer = find_tokenizer(config.engine.model)
        engines = _Engines(config, factory)
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                signals, failure = runner.run(_serve(config, engines, tokenizer, listener))
        finally:
            engines.close()
    if failure is not None:
        raise failure
    if signal.SIGINT in signals:
        raise KeyboardInterrupt


class _Engines:
    """The spawned engine of a server, and those that follow it. The first is ready when this
    returns; raises what it could not be built for."""

    def __init__(self, config: ServeConfig, factory: str) -> None:
        self._config = config
        self._factory = factory
        self._replica = self._start(config.engine, wait=True)

    def link(self) -> ProcessLink:
        """A link to the engine that runs."""
        return ProcessLink(self._replica)

    def next(self, config: EngineConfig) -> ProcessLink:
        """Begin to build another engine in place of one that died."""
        self._replica.close()
        self._replica = self._start(config, wait=False)
        return self.link()

    def close(self) -> None:
        """Tell the engine to leave, and wait until it has. Idempotent."""
        self._replica.close()

    def kill(self) -> None:
        """End the engine at once."""
        self._replica.kill()

    def _start(self, config: EngineConfig, *, wait: bool) -> ProcessReplica:
        return ProcessReplica(
            config,
            factory=self._factory,
            start_s=self._config.start_s,
            reply_s=self._config.reply_s,
            wait=wait,
        )


class _Server(uvicorn.Server):
    """uvicorn's server, which answers everybody before it leaves.

    signals: those that came. failure: the engine's, if the server leaves because of that.
    """

    def __init__(self, config: uvicorn.Config, engine: AsyncEngine, engines: _Engines) -> None:
        super().__init__(config)
        self._engine = engine
        self._engines = engines
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self.signals: list[int] = []
        self.failure: EngineDead | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM or SIGINT, in place of uvicorn's own handling."""
        self.signals.append(sig)
        if len(self.signals) > 1:
            self._engines.kill()
            leave_at_once(128 + sig)
        self._loop.call_soon_threadsafe(self._begin_to_leave)

    def give_up(self, error: EngineDead) -> None:
        """The engine is gone for good: say so to who comes now, then leave."""
        self.failure = error
        self._loop.call_later(_LAST_ANSWERS_S, self._begin_to_leave)

    def _begin_to_leave(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._leave())

    async def _leave(self) -> None:
        await self._engine.leave(_PATIENCE_S)
        self.should_exit = True


async def _serve(
    config: ServeConfig,
    engines: _Engines,
    tokenizer: Tokenizer | None,
    listener: socket.socket,
) -> tuple[list[int], EngineDead | None]:
    """Serve to the end; the signals that came, and why the engine is gone, if it is."""
    engine = AsyncEngine(engines.link(), reply_s=config.reply_s, slow_s=config.start_s)
    await engine.start()
    services = make_services(config, engine, tokenizer)
    host, port = listener.getsockname()[:2]
    listener.listen(_BACKLOG)
    logger.info("serving %s at http://%s:%d", config.model_name, host, port)
    if not is_loopback(config.host) and not config.admin_api_key:
        logger.warning("control routes answer 403 at %s without --admin-api-key", config.host)
    # What was made until here stays to the end: it need not be looked through again and again.
    gc.collect()
    gc.freeze()
    server = _Server(_uvicorn_config(config, build_app(services)), engine, engines)
    supervisor = Supervisor(engine, config, engines.next, server.give_up, services.labels.text)
    try:
        await server.serve(sockets=[listener])
    finally:
        await supervisor.close()
    return server.signals, server.failure


def _uvicorn_config(config: ServeConfig, app: ASGIApp) -> uvicorn.Config:
    protocol: Any = partial(PatientProtocol, receive_s=config.receive_timeout_s)
    return uvicorn.Config(
        app,
        http=protocol,
        log_config=None,
        access_log=False,
        backlog=_BACKLOG,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=_GRACE_S,
    )


def _raise_file_limit() -> None:
    """Room for thousands of connections: each is a file, and the usual limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else min(_MAX_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            # A system may allow less than the limit it names.
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _leave_by_exception() -> None:
    """SIGTERM unwinds the stack, also while the model loads, so that the engine is ended."""

    def leave(_: int, __: FrameType | None) -> None:
        raise SystemExit(0)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, leave)


def _bind(config: ServeConfig) -> socket.socket:
    """The listening socket, bound before the model is loaded: a port in use shows at once."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise InvalidRequest(
            f"cannot bind {config.host}:{config.port}: {error}; "
            + (
                "another server is there: end it, or give another --port (0 takes a free one)"
                if error.errno == errno.EADDRINUSE
                else "give an address of this machine, and a port that you may bind"
            ),
            field="--host, --port",
        ) from error
    return listener
