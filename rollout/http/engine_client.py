"""The engine as the server's handlers see it: awaitable commands, a mailbox a call."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.errors import EngineDead, InvalidRequest, by_name
from engine.protocol import Abort, Call, Control, GetState, ReplicaState, Reply, Request
from engine.protocol.deadlines import REPLY_S, START_S
from rollout.http.link import EngineLink, Message
from rollout.http.mailbox import Mailbox
from rollout.process_replica import command_name, reply_deadline_s

logger = logging.getLogger(__name__)

_TICK_S = 1.0


@dataclass(kw_only=True)
class _Pending:
    """A command whose reply has not come. since: when it became the oldest of them."""

    command: Control
    future: asyncio.Future[Reply]
    since: float = field(default_factory=time.monotonic)


class AsyncEngine:
    """Requests and commands to one engine, in the order of the calls.

    Everything runs on one event loop, so a call that posts is atomic. A reply carries the id of
    its call; a command whose reply that misses its deadline ends the engine, and from then on
    every call raises the same EngineDead.

    reply_s: deadline for the leader to answer, and to say anything while requests run.
    slow_s: deadline for commands that touch weights or memory.
    """

    def __init__(
        self, link: EngineLink, *, reply_s: float = REPLY_S, slow_s: float = START_S
    ) -> None:
        self._link = link
        self._reply_s = reply_s
        self._slow_s = slow_s
        self._mailboxes: dict[str, Mailbox] = {}
        self._pending: dict[int, _Pending] = {}
        self._last_id = 0
        self._held: list[list[Request]] | None = None
        self._dead: EngineDead | None = None
        self._state: ReplicaState | None = None
        self._state_at = 0.0
        self._heard_at = time.monotonic()
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to listen, and learn what the engine is."""
        self._link.start(self._deliver, self._fail)
        self._watch = asyncio.create_task(self._watchdog())
        await self.send(GetState())

    async def close(self) -> None:
        """End the engine; whoever waits gets EngineDead. Idempotent."""
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
            self._watch = None
        self._link.stop()
        self._end(EngineDead("the server is shutting down", field="server"))
        await asyncio.to_thread(self._link.close)

    @property
    def dead(self) -> EngineDead | None:
        """Why the engine is gone, if it is."""
        return self._dead

    @property
    def num_open(self) -> int:
        """Sequences sent to the engine whose final output has not come."""
        return len(self._mailboxes) - sum(len(requests) for requests in self._held or [])

    @property
    def facts(self) -> ReplicaState:
        """The last state heard: its constants hold, its counts may be old."""
        assert self._state is not None, "start() has not finished"
        return self._state

    def submit(self, requests: Sequence[Request]) -> Mailbox:
        """Queue sequences; their outputs, refusals included, come to the mailbox.

        Raises InvalidRequest (`rid`) if an id is in use, EngineDead.
        """
        self._require_alive()
        rids = {request.rid for request in requests}
        used = rids & self._mailboxes.keys()
        if used or len(rids) < len(requests):
            name = min(used) if used else _first_double(requests)
            raise InvalidRequest(f"rid {name!r} is already in use", field="rid")
        mailbox = Mailbox(rids)
        self._mailboxes.update((rid, mailbox) for rid in rids)
        if self._held is None:
            self._post(list(requests))
        else:
            self._held.append(list(requests))
        return mailbox

    def discard(self, mailbox: Mailbox, *, prefix: str = "") -> None:
        """Abort what is open of a mailbox that nobody reads any more, by one command if all
        its ids begin with `prefix`."""
        rids = list(mailbox.open)
        for rid in rids:
            self._mailboxes.pop(rid, None)
        if self._held is not None:
            self._held = [[r for r in held if r.rid not in mailbox.open] for held in self._held]
        if self._dead is not None or not rids:
            return
        message = "the client left"
        if prefix:
            self.post([Abort(rid_prefix=prefix, message=message)])
        else:
            self.post([Abort(rid=rid, message=message) for rid in rids])

    def hold(self) -> None:
        """Keep requests submitted from now on here, until `release`. Idempotent."""
        if self._held is None:
            self._held = []

    def release(self) -> None:
        """Send the engine what was held. Idempotent."""
        held, self._held = self._held or [], None
        if held and self._dead is None:
            self._post([request for requests in held for request in requests])

    async def send(self, command: Control) -> Reply:
        """Run a control command. Raises its typed error, or EngineDead."""
        self._require_alive()
        (future,) = self.post([command])
        reply = await asyncio.shield(future)
        if reply.error is not None:
            raise by_name(reply.error.kind, reply.error.message, reply.error.field)
        return reply

    def post(self, commands: Sequence[Control]) -> list[asyncio.Future[Reply]]:
        """Queue commands without waiting; a reply may be left unread."""
        for command in commands:
            if isinstance(command, Abort) and self._held is not None:
                self._post_held(command)
        loop = asyncio.get_running_loop()
        pending = [_Pending(command=command, future=loop.create_future()) for command in commands]
        for entry in pending:
            # A failure nobody waits for is told to everyone else by `dead`.
            entry.future.add_done_callback(_look_at)
        calls = [Call(id=self._last_id + i, command=c) for i, c in enumerate(commands, 1)]
        self._last_id += len(calls)
        self._pending.update((call.id, entry) for call, entry in zip(calls, pending, strict=True))
        self._post(calls)
        return [entry.future for entry in pending]

    async def state(self, *, max_age_s: float = 0.2, patience_s: float = 0.5) -> ReplicaState:
        """State of the engine, at most `max_age_s` old; an older one if a long command keeps
        the engine from answering within `patience_s`. Raises EngineDead."""
        self._require_alive()
        if time.monotonic() - self._state_at > max_age_s:
            asked = next((p for p in reversed(self._pending.values()) if _asks_state(p)), None)
            future = asked.future if asked is not None else self.post([GetState()])[0]
            await asyncio.wait([future], timeout=patience_s)
            self._require_alive()
        return self.facts

    def _post_held(self, abort: Abort) -> None:
        """Send the engine those held requests that it is about to be told to abort."""
        named: list[Request] = []
        kept: list[list[Request]] = []
        for requests in self._held or []:
            named += [request for request in requests if _names(abort, request)]
            kept.append([request for request in requests if not _names(abort, request)])
        self._held = kept
        if named:
            self._post(named)

    def _post(self, messages: Sequence[Request | Call]) -> None:
        self._require_alive()
        try:
            self._link.post(messages)
        except EngineDead as error:
            self._fail(error)
            self._require_alive()

    def _deliver(self, messages: Sequence[Message]) -> None:
        self._heard_at = time.monotonic()
        for message in messages:
            if isinstance(message, Reply):
                self._answer(message)
                continue
            mailbox = self._mailboxes.get(message.rid)
            if mailbox is None:
                continue
            if message.finish is not None:
                del self._mailboxes[message.rid]
            mailbox.put(message)

    def _answer(self, reply: Reply) -> None:
        entry = self._pending.pop(reply.id)
        for oldest in self._pending.values():
            oldest.since = time.monotonic()
            break
        # Any other command may have changed what was known.
        self._state_at = 0.0 if reply.state is None else time.monotonic()
        self._state = reply.state or self._state
        if not entry.future.done():
            entry.future.set_result(reply)

    def _fail(self, error: EngineDead) -> None:
        if self._dead is None:
            logger.error("the engine is gone: %s", error)
            self._end(error)

    def _end(self, error: EngineDead) -> None:
        self._dead = self._dead or error
        for mailbox in set(self._mailboxes.values()):
            mailbox.fail(error)
        self._mailboxes.clear()
        for entry in self._pending.values():
            if not entry.future.done():
                entry.future.set_exception(EngineDead(error.message, field=error.field))
        self._pending.clear()

    def _require_alive(self) -> None:
        if self._dead is not None:
            raise EngineDead(self._dead.message, field=self._dead.field)

    async def _watchdog(self) -> None:
        while self._dead is None:
            await asyncio.sleep(_TICK_S)
            if self._dead is None:
                self._look_at_the_clock(time.monotonic())

    def _look_at_the_clock(self, now: float) -> None:
        if not self._pending:
            if self._mailboxes and now - self._heard_at > self._reply_s:
                self.post([GetState()])
            return
        oldest = next(iter(self._pending.values()))
        limit_s = reply_deadline_s(oldest.command, reply_s=self._reply_s, slow_s=self._slow_s)
        if now - oldest.since > limit_s:
            name = command_name(oldest.command)
            self._link.stop()
            self._fail(self._link.kill(f"did not answer '{name}' within {limit_s:g} s"))


def _asks_state(pending: _Pending) -> bool:
    return isinstance(pending.command, GetState)


def _names(abort: Abort, request: Request) -> bool:
    prefix = abort.rid_prefix
    return abort.all or request.rid == abort.rid or bool(prefix and request.rid.startswith(prefix))


def _first_double(requests: Sequence[Request]) -> str:
    seen: set[str] = set()
    for request in requests:
        if request.rid in seen:
            return request.rid
        seen.add(request.rid)
    raise AssertionError("every id is there once")


def _look_at(future: asyncio.Future[Reply]) -> None:
    if not future.cancelled():
        future.exception()
