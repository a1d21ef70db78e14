"""The engine as the server's handlers see it: awaitable commands, a mailbox a call."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence

from engine.errors import CommandTimeout, EngineDead, NoVersion
from engine.protocol import (
    Abort,
    Call,
    Command,
    CommitUpdate,
    FrontGone,
    GetState,
    LeaderMessage,
    ReplicaState,
    Reply,
    Request,
)
from engine.protocol.deadlines import REPLY_S, START_S
from rollout.http.engine.drain import Drain
from rollout.http.engine.last_heard import LastHeard, Listener
from rollout.http.engine.link import EngineLink, Message
from rollout.http.engine.mailbox import Mailbox, Mailboxes
from rollout.http.engine.outbox import PART, Outbox, Unsent
from rollout.http.engine.pending_commands import AwaitedReplies
from rollout.replica.command_replies import command_name, reply_deadline_s, unless_refused
from rollout.requests.message_ranges import check_ranges
from rollout.requests.outputs import ended_unsent

logger = logging.getLogger(__name__)

_TICK_S = 1.0
_BEAT_S = 5.0
_PART_S = 1.0  # For which a part waits for the engine to have taken in the one before.
_START_ID = 0  # Of the reply by which a leader says that it is ready.


class AsyncEngine:
    """Requests and commands to one engine, in the order of the calls.

    Everything runs on one event loop, so a call that posts is atomic. A message that cannot be
    encoded is refused to its caller and leaves no trace. Replies are told apart by the ids of
    their calls. A command that misses its own deadline fails alone while the engine says
    anything else, and ends the engine if it is silent; from then on every call raises the same
    EngineDead, until `restart` gives another engine. outbox: holds requests back when told to.

    reply_s: deadline for the leader to answer, and to say anything while requests run.
    slow_s: deadline for commands that touch weights or memory. shared: by other processes, too.
    """

    def __init__(
        self,
        link: EngineLink,
        *,
        reply_s: float = REPLY_S,
        slow_s: float = START_S,
        shared: bool = False,
    ) -> None:
        self._link = link
        self.shared = shared
        self._reply_s = reply_s
        self._slow_s = slow_s
        self._mailboxes = Mailboxes()
        self._pending = AwaitedReplies()
        self._last_id = _START_ID
        self.outbox = Outbox(self._post, self._part_taken)
        self.drain = Drain()
        self._dead: EngineDead | None = None
        self._leaving: EngineDead | None = None
        self._starting = False
        self.listeners: list[Listener] = []  # Told of every reply.
        self._heard = LastHeard(self.listeners)
        self._watch: asyncio.Task[None] | None = None
        self._on_death: list[Callable[[EngineDead], None]] = []
        self._on_restart: list[Callable[[], None]] = []
        self._admit: Callable[[Command], None] | None = None

    async def start(self) -> None:
        """Begin to listen, and learn what the engine is."""
        self._link.start(self._deliver, self._fail)
        self._watch = asyncio.create_task(self._watchdog())
        await self.send(GetState())

    async def restart(self, link: EngineLink, *, start_s: float, no_version: str = "") -> None:
        """Go on with another engine, which is being built at the other end of `link`; returns
        once it is ready. Until then every call raises the EngineDead of the old one.

        no_version: why what it loaded may not serve, if so; requests get NoVersion until a whole
        version was published. Raises the error that the engine could not be built for.
        """
        assert self._dead is not None, "the engine is alive"
        self._link = link
        future = self._pending.add(_START_ID, GetState(), time.monotonic(), start_s)
        self._starting = True
        try:
            link.start(self._deliver, self._fail)
            unless_refused(await future)
        finally:
            self._starting = False
            self._pending.fail(self._dead)
        self._heard.renewed(no_version)
        self._dead = None
        for call in self._on_restart:
            call()

    async def leave(self, patience_s: float) -> None:
        """The server is going to end: refuse what comes, and end what is open. A request ends
        with finish "abort" and its tokens so far; what the engine has not answered within
        `patience_s` fails with EngineDead."""
        self._leaving = EngineDead("the server is shutting down", field="server")
        if self._dead is None and len(self._mailboxes):
            with contextlib.suppress(EngineDead):
                self.post([Abort(all=True, message=self._leaving.message)])
        deadline = time.monotonic() + patience_s
        while self._dead is None and (len(self._mailboxes) or len(self._pending)):
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(0.02)
        self._end(self._leaving)

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

    def guard(self, admit: Callable[[Command], None]) -> None:
        """Have `admit` called with every command before it is sent; what it raises, the caller
        gets."""
        self._admit = admit

    def on_death(self, call: Callable[[EngineDead], None]) -> None:
        """Have `call` called, with the reason, when the engine is gone by itself."""
        self._on_death.append(call)

    def on_restart(self, call: Callable[[], None]) -> None:
        """Have `call` called when another engine has taken over: what was known of the old
        one's groups, updates and memory no longer holds."""
        self._on_restart.append(call)

    def explain(self, message: str) -> None:
        """What calls to an engine that is gone are told from now on."""
        assert self._dead is not None, "the engine is alive"
        self._dead = EngineDead(message, field=self._dead.field)

    @property
    def dead(self) -> EngineDead | None:
        """Why the engine is gone, if it is."""
        return self._dead

    @property
    def leaving(self) -> EngineDead | None:
        """Set once the server is about to end."""
        return self._leaving

    @property
    def no_version(self) -> str:
        """Why requests are refused since the engine was started again, or ""."""
        return self._heard.no_version

    @property
    def version(self) -> int:
        """The last version that was loaded, committed, or given to the weights by name."""
        return max(self._heard.version, self.facts.version)

    @property
    def took_update(self) -> bool:
        """Whether an engine behind this object has committed any update: then the weights that
        the model's folder holds are not those of `version`."""
        return self._heard.took_update

    @property
    def num_open(self) -> int:
        """Sequences sent to the engine whose final output has not come, about so many if other
        processes send some, too."""
        own = len(self._mailboxes) - len(self.outbox)
        return max(own, self._heard.num_unfinished) if self.shared else own

    @property
    def facts(self) -> ReplicaState:
        """The last state heard: its constants hold, its counts may be old."""
        return self._heard.facts

    def stalled_s(self) -> float:
        """For how long requests that may run have seen no step and no output; 0.0 if that is
        less than the deadline for the leader to say anything."""
        silent = self._dead is not None or not self.num_open
        return 0.0 if silent else self._heard.stalled_s(beyond=self._reply_s)

    @property
    def late(self) -> str:
        """What the engine takes unusually long for, "" if nothing does: it may hang."""
        return "" if self._dead is not None else self._link.late

    def check_open(self) -> None:
        """Raise EngineDead or NoVersion if requests are refused now, whatever they ask for."""
        self._require_open()
        if self.no_version:
            raise NoVersion(self.no_version, field="version")

    def check_ids(self, rids: list[str]) -> None:
        """Raise InvalidRequest (`rid`) if one of these ids comes twice or is in use."""
        self._mailboxes.check_free(rids)

    def submit(self, requests: Sequence[Request]) -> Mailbox:
        """Queue sequences; their outputs, refusals included, come to the mailbox.

        Raises InvalidRequest if an id is in use (`rid`) or a request cannot be encoded, EngineDead,
        NoVersion while an engine that was started again has no version to serve; nothing is
        queued then.
        """
        box = self._mailbox_of(requests)
        try:
            self.outbox.send(requests)
        except BaseException:
            self._mailboxes.cancel(box)
            raise
        return box

    def check_room(self, count: int) -> None:
        """Raise QueueFull if `count` more sequences cannot wait now: before they are made."""
        # Those that are held here will wait in the engine, all at once.
        self._heard.check_room(len(self._mailboxes), count)

    async def submit_all(self, requests: Sequence[Request]) -> Mailbox:
        """`submit` of sequences that may be many: the engine gets them in parts, each after it
        has answered since the one before, so that others are served in between."""
        if len(requests) <= PART or self.outbox.holds:
            return self.submit(requests)
        unsent, box = Unsent(requests), self._mailbox_of(requests)

        def check() -> None:
            self.check_open()
            box.check()

        try:
            await self.outbox.send_parts(unsent, check)
        except BaseException:
            self._mailboxes.forget(box, unsent.clear())
            self.discard(box)
            raise
        return box

    def discard(self, mailbox: Mailbox) -> None:
        """Abort what is open of a mailbox that nobody reads any more."""
        rids = set(mailbox.open)
        if not rids or self._dead is not None:
            return
        held = self.outbox.forget(rids)
        self._mailboxes.forget(mailbox, held)
        sent = sorted(rids - held)
        if sent:
            self._mailboxes.drop(sent)
            with contextlib.suppress(EngineDead):
                self.post([Abort(rids=sent, message="the client left")])

    def _mailbox_of(self, requests: Sequence[Request]) -> Mailbox:
        self.check_open()
        if not self.num_open:
            self._heard.progress_at = time.monotonic()
        return self._mailboxes.open([request.rid for request in requests])

    async def _part_taken(self) -> None:
        """Wait until the engine has taken in what it was sent, or for so long."""
        await asyncio.wait(self.post([GetState()]), timeout=_PART_S)

    async def send(self, command: Command) -> Reply:
        """Run a control command. Raises its typed error, InvalidRequest if it cannot be
        encoded, CommandTimeout, or EngineDead."""
        self._require_open()
        (future,) = self.post([command])
        reply = unless_refused(await asyncio.shield(future))
        if self.no_version and isinstance(command, CommitUpdate):
            await asyncio.shield(self.post([GetState()])[0])
        return reply

    def post(self, commands: Sequence[Command]) -> list[asyncio.Future[Reply]]:
        """Queue commands without waiting; a reply may be left unread. Raises like `send`, all
        of them or none being queued."""
        for command in commands:
            check_ranges(command)
            if self._admit is not None:
                self._admit(command)
        commands = [self._mailboxes.resolved(command) for command in commands]
        for abort in (command for command in commands if isinstance(command, Abort)):
            for request in self.outbox.take_named(abort):
                self._mailboxes.end(ended_unsent(request, abort.message))
        calls = [Call(id=self._last_id + i, command=c) for i, c in enumerate(commands, 1)]
        self._post(calls)
        self._last_id += len(calls)
        return [self._await(call) for call in calls]

    def forget_front(self, name: str) -> None:
        """A front process is gone: end what it had sent the engine."""
        with contextlib.suppress(EngineDead):
            self._post([FrontGone(name=name)])

    async def state(self, *, max_age_s: float = 0.2, patience_s: float = 0.5) -> ReplicaState:
        """State of the engine, at most `max_age_s` old; an older one if a long command keeps
        the engine from answering within `patience_s`. Raises EngineDead."""
        self._require_alive()
        if time.monotonic() - self._heard.state_at > max_age_s:
            await asyncio.wait([self._ask_state()], timeout=patience_s)
            self._require_alive()
        return self.facts

    def _ask_state(self) -> asyncio.Future[Reply]:
        """The reply to the last GetState that is under way, or to a new one."""
        last = self._pending.last_of(GetState)
        return last if last is not None else self.post([GetState()])[0]

    def _await(self, call: Call) -> asyncio.Future[Reply]:
        limit_s = reply_deadline_s(call.command, reply_s=self._reply_s, slow_s=self._slow_s)
        return self._pending.add(call.id, call.command, time.monotonic(), limit_s)

    def _post(self, messages: Sequence[LeaderMessage]) -> None:
        self._require_alive()
        try:
            self._link.post(messages)
        except EngineDead as error:
            self._fail(error)
            self._require_alive()

    def _deliver(self, messages: Sequence[Message]) -> None:
        self._heard.heard_at = time.monotonic()
        for message in messages:
            if isinstance(message, Reply):
                self._answer(message)
            else:
                self._heard.progress_at = self._heard.heard_at
                self._mailboxes.deliver(message)

    def _answer(self, reply: Reply) -> None:
        entry = self._pending.answered(reply.id)
        if entry is None:
            logger.warning("a reply to call %d is ignored: nobody waits for it", reply.id)
            return
        self._heard.learn(entry.command, reply, starting=self._starting)
        if not entry.future.done():
            entry.future.set_result(reply)

    def _fail(self, error: EngineDead) -> None:
        # What the old engine's link still notices must not be taken for the next one's end.
        self._link.stop()
        if self._starting:
            self._pending.fail(error)
        elif self._dead is None:
            logger.error("the engine is gone: %s", error)
            self._end(error)
            for call in self._on_death:
                call(error)

    def _end(self, error: EngineDead) -> None:
        self._dead = self._dead or error
        self._mailboxes.fail(error)
        self.outbox.clear()
        self._pending.fail(error)

    def _require_alive(self) -> None:
        if self._dead is not None:
            raise self._dead.copy()

    def _require_open(self) -> None:
        if self._leaving is not None:
            raise self._leaving.copy()
        self._require_alive()

    async def _watchdog(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._look_at_the_clock(time.monotonic())

    def _look_at_the_clock(self, now: float) -> None:
        silent_s = now - self._heard.heard_at
        for entry in self._pending.take_late(now):
            name = command_name(entry.command)
            if self._starting or silent_s > self._reply_s:
                self._link.stop()
                error = self._link.kill(f"did not answer '{name}' within {entry.limit_s:g} s")
                entry.fail(error)
                self._fail(error)
                return
            message = f"the engine lives but did not answer '{name}' within {entry.limit_s:g} s"
            logger.error("%s", message)
            entry.fail(CommandTimeout(message, field=name))
        waited_for = self.shared or len(self._pending) or len(self._mailboxes)
        if self._dead is None and waited_for and silent_s > min(_BEAT_S, self._reply_s / 4):
            # Alive is what answers anything, whatever else is slow.
            with contextlib.suppress(EngineDead):
                self._ask_state()
