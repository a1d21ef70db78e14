"""Calls that bring weights over HTTP, and how a fake engine is told to answer them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx

from engine.errors import ManifestMismatch, SlipstreamError
from engine.protocol import (
    BeginUpdate,
    Call,
    CommitUpdate,
    PrepareUpdate,
    ReceiveBroadcast,
    Reply,
    Request,
)
from tests.helpers.http_app import Server

FOUR = {"max_new_tokens": 4}
GROUP = {"master_address": "h", "master_port": 1, "rank_offset": 1, "world_size": 2}


def bucket(**changes: Any) -> dict[str, Any]:
    """A call that brings one tensor."""
    body: dict[str, Any] = {
        "names": ["w"],
        "dtypes": ["float32"],
        "shapes": [[2]],
        "group_name": "g",
        "flush_cache": False,
    }
    return body | changes


async def push(server: Server, **changes: Any) -> httpx.Response:
    return await server.post("/update_weights_from_distributed", bucket(**changes))


def accept(server: Server) -> None:
    """Let broadcasts succeed without a sender."""
    server.link.answers[ReceiveBroadcast] = lambda _: Reply()


def refuse(server: Server, kind: type, error: SlipstreamError) -> None:
    def answer(_: object) -> Reply:
        raise error

    server.link.answers[kind] = answer


def kinds(server: Server) -> list[type]:
    return [type(command) for command in server.commands()]


class WholeModel:
    """Answers of an engine whose model has these tensors, and whose broadcasts need no sender.

    Commits as the real one does: a whole update that misses a tensor is refused by its name, a
    tensor that comes twice too. committed: names that each committed update brought.
    """

    def __init__(self, server: Server, *names: str) -> None:
        self.committed: list[list[str]] = []
        self._names = names
        self._came: list[str] = []
        self._partial = False
        server.link.answers |= {
            BeginUpdate: self._begin,
            ReceiveBroadcast: self._receive,
            PrepareUpdate: self._check,
            CommitUpdate: self._commit,
        }

    def _begin(self, command: BeginUpdate) -> None:
        self._came, self._partial = [], command.partial

    def _receive(self, command: ReceiveBroadcast) -> Reply:
        for piece in command.tensors:
            if piece.name in self._came:
                raise ManifestMismatch(f"{piece.name} came twice", field=piece.name)
            self._came.append(piece.name)
        return Reply()

    def _commit(self, command: CommitUpdate) -> None:
        self._check(command)
        self.committed.append(self._came)

    def _check(self, _: PrepareUpdate | CommitUpdate) -> None:
        missing = [name for name in self._names if name not in self._came]
        if missing and not self._partial:
            raise ManifestMismatch(f"{missing[0]} missing; send every tensor", field=missing[0])


def one(name: str, **changes: Any) -> dict[str, Any]:
    """A call that brings the tensor `name`, as a trainer that leaves flush_cache away."""
    body = bucket(names=[name], **changes)
    if "flush_cache" not in changes:
        del body["flush_cache"]
    return body


class Gate:
    """Holds commands of one kind back from the engine, as if it ran them beside steps."""

    def __init__(self, server: Server, kind: type) -> None:
        self.held: list[Request | Call] = []
        self._link = server.link
        self._kind = kind
        self._post = server.link.post
        server.link.post = self._hold  # type: ignore[method-assign]

    def open(self) -> None:
        """Let them through, now and from now on."""
        self._link.post = self._post  # type: ignore[method-assign]
        self._post(self.held)

    def _hold(self, messages: Sequence[Request | Call]) -> None:
        later = [m for m in messages if isinstance(m, Call) and isinstance(m.command, self._kind)]
        self.held += later
        self._post([message for message in messages if message not in later])
