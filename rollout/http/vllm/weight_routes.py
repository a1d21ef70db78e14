"""vLLM's native weight-transfer routes, and prime-rl's call of the same path."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any, Literal

import msgspec
from fastapi import Request, Response

from engine.errors import InvalidRequest, UnsupportedOption
from engine.protocol import CheckAction, CheckWeights, JoinGroup, LeaveGroup, ReceiveBroadcast
from engine.protocol.types import (
    GroupSize,
    Name,
    Port,
    Rank,
    Seconds,
)
from engine.protocol.types import Path as FolderPath
from rollout.http.edge.access import caller
from rollout.http.edge.errors import json_response
from rollout.http.edge.phase import holds
from rollout.http.edge.read_body import pieces, read_body
from rollout.http.edge.routes import Routes
from rollout.http.openapi import takes
from rollout.http.services import Services
from rollout.http.sglang.weight_routes import check_summary
from rollout.http.updates import callers
from rollout.http.updates.body_fields import folder
from rollout.http.updates.pull import require_pulled
from rollout.http.vllm import rpc
from rollout.http.vllm.bodies import Finish, Start, UpdateInfo

GROUP = "vllm"

_ACTIONS: dict[str, CheckAction] = {
    "checksum": "checksum",
    "snapshot": "snapshot",
    "reset": "reset_tensors",
    "reset_tensors": "reset_tensors",
    "compare": "compare",
}


class _InitInfo(msgspec.Struct):
    world_size: GroupSize
    master_address: Name = ""
    master_port: Port = 0
    rank_offset: Rank = 1
    packed: bool = False
    nccl_unique_id_b64: FolderPath | None = None
    backend: Literal["nccl", "gloo"] = "nccl"
    timeout_s: Seconds = 300.0


class _Init(msgspec.Struct):
    init_info: _InitInfo


class _Update(msgspec.Struct):
    """partial, which is not vLLM's: tensors that do not come keep their values."""

    update_info: UpdateInfo | None = None
    weight_dir: FolderPath | None = None
    partial: bool = False


class _Check(msgspec.Struct):
    action: Literal["checksum", "snapshot", "reset", "reset_tensors", "compare"] = "checksum"


class _Transfer:
    """The handlers, and what one call of the dialect leaves for the next: whether the stream
    is packed, and the tensors announced last."""

    def __init__(self, services: Services) -> None:
        self._access = services.access
        self._lifecycle = services.lifecycle
        self._engine = services.engine
        self._labels = services.labels
        self._packed = False
        self._announced = UpdateInfo()

    @property
    def num_ranks(self) -> int:
        """Ranks of the engine."""
        return self._engine.facts.num_ranks

    async def world_size(self, _: Request) -> Response:
        return json_response({"world_size": self.num_ranks})

    async def init(self, request: Request) -> Response:
        info = (await read_body(request, _Init)).init_info
        command = JoinGroup(
            name=GROUP,
            address=info.master_address,
            port=info.master_port,
            rank_offset=info.rank_offset,
            world_size=info.world_size,
            backend=info.backend,
            rendezvous="vllm",
            unique_id=_unique_id(info.nccl_unique_id_b64),
            timeout_s=info.timeout_s,
        )
        command = await self._access.checked_join(command, caller(request))
        await callers.join(self._lifecycle, command, request)
        self._packed = info.packed
        return _message("Weight transfer initialized")

    async def shutdown(self, _: Request) -> Response:
        await self._lifecycle.send(LeaveGroup(name=GROUP))
        return _message("Weight transfer shut down")

    async def start(self, request: Request) -> Response:
        await self.begin(await read_body(request, Start))
        return _message("Weight update started")

    async def begin(self, body: Start) -> None:
        """Open an update."""
        if not body.is_checkpoint_format:
            raise UnsupportedOption(
                "weights come under their Hugging Face names; leave is_checkpoint_format true",
                field="is_checkpoint_format",
            )
        await self._lifecycle.updates.begin(partial=body.partial)

    async def update(self, request: Request) -> Response:
        body = await read_body(request, _Update)
        if body.update_info is not None:
            await self.receive(body.update_info, request, partial=body.partial)
        elif body.weight_dir is not None:
            path = folder(body.weight_dir, "weight_dir")
            await asyncio.to_thread(require_pulled, Path(path))
            await self._lifecycle.updates.load(path, partial=body.partial, hold=holds(request))
        else:
            raise InvalidRequest(
                "send update_info with names, dtype_names and shapes, or weight_dir, a folder of "
                "safetensors files; prime-rl's NCCL broadcaster is not served",
                field="update_info, weight_dir",
            )
        return _message("Weights updated")

    async def receive(self, info: UpdateInfo, request: Request, *, partial: bool = False) -> None:
        """Receive announced tensors. Without a session, and while requests run, a call is an
        update of its own."""
        command = self._broadcast(info)
        feed = self._lifecycle.updates.feed(
            command, last=True, partial=partial, peer=caller(request), hold=holds(request)
        )
        await callers.received(self._lifecycle, command, request, feed)

    async def finish(self, request: Request) -> Response:
        await self.commit(await read_body(request, Finish))
        return _message("Weight update finished")

    async def commit(self, body: Finish) -> None:
        """End the open update."""
        label = None if body.weight_version is None else str(body.weight_version)
        await self._lifecycle.updates.commit(label)

    async def info(self, _: Request) -> Response:
        state = await self._engine.state(max_age_s=0.0)
        return json_response(
            {
                "weight_version": self._labels.text(state.version),
                "updating": state.open_update is not None,
                "group": GROUP if GROUP in state.groups else None,
            }
        )

    async def check(self, request: Request) -> Response:
        body = await read_body(request, _Check)
        reply = await self._lifecycle.send(CheckWeights(action=_ACTIONS[body.action]))
        differing = sorted({name for report in reply.weights for name in report.differing})
        summary = check_summary(reply, tp_size=self._engine.facts.tp_size)
        found = {"success": not differing, "differing": differing, **summary}
        return json_response(found)

    def _broadcast(self, info: UpdateInfo) -> ReceiveBroadcast:
        if info.names:
            self._announced = info
        elif not self._announced.names:
            raise InvalidRequest("names is empty and none were sent before", field="names")
        announced = self._announced
        packed = self._packed if info.packed is None else info.packed
        return ReceiveBroadcast(
            group=GROUP,
            tensors=pieces(announced.names, announced.dtype_names, announced.shapes),
            layout="chunks" if packed else "tensors",
            bucket_bytes=info.packed_buffer_size_bytes,
            timeout_s=info.timeout_s,
        )


def router(services: Services) -> Routes:
    """The weight routes of the dialect."""
    routes, transfer = Routes(), _Transfer(services)
    for path, (handler, reads) in {
        "/init_weight_transfer_engine": (transfer.init, takes(_Init)),
        "/shutdown_weight_transfer_engine": (transfer.shutdown, takes()),
        "/start_weight_update": (transfer.start, takes(Start)),
        "/update_weights": (transfer.update, takes(_Update)),
        "/finish_weight_update": (transfer.finish, takes(Finish)),
        "/weight_checker": (transfer.check, takes(_Check)),
        "/collective_rpc": (rpc.handler(transfer), takes(rpc.Rpc)),
    }.items():
        routes.add_api_route(path, handler, methods=["POST"], openapi_extra=reads)
    routes.add_api_route("/get_world_size", transfer.world_size, methods=["GET"])
    routes.add_api_route("/weight_info", transfer.info, methods=["GET"])
    return routes


def _unique_id(text: str | None) -> bytes:
    if text is None:
        return b""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise InvalidRequest(
            f"nccl_unique_id_b64 is not base64: {error}", field="init_info.nccl_unique_id_b64"
        ) from error


def _message(text: str) -> Response:
    body: dict[str, Any] = {"message": text}
    return json_response(body)
