"""POST /collective_rpc: methods that SkyRL's trainer calls on vLLM's workers by name.

SkyRL brings weights by methods of a class that it has vLLM mix into its workers. Those that have
an equal among the routes of the weight transfer are handed on to it; any other name is refused,
for a name is not code to run.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec
from fastapi import Request, Response
from msgspec import Raw

from engine.errors import InvalidRequest, UnsupportedOption
from engine.protocol.types import Name, Patience
from rollout.http.edge.errors import json_response
from rollout.http.edge.read_body import read_body
from rollout.http.vllm.bodies import Finish, Start, UpdateInfo
from rollout.requests.json_types import decode_json


class Transfer(Protocol):
    """The weight transfer that methods are handed on to."""

    @property
    def num_ranks(self) -> int:
        """Ranks of the engine: each has a result."""
        ...

    async def begin(self, body: Start) -> None:
        """Open an update."""
        ...

    async def receive(self, info: UpdateInfo, request: Request, *, partial: bool = False) -> None:
        """Receive announced tensors."""
        ...

    async def commit(self, body: Finish) -> None:
        """End the update."""
        ...


class Rpc(msgspec.Struct, kw_only=True):
    """vLLM's body. timeout is taken and not needed: every command has a deadline of its own."""

    method: Name
    args: list[Raw] = []
    kwargs: dict[str, Raw] = {}
    timeout: Patience | None = None


class _Update(msgspec.Struct, kw_only=True):
    update_info: UpdateInfo


METHODS = ("skyrl_start_weight_update", "update_weights_nccl", "skyrl_finish_weight_update")


def handler(transfer: Transfer) -> Callable[[Request], Awaitable[Response]]:
    """What answers the route."""

    async def rpc(request: Request) -> Response:
        body = await read_body(request, Rpc)
        if body.args:
            raise InvalidRequest("send arguments by name, in kwargs", field="args")
        match body.method:
            case "skyrl_start_weight_update":
                await transfer.begin(_arguments(body, Start))
            case "update_weights_nccl":
                await transfer.receive(_arguments(body, _Update).update_info, request)
            case "skyrl_finish_weight_update":
                await transfer.commit(_arguments(body, Finish))
            case _:
                raise UnsupportedOption(
                    f"method {body.method!r} is not served; known are {', '.join(METHODS)}",
                    field="method",
                )
        # vLLM answers what each rank's method returned; these return nothing.
        return json_response({"results": [None] * transfer.num_ranks})

    return rpc


def _arguments(body: Rpc, kind: Any) -> Any:
    """The keyword arguments as `kind`; errors name them below `kwargs`."""
    try:
        return decode_json(msgspec.json.encode(body.kwargs), kind, strict=False, what="kwargs")
    except InvalidRequest as error:
        field = f"kwargs.{error.field}" if error.field else "kwargs"
        raise InvalidRequest(error.message, field=field) from error
