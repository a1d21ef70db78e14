"""What a router does with each request, by its path."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import Coroutine
from typing import Any
from urllib.parse import unquote

from engine.errors import SlipstreamError
from rollout.http.edge.body_limits import BodyBudget
from rollout.http.journal.frames import Ticket
from rollout.router.access import Door
from rollout.router.choice.ask import NOTHING, Ask, Policy
from rollout.router.choice.cache_aware import CacheAware
from rollout.router.choice.peek import peek
from rollout.router.choice.plain_policies import LeastLoad, RoundRobin
from rollout.router.config import RouterConfig
from rollout.router.errors import NotAWorker, NoWorker, PrivateRoute
from rollout.router.exchange import Exchange, OnReply, Parts
from rollout.router.fan_out import FanOut
from rollout.router.metrics import RouterMetrics
from rollout.router.places import Places, named_in
from rollout.router.routes import Kind, kind_of, named_worker, steers
from rollout.router.wire.client_connection import ClientConnection, Handler
from rollout.router.wire.messages import ClientRequest, Reply, error_reply, json_reply
from rollout.router.worker_routes import WorkerRoutes
from rollout.router.workers.joining import ASKED_BY_ROUTER, Joining
from rollout.router.workers.registry import Fleet
from rollout.router.workers.watch import Watch

logger = logging.getLogger(__name__)


class Router:
    """The front that every client's connection asks (`client_connection.Front`)."""

    def __init__(self, config: RouterConfig) -> None:
        """Within a running loop."""
        self.budget = BodyBudget(config.max_held_body_bytes)
        self.connections: set[ClientConnection] = set()
        self._config = config
        self._door = Door(config)
        self.fleet = Fleet(connect_s=config.connect_s)
        key = config.worker_admin_api_key or config.worker_api_key
        self._joining = Joining(self.fleet, key=config.worker_api_key or key)
        self._metrics = RouterMetrics()
        self._parts = Parts(
            config=config,
            fleet=self.fleet,
            policy=_policy(config),
            joining=self._joining,
            metrics=self._metrics,
        )
        self._workers = WorkerRoutes(self.fleet, self._joining)
        self._fan_out = FanOut(config, self.fleet, self._joining, self._metrics)
        self._places = Places()
        self._watch = Watch(self.fleet, self._joining, config)
        self._tasks: set[asyncio.Task[None]] = set()
        # Of the system's randomness once, and not for every request.
        self._draw = random.Random(secrets.randbits(256))
        self.fleet.on_change(self._wake_parked)
        for url in config.workers:
            self._joining.look(self.fleet.add(url)[0])

    def admit(self, request: ClientRequest) -> int:
        """See `Front`."""
        self._door.check(request)
        config = self._config
        return config.max_control_body_bytes if steers(request.path) else config.max_body_bytes

    def handle(self, request: ClientRequest, connection: ClientConnection) -> Handler | None:
        """See `Front`."""
        kind = kind_of(request.path)
        if request.header(ASKED_BY_ROUTER):
            connection.reply(error_reply(_is_router(), request.path))
            return None
        if kind is Kind.GENERATE or kind is Kind.SCORE:
            return self._generate(request, connection, journaled=kind is Kind.GENERATE)
        if kind is Kind.STATEFUL or kind is Kind.ANY:
            state = named_in(request) if kind is Kind.STATEFUL else ""
            return self._begin(request, connection, ask=NOTHING, state=state)
        if kind is Kind.CONTROL:
            return self._in_task(request, connection, self._fan_out.run(request))
        try:
            if kind is Kind.PRIVATE:
                raise PrivateRoute(f"{request.path[:200]} is no client's to call", field="path")
            if named := named_worker(request.path):
                worker = self.fleet.find(unquote(named[0]))
                call = self._fan_out.one(request, worker, named[1])
                return self._in_task(request, connection, call)
            connection.reply(self._own(request))
        except SlipstreamError as error:
            connection.reply(error_reply(error, request.path))
        return None

    def tick(self, now: float) -> None:
        """Once a second: who is silent, who sends too slowly, and whose time to rest is over."""
        if self._parts.parked and self.fleet.rotation():
            self._wake_parked()
        self._watch.tick(now)
        for connection in list(self.connections):
            connection.too_late(now, self._config.receive_timeout_s)
        for worker in list(self.fleet):
            if worker.draining and not worker.num_open:
                self.fleet.drop(worker)

    async def close(self, patience_s: float) -> None:
        """Take nothing new, wait for what is open, and end."""
        for connection in list(self.connections):
            connection.leave()
        deadline = time.monotonic() + patience_s
        while self.connections and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for connection in list(self.connections):
            connection.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._watch.close()
        await self._joining.close()
        for worker in list(self.fleet):
            worker.close()

    def _generate(
        self, request: ClientRequest, connection: ClientConnection, *, journaled: bool
    ) -> Handler | None:
        seen = peek(request)
        if seen.state:
            return self._begin(request, connection, ask=seen.ask, state=seen.state)
        ticket, on_reply = None, None
        if journaled and self._config.journal:
            draw = self._draw.getrandbits
            ticket = Ticket(draw(62), f"{draw(128):032x}", int(time.time()))
            if request.path == "/v1/responses":
                on_reply = self._noting(f"resp_{ticket.name}")
        exchange = Exchange(
            self._parts,
            request,
            connection,
            ask=seen.ask,
            ticket=ticket,
            repeatable=True,
            on_reply=on_reply,
        )
        exchange.begin()
        return exchange

    def _begin(
        self, request: ClientRequest, connection: ClientConnection, *, ask: Ask, state: str = ""
    ) -> Handler | None:
        """Pass a request on without a journal, to the worker that has `state`, if there is one."""
        only = self._places.worker_of(state, self.fleet) if state else None
        exchange = Exchange(
            self._parts,
            request,
            connection,
            ask=ask,
            only=only,
            on_reply=lambda worker, reply: self._places.learn(request, worker, reply),
        )
        exchange.begin()
        return exchange

    def _noting(self, name: str) -> OnReply:
        return lambda worker, _: self._places.note(name, worker)

    def _in_task(
        self,
        request: ClientRequest,
        connection: ClientConnection,
        work: Coroutine[Any, Any, Reply],
    ) -> Handler | None:
        async def run() -> None:
            try:
                reply = await work
            except SlipstreamError as error:
                reply = error_reply(error, request.path)
            connection.reply(reply)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                # A fault of ours: whoever waits for the answer must not wait for ever.
                logger.error("%s failed", request.path[:200], exc_info=error)
                connection.abort()

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(ended)
        return None

    def _own(self, request: ClientRequest) -> Reply:
        path = request.path.rstrip("/")
        if path in ("/health", "/ping", "/liveness"):
            return json_reply(b'{"status":"ok"}')
        if path in ("/ready", "/readiness"):
            if not self.fleet.rotation():
                told = "; ".join(f"{worker.url} {worker.state}" for worker in self.fleet)
                raise NoWorker(f"no worker may be asked: {told or 'none'}", field="workers")
            return json_reply(b'{"status":"ready"}')
        if path == "/metrics":
            body = self._metrics.render(self.fleet)
            return Reply(200, [(b"content-type", b"text/plain; version=0.0.4")], body)
        return self._workers.handle(request)

    def _wake_parked(self) -> None:
        for exchange in list(self._parts.parked):
            exchange.wake()


def _is_router() -> NotAWorker:
    return NotAWorker(
        "this is a router, and no worker of one: register its servers themselves", field="url"
    )


def _policy(config: RouterConfig) -> Policy:
    if config.policy == "round_robin":
        return RoundRobin()
    return LeastLoad() if config.policy == "least_load" else CacheAware()
