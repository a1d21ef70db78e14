"""Programs on a replica: their requests are in it at once, and one task steps it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import cached_property

from engine.errors import EngineDead, InvalidRequest, by_name
from engine.protocol import GenerateRequest, GenerateResponse, ReplicaState, Request, RequestOutput
from rollout.replica.base import Replica
from rollout.replica.inline import InlineReplica
from rollout.requests.expand import expand
from rollout.requests.generate import OpenRequests
from rollout.requests.respond import respond
from rollout.text.tokenizer import Tokenizer, load_tokenizer

_TURNS = 3
"""Times that tasks may run between two steps while something has finished: as many as a branch
needs from its last reply to its parent's next request."""
_YIELD_S = 0.002
"""Longest that steps of a replica of this process go on before other tasks, such as functions that
a model called, have their turn."""


class ReplicaBackend:
    """A `Backend` over a replica that nobody else steps meanwhile. tokenizer: the one of the
    replica's model unless given."""

    def __init__(self, replica: Replica, tokenizer: Tokenizer | None = None) -> None:
        self._replica = replica
        self._given = tokenizer

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """See `Backend`. Raises ModelNotFound if the model came without one."""
        return self._given or load_tokenizer(self._replica.state().model)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[ReplicaSession]:
        """See `Backend`. Raises InvalidRequest (`pause`) for a replica that is paused."""
        state = self._replica.state()
        if state.paused:
            raise InvalidRequest("the replica is paused; send Resume first", field="pause")
        session = ReplicaSession(self._replica, self.tokenizer, state)
        try:
            yield session
        finally:
            await session.close()


class ReplicaSession:
    """A `Session`: every call of the replica is made by one task, and of one that works in another
    process, in one thread beside the event loop."""

    def __init__(self, replica: Replica, tokenizer: Tokenizer, state: ReplicaState) -> None:
        self._replica = replica
        self._tokenizer = tokenizer
        self._state = state
        self._open = OpenRequests(replica, tokenizer, state)
        self._waiting: dict[str, asyncio.Future[RequestOutput]] = {}
        self._new: list[Request] = []
        self._unsent: deque[Request] = deque()
        self._left: list[str] = []
        self._driver: asyncio.Task[None] | None = None
        self._error: Exception | None = None
        self._yielded_at = 0.0
        own = isinstance(replica, InlineReplica)
        self._thread = None if own else ThreadPoolExecutor(1, thread_name_prefix="programs")

    async def generate(self, wire: GenerateRequest) -> GenerateResponse:
        """See `Session`."""
        if self._error is not None:
            raise self._error
        # Sampling parameters were looked at when they were read, and the replica looks again.
        [request] = expand(wire, self._tokenizer, self._state, 0, decoded=True)
        future = asyncio.get_running_loop().create_future()
        self._waiting[request.rid] = future
        self._new.append(request)
        self._drive()
        try:
            output = await future
        except asyncio.CancelledError:
            self._waiting.pop(request.rid, None)
            self._left.append(request.rid)
            self._drive()
            raise
        if (finish := output.finish) is not None and finish.error is not None:
            raise by_name(finish.error, finish.message or "", finish.field or "")
        return respond(wire, request, output, self._tokenizer)

    async def close(self) -> None:
        """Abort what is left, and return once the replica has ended it."""
        self._left += self._waiting
        if self._error is None and (self._left or self._driver is not None):
            self._drive()
        if self._driver is not None:
            await self._driver
        for future in self._waiting.values():
            future.cancel()
        if self._thread is not None:
            self._thread.shutdown()

    def _drive(self) -> None:
        if self._driver is None or self._driver.done():
            self._driver = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        """Step the replica until nothing is open."""
        try:
            while await self._call() or self._new or self._left:
                if time.monotonic() > self._yielded_at + _YIELD_S:
                    await self._yield(1)
        except Exception as error:  # whoever waits for a reply is told
            self._error = error
            self._fail(error)

    async def _call(self) -> bool:
        """Make one step; whether anything is open."""
        left, self._left = self._left, []
        new, self._new = [r for r in self._new if r.rid in self._waiting], []
        if self._thread is None:
            finished = self._step(new, left)
        else:
            loop = asyncio.get_running_loop()
            finished = await loop.run_in_executor(self._thread, self._step, new, left)
        for output in finished or ():
            future = self._waiting.pop(output.rid, None)
            if future is not None and not future.done():
                future.set_result(output)
        if finished:
            await self._yield(_TURNS)
        return finished is not None

    async def _yield(self, turns: int) -> None:
        """Let other tasks run."""
        for _ in range(turns):
            await asyncio.sleep(0)
        self._yielded_at = time.monotonic()

    def _step(self, new: list[Request], left: list[str]) -> list[RequestOutput] | None:
        """One step with what is new and without what was left; None if nothing is open."""
        self._unsent += new
        if left:
            self._open.drop(left)
            self._unsent = deque(r for r in self._unsent if r.rid not in left)
        if not self._open.refill(self._submitted()):
            return None
        return self._open.step()

    def _submitted(self) -> Iterator[Request]:
        while self._unsent:
            yield self._unsent.popleft()

    def _fail(self, error: Exception) -> None:
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(_told(error))


def _told(error: Exception) -> Exception:
    """The error for one of many that wait."""
    return error.copy() if isinstance(error, EngineDead) else error
