"""One server over the fake engine that takes any request after another.

Building one takes most of the time of a case, so it stays until a case has told the engine
something; the next case then gets a new one, so that what is refused is refused by what was sent
and not by what came before.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any, get_args

import httpx
import msgspec

from engine.protocol import (
    Abort,
    AbortUpdate,
    BeginUpdate,
    Command,
    CommitUpdate,
    JoinGroup,
    LoadFromDisk,
    ReceiveBroadcast,
    ReceiveIpc,
    Reply,
    Resume,
    ResumeMemory,
    RolloutCommand,
    SessionCommand,
    Stop,
)
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.http_app import Server, serving

DEADLINE_S = 60.0
WORDS = {
    "model": ("model_not_found",),
    "response_id": ("response_not_found",),
    "previous_response_id": ("previous_response_not_found",),
}
"""What clients of OpenAI know some errors by, in the place of a status."""
BATCH = 25
"""Cases after which the engine must answer a command and a prompt, whatever they were."""
HEADERS = {"content-type": "application/json"}
# A trainer that always sends what it said.
_ARRIVING = (JoinGroup, ReceiveBroadcast, ReceiveIpc)
# They name requests, none of which is open between two cases, and what is no other case's.
_HARMLESS = (Abort, Stop, *get_args(SessionCommand), *get_args(RolloutCommand))


class SharedServer:
    """Takes cases from tests that are no coroutines; a context."""

    def __init__(self) -> None:
        self.num_built = 0
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()
        self._server: Server | None = None
        self._num_unchecked = 0

    def __enter__(self) -> SharedServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._runner:
            if kind is None and self._num_unchecked:
                self._runner.run(self._look_after())
            self._runner.run(self._stack.aclose())

    def survives(self, method: str, path: str, **options: Any) -> None:
        """Send one request: it is answered with a result or a refusal, and so is what comes
        after it."""
        self._runner.run(self._survives(method, path, options))

    async def _survives(self, method: str, path: str, options: dict[str, Any]) -> None:
        server = await self._current()
        try:
            assert_answer(await answered(server, method, path, **options))
            self._num_unchecked += 1
            told = any(not isinstance(command, _HARMLESS) for command in server.commands())
            if told or self._num_unchecked >= BATCH:
                await self._look_after()
        except BaseException:
            # Whatever it is now, no later case is to see it.
            await self._drop()
            raise
        if told:
            await self._drop()

    async def _current(self) -> Server:
        if self._server is None:
            self._server = await self._stack.enter_async_context(serving())
            self._server.link.answers |= {kind: lambda _: Reply() for kind in _ARRIVING}
            self.num_built += 1
        return self._server

    async def _look_after(self) -> None:
        assert self._server is not None
        self._num_unchecked = 0
        await assert_alive(self._server)
        # What the helper notes for other tests.
        self._server.commands()
        self._server.link.requests.clear()

    async def _drop(self) -> None:
        self._server, self._num_unchecked = None, 0
        await self._stack.aclose()


async def answered(server: Server, method: str, path: str, **options: Any) -> httpx.Response:
    """The reply, or the error that killed the engine meanwhile: it would never come then."""
    loop = asyncio.get_running_loop()
    died: asyncio.Future[httpx.Response] = loop.create_future()

    def failed(_: Any, context: dict[str, Any]) -> None:
        if not died.done():
            died.set_exception(context.get("exception") or RuntimeError(context["message"]))

    loop.set_exception_handler(failed)
    asked = asyncio.ensure_future(server.http.request(method, path, headers=HEADERS, **options))
    done, _ = await asyncio.wait(
        (asked, died), timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED
    )
    assert done, f"{method} {path} was not answered"
    return done.pop().result()


def assert_answer(reply: httpx.Response) -> None:
    """A result, or a refusal that says what it is about."""
    assert 200 <= reply.status_code < 300 or 400 <= reply.status_code < 500, reply.text[:500]
    if reply.status_code >= 400 and reply.headers["content-type"] == "application/json":
        told = reply.json()
        error = told["error"]
        assert error["message"] and "field" in error
        if isinstance(error["code"], str):
            assert error["code"] in WORDS[error["param"]]
        elif "success" in told:
            # The control replies of one dialect are 400, whatever the error is elsewhere.
            assert reply.status_code == 400 and 400 <= error["code"] < 500
        else:
            assert error["code"] == reply.status_code
        assert error["type"] not in ("", "InternalError", "SlipstreamError"), error
        assert len(reply.content) < 20_000, "a refusal repeats the whole value"


async def assert_alive(server: Server) -> None:
    """It answers a command and a prompt, once whatever it was told to do is taken back."""
    state = (await answered(server, "GET", "/server_info")).json()
    assert state
    await take_back(server)
    reply = await answered(
        server,
        "POST",
        "/generate",
        content=b'{"input_ids": [5], "sampling_params": {"max_new_tokens": 3}}',
    )
    assert reply.json()["output_ids"] == expected_tokens([5], 3)


async def take_back(server: Server) -> None:
    """Clear by control commands what one call may have asked for: an update that is open, memory
    that is released, weights that are gone, a pause."""
    now = await server.engine.state(max_age_s=0.0)
    if now.open_update is not None:
        await command(server, AbortUpdate(version=now.open_update))
    if now.released:
        await command(server, ResumeMemory(tags=list(now.released)))
    now = await server.engine.state(max_age_s=0.0)
    if now.refusal:
        version = now.version + 1
        await command(server, BeginUpdate(version=version))
        await command(server, LoadFromDisk(path="/step_0"))
        await command(server, CommitUpdate(version=version))
    await command(server, Resume())
    now = await server.engine.state(max_age_s=0.0)
    left = (now.paused, now.refusal, now.released, now.open_update)
    assert left == (False, "", [], None), left


async def command(server: Server, message: Command) -> None:
    """Give the engine a command by HTTP."""
    reply = await answered(server, "POST", "/command", json=msgspec.to_builtins(message))
    assert reply.status_code == 200, reply.text
