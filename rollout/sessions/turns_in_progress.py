"""Requests that are turns of sessions: what they become on their way in, and what a session has
once they ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from msgspec.structs import replace

from engine.config import SessionConfig
from engine.errors import ContextTooLong, InvalidRequest
from engine.protocol import (
    CloseSession,
    GetSession,
    IntArray,
    OpenSession,
    Reply,
    Request,
    RequestOutput,
    RolloutCommand,
    SessionCommand,
    SessionState,
    Stop,
    TokenRows,
)
from rollout.cache.idle_kv import IdleKvs
from rollout.scheduler.copies.schedulers import ReplicaScheduler
from rollout.scheduler.emit import StepOutput
from rollout.sessions.open_rollouts import OpenRollouts
from rollout.sessions.open_sessions import OpenSessions, Session

Add = Callable[[Request], RequestOutput | None]
Emit = Callable[[list[RequestOutput]], None]


@dataclass(kw_only=True)
class _Turn:
    """prompt: int32, the session's tokens and those of the turn. chunks: of its output so far.
    cut_at: output tokens up to a stop string that was seen, -1 without."""

    session: Session
    prompt: IntArray
    cut_at: int = -1
    chunks: list[IntArray] = field(default_factory=list)


class SessionTurns:
    """The sessions of one leader, and the rollouts that are captured beside it.

    A turn counts once its reply ended by a stop or a length; whatever else ends it leaves its
    session as it was, so that it can be sent again.

    emit: takes outputs of turns that a command ended. clock: as in `OpenSessions`.
    """

    def __init__(
        self,
        scheduler: ReplicaScheduler,
        config: SessionConfig,
        context_length: int,
        *,
        emit: Emit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._emit = emit
        self._turns: dict[str, _Turn] = {}
        self.sessions = OpenSessions(
            config, context_length=context_length, clock=clock, closed=self._drop_kv
        )
        self.rollouts = OpenRollouts(config, clock)

    @property
    def facts(self) -> dict[str, Any]:
        """Fields of `ReplicaState`."""
        self.sessions.expire()
        held_pages = sum(idle.num_pages for idle in self._idle)
        self.rollouts.expire()
        return {
            "num_sessions": len(self.sessions),
            "num_rollouts": len(self.rollouts),
            "held_pages": held_pages,
        }

    def admit(self, request: Request, add: Add) -> RequestOutput | None:
        """`add` a request, as its session has it if it is a turn of one.

        Raises UnknownSession, SessionBusy, StoreFull, InvalidRequest naming the field, and what
        `add` does; the session is as it was then.
        """
        if request.session == "" or not isinstance(request.session, str):
            if request.session_at != -1:
                raise InvalidRequest("session_at is for turns of a session", field="session_at")
            return add(request)
        session = self.sessions.idle(request.session)
        request = _with_history(request, session)
        self.sessions.reserve(session, request)
        try:
            answer = add(request)
        except BaseException:
            self.sessions.cancel(session)
            raise
        self._turns[request.rid] = _Turn(session=session, prompt=request.prompt_ids)
        return answer

    def take(self, outputs: Iterable[StepOutput]) -> None:
        """Look at outputs on their way out: those of turns are noted, and the last of each ends
        its turn. Columns have none of turns."""
        if not self._turns:
            return
        for output in outputs:
            if isinstance(output, TokenRows) or (turn := self._turns.get(output.rid)) is None:
                continue
            turn.chunks.append(output.token_ids)
            if output.finish is not None:
                del self._turns[output.rid]
                self._end(turn, output)

    def stop(self, stop: Stop) -> list[RequestOutput]:
        """End a request where a stop string was seen; its last output, none if it is gone. The
        output of a turn ends there also where the engine has ended it later or otherwise."""
        turn = self._turns.get(stop.rid)
        if turn is not None:
            turn.cut_at = stop.num_tokens
        elif stop.session:
            session = self.sessions.get(stop.session)
            if session.last_rid == stop.rid:
                session.tokens = session.tokens[: session.last_start + stop.num_tokens]
        return self._scheduler.stop(stop.rid, stop.num_tokens, stop.matched)

    def handle(self, command: SessionCommand | RolloutCommand) -> Reply:
        """Run a command. Raises its typed error."""
        match command:
            case OpenSession():
                return self._reply(self.sessions.open(command))
            case GetSession():
                session = self.sessions.get(command.session)
                found = self._state(session)
                return Reply(session=replace(found, token_ids=session.tokens))
            case CloseSession():
                return self._close(self.sessions.get(command.session))
            case _:
                return self.rollouts.handle(command)

    def _close(self, session: Session) -> Reply:
        if session.rid:
            self._emit(self._scheduler.abort(rids=[session.rid], message="its session was closed"))
            self._turns.pop(session.rid, None)
        self.sessions.close(session)
        self._drop_kv(session.id)
        return Reply()

    def _end(self, turn: _Turn, output: RequestOutput) -> None:
        session = turn.session
        self.sessions.ended(session)
        assert output.finish is not None
        if output.finish.type not in ("stop", "length") and turn.cut_at < 0:
            return
        start = len(turn.prompt)
        # A stream may have returned tokens beyond the stop string that ended it.
        end = start + output.start + len(output.token_ids)
        if turn.cut_at >= 0:
            end = min(end, start + turn.cut_at)
        session.tokens = np.concatenate((turn.prompt, *turn.chunks)).astype(np.int32)[:end]
        session.last_rid, session.last_start = output.rid, start
        session.num_turns += 1

    def _reply(self, session: Session) -> Reply:
        return Reply(session=self._state(session))

    def _state(self, session: Session) -> SessionState:
        return SessionState(
            session=session.id,
            max_tokens=session.max_tokens,
            timeout_s=session.timeout_s,
            num_tokens=len(session.tokens),
            num_turns=session.num_turns,
            busy=bool(session.rid),
            held_tokens=sum(idle.num_tokens(session.id) for idle in self._idle),
        )

    def _drop_kv(self, name: str) -> None:
        for idle in self._idle:
            idle.drop(name)

    @property
    def _idle(self) -> list[IdleKvs]:
        """What sessions hold on each copy of the model."""
        return [copy.running.cache.idle for copy in self._scheduler.copies]


def _with_history(request: Request, session: Session) -> Request:
    """The request with the tokens of its session before its own, and at most what it leaves behind
    them. Raises InvalidRequest naming the field, ContextTooLong."""
    for name, neutral in (("prompt_logprob_start", -1), ("hold_at", -1), ("task", "generate")):
        if getattr(request, name) != neutral:
            raise InvalidRequest(f"{name} is not for turns of a session; leave it out", field=name)
    if request.output_ids is not None:
        raise InvalidRequest(
            "output_ids is not for turns of a session; leave it out", field="output_ids"
        )
    if not -1 <= request.session_at <= len(session.tokens):
        raise InvalidRequest(
            f"session_at is {request.session_at}; session {session.id} has {len(session.tokens)} "
            "tokens; give as many or fewer, or -1 for all",
            field="session_at",
        )
    before = session.tokens if request.session_at < 0 else session.tokens[: request.session_at]
    prompt = np.concatenate((before, request.prompt_ids)).astype(np.int32)
    if request.routed_experts_start_len > len(prompt):
        raise InvalidRequest(
            f"routed_experts_start_len is {request.routed_experts_start_len}; session {session.id} "
            f"has {len(prompt)} tokens with its turn, so give a position in [0, {len(prompt)}]",
            field="routed_experts_start_len",
        )
    room = session.max_tokens - len(prompt)
    if room < 1:
        raise ContextTooLong(
            f"session {session.id} has {len(before)} tokens and takes {session.max_tokens}; a turn "
            f"of {len(request.prompt_ids)} leaves no room for a reply",
            field="session",
        )
    sampling = request.sampling
    if sampling.max_new_tokens > room:
        sampling = replace(sampling, max_new_tokens=room)
    return replace(request, prompt_ids=prompt, sampling=sampling)
