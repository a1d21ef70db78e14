"""The sessions that are open: their tokens, their limits, and when each was used last."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from engine.config import SessionConfig
from engine.errors import InvalidRequest, SessionBusy, StoreFull, UnknownSession
from engine.protocol import IntArray, OpenSession, Request
from rollout.sessions.farewells import Farewells
from rollout.sessions.names import check_name

_NO_TOKENS: IntArray = np.empty(0, np.int32)


@dataclass(eq=False, kw_only=True)
class Session:
    """One session.

    tokens: int32, of all turns that ended. rid: of the turn in progress, "" between turns;
    last_rid, last_start: of the last one that ended, and where its output begins in `tokens`.
    reserved: tokens that it may have at the end of the turn in progress. used_at: by the clock.
    """

    id: str
    max_tokens: int
    timeout_s: float
    used_at: float
    tokens: IntArray = field(default_factory=lambda: _NO_TOKENS)
    rid: str = ""
    last_rid: str = ""
    last_start: int = 0
    reserved: int = 0
    num_turns: int = 0


class OpenSessions:
    """By id. Those that are idle for too long are closed whenever another call looks.

    clock: seconds that only grow. closed: called with the id of each that expired.
    """

    def __init__(
        self,
        config: SessionConfig,
        *,
        context_length: int,
        clock: Callable[[], float],
        closed: Callable[[str], None],
    ) -> None:
        self._config = config
        self._context_length = context_length
        self._clock = clock
        self._closed = closed
        self._open: dict[str, Session] = {}
        self._gone = Farewells()

    def __len__(self) -> int:
        return len(self._open)

    def open(self, command: OpenSession) -> Session:
        """A new session. Raises InvalidRequest naming the field, StoreFull."""
        self.expire()
        name = command.session or uuid.uuid4().hex
        check_name(name, "session")
        if name in self._open:
            raise InvalidRequest(f"session {name} is open already", field="session")
        if command.max_tokens > self._context_length:
            raise InvalidRequest(
                f"max_tokens is {command.max_tokens}, above the context of {self._context_length}",
                field="max_tokens",
            )
        longest = self._config.session_timeout_s
        if command.timeout_s is not None and command.timeout_s > longest:
            raise InvalidRequest(
                f"timeout_s is {command.timeout_s:g}; this engine keeps idle sessions for at most "
                f"{longest:g} s (--session-timeout-s)",
                field="timeout_s",
            )
        if len(self._open) >= self._config.max_sessions:
            raise StoreFull(
                f"{len(self._open)} sessions are open, the most (--max-sessions); close one",
                field="session",
            )
        session = Session(
            id=name,
            max_tokens=command.max_tokens or self._context_length,
            timeout_s=longest if command.timeout_s is None else command.timeout_s,
            used_at=self._clock(),
        )
        self._gone.forget(name)
        self._open[name] = session
        return session

    def get(self, name: str) -> Session:
        """The open session of this id. Raises UnknownSession, saying what became of it."""
        self.expire()
        session = self._open.get(name)
        if session is None:
            why = self._gone.why(name) or (
                "never was open here, or went when the engine was started again"
            )
            raise UnknownSession(f"session {name[:128]!r} {why}; open another", field="session")
        return session

    def idle(self, name: str) -> Session:
        """The same, if no turn is in progress. Raises SessionBusy if one is."""
        session = self.get(name)
        if session.rid:
            raise SessionBusy(
                f"a turn of session {name} is in progress; send the next one when it has ended",
                field="session",
            )
        return session

    def reserve(self, session: Session, turn: Request) -> None:
        """Let a turn begin, whose prompt has the session's tokens; room for all that it may add is
        its own until it ends. Raises StoreFull."""
        count = len(turn.prompt_ids) + turn.sampling.max_new_tokens
        others = sum(max(len(s.tokens), s.reserved) for s in self._open.values() if s != session)
        most = self._config.session_tokens
        if others + count > most:
            raise StoreFull(
                f"other sessions have {others} tokens, and all together have room for {most}; a "
                f"turn with {count} does not fit, so close some",
                field="session",
            )
        session.rid, session.reserved = turn.rid, count

    def cancel(self, session: Session) -> None:
        """The turn never began."""
        session.rid, session.reserved = "", 0

    def ended(self, session: Session) -> None:
        """The turn in progress is over."""
        self.cancel(session)
        session.used_at = self._clock()

    def close(self, session: Session, why: str = "was closed") -> None:
        """Forget a session; whoever names it later is told why."""
        del self._open[session.id]
        self._gone.note(session.id, why)

    def expire(self) -> None:
        """Close the sessions that have been idle for too long."""
        now = self._clock()
        late = [s for s in self._open.values() if not s.rid and now - s.used_at > s.timeout_s]
        for session in late:
            self.close(session, f"was closed after {session.timeout_s:g} s without a turn")
            self._closed(session.id)
