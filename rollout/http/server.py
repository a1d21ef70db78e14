"""Run a server: spawn the engine, bind, serve until told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import uvloop

from engine.config import EngineConfig
from engine.errors import EngineDead
from rollout.collector import settle
from rollout.http.app import build_app
from rollout.http.config import ServeConfig
from rollout.http.edge.access import is_loopback
from rollout.http.engine.client import AsyncEngine
from rollout.http.engine.link import ProcessLink
from rollout.http.engine.supervisor import Supervisor
from rollout.http.file_limit import raise_file_limit
from rollout.http.fronts.front_processes import FrontProcesses
from rollout.http.fronts.news import NewsWriter
from rollout.http.fronts.owner_door import OwnerDoor
from rollout.http.fronts.publisher import Publisher
from rollout.http.http_server import PatientServer, uvicorn_config
from rollout.http.listeners import bind, listen
from rollout.http.registration import Registration, own_url
from rollout.http.services import Services, make_services
from rollout.replica.spawned import ProcessReplica
from rollout.text.tokenizer import Tokenizer, find_tokenizer

logger = logging.getLogger(__name__)

_LAST_ANSWERS_S = 2.0
"""Between the engine's death and the server's: whoever calls meanwhile is told why."""
_FACTORY = "engine.executor:build_executor"


def serve(config: ServeConfig, *, factory: str = _FACTORY) -> None:
    """Serve until SIGTERM or SIGINT; no process is left then. A second signal leaves at once.

    factory: "module:function" that builds the executor in the leader's process.
    Raises InvalidRequest (`--host, --port`) if the address cannot be bound, ModelError or
    OutOfMemory if the engine cannot start, EngineDead if it died and is not started again,
    KeyboardInterrupt after SIGINT.
    """
    _leave_by_exception()
    raise_file_limit()
    with bind(config) as listener:
        tokenizer = find_tokenizer(config.engine.model)
        engines = _Engines(config, factory)
        server = _Server(config, engines, tokenizer)
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                signals = runner.run(server.serve(listener))
        finally:
            engines.close()
    if server.failure is not None:
        raise server.failure
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

    def hub(self) -> str:
        """Where fronts join the engine that runs."""
        return self._replica.hub

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
            shared=self._config.http_processes > 1,
            stuck_s=self._config.stuck_step_s,
        )


class _Server:
    """One server from its start to its end. failure: why it leaves by itself, if it does."""

    def __init__(self, config: ServeConfig, engines: _Engines, tokenizer: Tokenizer | None) -> None:
        self._config = config
        self._engines = engines
        self._tokenizer = tokenizer
        self._server: PatientServer | None = None
        self._registration: Registration | None = None
        self.failure: EngineDead | None = None

    async def serve(self, listener: socket.socket) -> list[int]:
        """Serve to the end; the signals that came."""
        config = self._config
        engine = AsyncEngine(
            self._engines.link(),
            reply_s=config.reply_s,
            slow_s=config.start_s,
            shared=config.http_processes > 1,
        )
        await engine.start()
        services = make_services(config, engine, self._tokenizer)
        listeners = listen(listener, config)
        supervisor = Supervisor(
            engine, config, self._engines.next, self.give_up, services.labels.text
        )
        try:
            if len(listeners) == 1:
                return await self._alone(services, listener)
            return await self._with_fronts(services, listeners)
        finally:
            await supervisor.close()
            for further in listeners[1:]:
                further.close()

    def give_up(self, error: EngineDead) -> None:
        """The engine, or a front, is gone for good: say so to who comes now, then leave."""
        self.failure = self.failure or error
        assert self._server is not None, "nothing serves yet"
        asyncio.get_running_loop().call_later(_LAST_ANSWERS_S, self._server.begin_to_leave)

    async def _alone(self, services: Services, listener: socket.socket) -> list[int]:
        app = build_app(services)
        self._server = PatientServer(
            uvicorn_config(self._config, app),
            services.engine,
            drain_s=self._config.drain_timeout_s,
            end_now=self._engines.kill,
            others=self._deregister,
        )
        self._announce(listener)
        await self._server.serve(sockets=[listener])
        return self._server.signals

    async def _with_fronts(
        self, services: Services, listeners: Sequence[socket.socket]
    ) -> list[int]:
        with tempfile.TemporaryDirectory(prefix="slipstream-fronts-") as folder:
            fronts = FrontProcesses(
                self._config,
                services.engine,
                listeners,
                Path(folder),
                has_text=self._tokenizer is not None,
                metrics=services.metrics,
                give_up=self.give_up,
            )
            publisher = Publisher(NewsWriter(Path(folder)), services, self._engines.hub)

            def end_now() -> None:
                fronts.kill()
                self._engines.kill()

            app = OwnerDoor(build_app(services), fronts.take_report)
            self._server = PatientServer(
                uvicorn_config(self._config, app, uds=str(Path(folder, "owner"))),
                services.engine,
                drain_s=self._config.drain_timeout_s,
                end_now=end_now,
                others=lambda drain_s: self._deregister(drain_s, fronts),
            )
            telling = asyncio.create_task(publisher.run())
            serving = asyncio.create_task(self._server.serve())
            try:
                await fronts.start()
                self._announce(listeners[0])
                await serving
            except EngineDead:
                # A front that is told to leave before it serves has not started.
                if not self._server.signals:
                    raise
            finally:
                telling.cancel()
                await fronts.leave()
                self._server.begin_to_leave()
                await asyncio.gather(serving, telling, return_exceptions=True)
        return self._server.signals

    async def _deregister(self, drain_s: float, fronts: FrontProcesses | None = None) -> None:
        """Tell who sends requests here, and the fronts, that the server leaves."""
        if self._registration is not None:
            await self._registration.leave()
        if fronts is not None:
            await fronts.leave(drain_s)

    def _announce(self, listener: socket.socket) -> None:
        config, (host, port) = self._config, listener.getsockname()[:2]
        logger.info("serving %s at http://%s:%d", config.model_name, host, port)
        if not is_loopback(config.host) and not config.admin_api_key:
            logger.warning("control routes answer 403 at %s without --admin-api-key", config.host)
        if config.router:
            url = own_url(config.host, port, config.router)
            key = config.admin_api_key or config.api_key
            self._registration = Registration(config.router, url, key=key)
            self._registration.start()
        # What was made until here stays to the end: it need not be looked through again and again.
        settle()


def _leave_by_exception() -> None:
    """SIGTERM unwinds the stack, also while the model loads, so that the engine is ended. SIGHUP,
    of a terminal that closes, is as SIGTERM, unless `nohup` or the like has it ignored."""

    def leave(_: int, __: FrameType | None) -> None:
        raise SystemExit(0)

    def hang_up(_: int, __: FrameType | None) -> None:
        signal.raise_signal(signal.SIGTERM)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, leave)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            signal.signal(signal.SIGHUP, hang_up)
