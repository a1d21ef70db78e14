"""Calls that bring weights over HTTP, and how a fake engine is told to answer them."""

from __future__ import annotations

from typing import Any

import httpx

from engine.errors import SlipstreamError
from engine.protocol import ReceiveBroadcast, Reply
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
