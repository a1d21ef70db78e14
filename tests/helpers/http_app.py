"""The server's application over an engine of this process, and an HTTP client for it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from fastapi import FastAPI
from msgspec.structs import replace

from engine.config import EngineConfig
from engine.errors import EngineDead, SlipstreamError
from engine.protocol import (
    Call,
    Command,
    GetState,
    LeaderMessage,
    Reply,
    Request,
    Shutdown,
    decode,
    encode,
)
from rollout.http.app import build_app, build_routes
from rollout.http.config import ServeConfig
from rollout.http.engine.client import AsyncEngine
from rollout.http.engine.link import Deliver, Fail, Message
from rollout.http.services import Services, make_services
from rollout.ranks.step_executor import StepExecutor
from rollout.replica.columns import from_columns
from rollout.replica.command_replies import error_info
from rollout.replica.ipc import encode_frame
from rollout.replica.leader import Leader
from rollout.text.tokenizer import Tokenizer
from tests.helpers.fake_executor import FakeExecutor
from tests.helpers.replicas import fake_config
from tests.helpers.tiny_tokenizer import tiny_tokenizer

Answer = Callable[[Any], Reply | None]


class InlineLink:
    """The leader of a fake engine, stepped by the event loop; notes what it was sent.

    answers: by type of command, what answers instead of the leader: a function that returns a
    reply, None to fall through to the leader, or raises a typed error.
    silent: commands are noted and never answered. swallowed: so are those of these types.
    stalled: no step is run. late: what it takes long for.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        announces: bool = False,
        executor: Callable[[EngineConfig], StepExecutor] = FakeExecutor,
    ) -> None:
        self.announces = announces
        self.leader = Leader(config, executor(config))
        self.commands: list[Command] = []
        self.requests: list[Request] = []
        self.answers: dict[type, Answer] = {}
        self.silent = False
        self.swallowed: set[type] = set()
        self.stalled = False
        self.killed = self.late = ""
        self.closed = False
        self._inbox: list[Request | Call] = []
        self._deliver: Deliver | None = None
        self._fail: Fail | None = None
        self._scheduled = False

    def start(self, deliver: Deliver, fail: Fail) -> None:
        self._deliver, self._fail = deliver, fail
        if self.announces:
            # As a spawned leader does once it is built.
            asyncio.get_running_loop().call_soon(self._announce)

    def post(self, messages: Sequence[Request | Call]) -> None:
        # As over a channel: what cannot be encoded is refused, and nothing of it is noted.
        encode_frame(messages)
        for message in messages:
            if isinstance(message, Request):
                self.requests.append(message)
            elif not isinstance(message.command, GetState):
                self.commands.append(message.command)
        # As over a channel: a message that its bytes do not hold shows here.
        self._inbox += [decode(encode(message), LeaderMessage) for message in messages]
        self._schedule()

    def kill(self, why: str) -> EngineDead:
        self.killed = why
        return EngineDead(f"fake engine {why}", field="leader")

    def die(self) -> None:
        """The engine leaves by itself."""
        assert self._fail is not None
        fail = self._fail
        self.stop()
        fail(EngineDead("fake engine was killed by signal 9", field="leader"))

    def deliver(self, messages: Sequence[Message]) -> None:
        """Say something in the engine's place."""
        assert self._deliver is not None
        self._deliver(messages)

    def stop(self) -> None:
        self._deliver = None

    def close(self) -> None:
        self.closed = True

    def _announce(self) -> None:
        if self._deliver is not None and not self.silent:
            self._deliver([Reply(state=self.leader.state())])

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._scheduled = False
        if self._deliver is None or self.silent:
            return
        inbox, self._inbox = self._inbox, []
        for message in inbox:
            if isinstance(message, Request):
                self.leader.submit([message])
            elif type(message.command) not in self.swallowed:
                self._deliver([replace(self._answer(message.command), id=message.id)])
        if self.leader.can_step() and not self.stalled:
            outputs = from_columns(self.leader.step())
            if outputs:
                self._deliver(outputs)
        if self.leader.can_step():
            self._schedule()

    def _answer(self, command: Command) -> Reply:
        assert not isinstance(command, Shutdown)
        try:
            answer = self.answers.get(type(command))
            reply = None if answer is None else answer(command)
            return self.leader.handle(command) if reply is None else reply
        except SlipstreamError as error:
            return Reply(error=error_info(error))


@dataclass(kw_only=True)
class Server:
    """A running application. http: a client of it; base address http://127.0.0.1."""

    http: httpx.AsyncClient
    link: InlineLink
    engine: AsyncEngine
    app: Any
    services: Services

    @property
    def routes(self) -> FastAPI:
        """Every route that it answers."""
        return build_routes(self.services)

    def another_engine(self, config: EngineConfig | None = None) -> InlineLink:
        """A link to a new engine that says when it is ready; `link` from now on."""
        self.link = InlineLink(config or fake_config(), announces=True)
        return self.link

    def commands(self) -> list[Command]:
        """Commands the engine got since the last call, `GetState` aside."""
        found, self.link.commands = self.link.commands, []
        return found

    async def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return await self.http.post(path, json={} if body is None else body, **options)

    async def get(self, path: str, **options: Any) -> httpx.Response:
        return await self.http.get(path, **options)


@asynccontextmanager
async def serving(
    *,
    engine: EngineConfig | None = None,
    tokenizer: Tokenizer | None = None,
    ids_only: bool = False,
    reply_s: float = 60.0,
    slow_s: float = 60.0,
    executor: Callable[[EngineConfig], StepExecutor] = FakeExecutor,
    **options: Any,
) -> AsyncIterator[Server]:
    """A server over the fake engine, or over `executor`; `options` go to its `ServeConfig`."""
    config = ServeConfig(engine=engine or fake_config(max_waiting=4000), **options)
    link = InlineLink(config.engine, executor=executor)
    client = AsyncEngine(link, reply_s=reply_s, slow_s=slow_s)
    await client.start()
    known = None if ids_only else tokenizer or tiny_tokenizer()
    services = make_services(config, client, known)
    app = build_app(services)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://127.0.0.1", timeout=30.0
    ) as http:
        try:
            yield Server(http=http, link=link, engine=client, app=app, services=services)
        finally:
            await client.close()


def run(test: Callable[[], Any]) -> None:
    """Run a coroutine function to its end; one that hangs is ended some time."""

    async def limited() -> None:
        await asyncio.wait_for(test(), 300)

    asyncio.run(limited())


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, a minute at most."""
    deadline, turn = time.monotonic() + 60, 0
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        await asyncio.sleep(0 if turn < 2000 else 0.005)
        turn += 1


def events(text: str) -> list[Any]:
    """The frames of a stream's body, decoded; the last is None for [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [None if line == "[DONE]" else json.loads(line) for line in lines]
