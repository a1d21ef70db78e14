"""How messages of several processes become the one stream of a leader, and how answers go back.

The process that started the leader is its owner: it alone sends control commands. Fronts send
requests, and what ends them. Used by `rollout.replica.leader_main`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from engine.errors import InvalidRequest
from engine.protocol import (
    Abort,
    Call,
    FrontGone,
    GetState,
    Reply,
    Request,
    RequestOutput,
    Stop,
    TokenRows,
)
from rollout.replica.columns import to_columns
from rollout.replica.command_replies import command_name, error_info
from rollout.replica.fronts.askers import OWNER, Askers, front_of
from rollout.replica.ipc import Channel, Hub, Unreadable
from rollout.requests.outputs import refused, refused_id

logger = logging.getLogger(__name__)

_SEND_S = 30.0
_FIRST_ID = 1 << 40
"""Calls of fronts are numbered from here on, beyond any number that an owner reaches."""
_OF_FRONTS = (Abort, Stop, GetState)

Message = Reply | RequestOutput | TokenRows


class FrontDoor:
    """The callers of one leader.

    What comes is taken in as one stream. An id of a request is in use for all callers while it is
    for one of them, and calls get numbers of their own, so that every answer goes to whoever
    asked. hub: where fronts come in; None without any, and then everything is the owner's.
    """

    def __init__(self, owner: Channel, hub: Hub | None = None) -> None:
        self._owner = owner
        self._hub = hub
        self._askers = Askers()
        self._calls: dict[int, tuple[str, int]] = {}
        self._last_id = _FIRST_ID
        self._gone: set[str] = set()

    def receive_waiting(self, *, timeout_s: float, max_messages: int) -> list[Any]:
        """What waits, as `Channel.receive_waiting` gives it; empty if nothing comes in time.

        max_messages: about the most, of the owner and of the fronts together with it.
        """
        if self._hub is None:
            return self._owner.receive_waiting(timeout_s=timeout_s, max_messages=max_messages)
        if timeout_s:
            self._hub.wait(self._owner, timeout_s=timeout_s)
        # In this order: what fronts had sent before a command of the owner is there once that
        # is, and takes effect before it.
        of_owner = self._owner.receive_waiting(timeout_s=0.0, max_messages=max_messages)
        messages: list[Any] = []
        for name, found in self._hub.receive_waiting(max_messages=max_messages):
            messages += self._taken(name, found)
        return messages + self._taken(OWNER, of_owner)

    def send(self, messages: Sequence[Message]) -> None:
        """Send each answer to whoever asked. Raises EngineDead if the owner takes nothing."""
        if self._hub is None:
            self._owner.send(to_columns(messages), timeout_s=_SEND_S)
            return
        parts: dict[str, list[Message]] = {}
        for message in messages:
            if isinstance(message, TokenRows):
                for name, rows in self._askers.parts(message):
                    parts.setdefault(name, []).append(rows)
                continue
            if isinstance(message, Reply):
                name, number = self._calls.pop(message.id, (OWNER, message.id))
                message = replace(message, id=number)
            else:
                name = self._askers.take(message)
            parts.setdefault(name, []).append(message)
        for name, part in parts.items():
            self._send_to(name, part)

    def close(self, *, linger_s: float) -> None:
        """Close both; what is not yet sent gets `linger_s` to leave. Idempotent."""
        self._owner.close(linger_s=linger_s)
        if self._hub is not None:
            self._hub.close(linger_s=linger_s)

    def _send_to(self, name: str, messages: Sequence[Message]) -> None:
        if name == OWNER:
            self._owner.send(to_columns(messages), timeout_s=_SEND_S)
        elif front_of(name) not in self._gone:
            assert self._hub is not None, "without a hub everything is the owner's"
            self._hub.send(name, to_columns(messages))

    def _taken(self, name: str, messages: Sequence[Any]) -> list[Any]:
        """Those of one caller's messages that go on to the leader; the others are answered."""
        if front_of(name) in self._gone:
            return []
        found = (self._one(name, message) for message in messages)
        return [message for message in found if message is not None]

    def _one(self, name: str, message: Any) -> Any:
        match message:
            case Request():
                if self._askers.admit(name, message.rid):
                    return message
                taken = InvalidRequest(f"rid {message.rid!r} is already in use", field="rid")
                self._send_to(name, [refused(message, taken)])
                return None
            case FrontGone() if name == OWNER:
                return self._forgotten(message.name)
            case Call() if name == OWNER:
                return replace(message, command=self._named(message.command))
            case Call() if isinstance(message.command, _OF_FRONTS):
                self._last_id += 1
                self._calls[self._last_id] = (name, message.id)
                return Call(id=self._last_id, command=self._own(name, message.command))
            case Call():
                what = f"'{command_name(message.command)}' is for the owner of the engine to send"
                error = error_info(InvalidRequest(what, field="command"))
                self._send_to(name, [Reply(id=message.id, error=error)])
                return None
            case Unreadable() if name != OWNER:
                self._refuse(name, message)
                return None
            case _:
                return message

    def _forgotten(self, front: str) -> Call | None:
        """What ends the requests of a front that is gone."""
        self._gone.add(front)
        self._calls = {n: call for n, call in self._calls.items() if front_of(call[0]) != front}
        rids = self._askers.of_front(front)
        logger.warning("front %s is gone, and with it %d requests", front, len(rids))
        if not rids:
            return None
        self._last_id += 1
        self._calls[self._last_id] = (front, 0)
        return Call(id=self._last_id, command=Abort(rids=rids, message="its front process ended"))

    def _named(self, command: Any) -> Any:
        """A command of the owner: an abort of what replies call `rid` names the requests that
        other callers have of that name."""
        if isinstance(command, Abort) and command.rid:
            rids = self._askers.named(command.rid)
            if rids:
                return replace(command, rid="", rids=[*rids, *command.rids])
        return command

    def _own(self, name: str, command: Any) -> Any:
        """A command of a front, which ends no other caller's requests."""
        if not isinstance(command, Abort) or not command.all:
            return command
        return replace(command, all=False, rids=self._askers.of_front(front_of(name)))

    def _refuse(self, name: str, message: Unreadable) -> None:
        logger.error("front %s: %s", name, message.why)
        error = InvalidRequest(message.why, field="message")
        if message.call is not None:
            self._send_to(name, [Reply(id=message.call, error=error_info(error))])
        elif message.rid:
            self._send_to(name, [refused_id(message.rid, error)])
