"""SGLang's weight routes (WIRE.md B1, B4, D2): bodies in, protocol commands out."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import Meta

from engine.errors import InvalidRequest, UnsupportedOption
from engine.protocol import (
    Abort,
    CheckAction,
    CheckWeights,
    GetWeight,
    JoinGroup,
    LeaveGroup,
    ReceiveBroadcast,
    ReceiveIpc,
    Reply,
    WeightsReport,
)
from engine.protocol.types import (
    GroupSize,
    Label,
    Name,
    Names,
    NumValues,
    Path,
    Port,
    Rank,
    Seconds,
    Shapes,
    Version,
)
from rollout.http.access import caller
from rollout.http.dialects.bodies import pieces, read_body, read_body_or_query
from rollout.http.dialects.sglang_replies import admin
from rollout.http.errors import json_response
from rollout.http.services import Services

_FLAT = "flattened_bucket"


class _InitGroup(msgspec.Struct):
    master_address: Name
    master_port: Port
    rank_offset: Rank
    world_size: GroupSize
    group_name: Name = "weight_update_group"
    backend: Literal["nccl", "gloo"] = "nccl"
    timeout_s: Seconds = 300.0


class _DestroyGroup(msgspec.Struct):
    group_name: Name = "weight_update_group"


class _Update(msgspec.Struct, kw_only=True):
    """What every call that brings tensors has. flush_cache: this is the last of them.
    timeout_s, here and above, is no field of SGLang's."""

    load_format: Name | None = None
    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: Label | None = None
    selector: Literal["target", "draft", "all"] = "all"
    timeout_s: Seconds = 300.0


class _Distributed(_Update, kw_only=True):
    names: Names
    shapes: Shapes
    dtypes: Names = []
    dtype: Name | None = None
    group_name: Name = "weight_update_group"


class _Tensors(_Update, kw_only=True):
    serialized_named_tensors: Annotated[list[str], Meta(max_length=4096)]


class _Disk(_Update, kw_only=True):
    model_path: Path


class _Pull(msgspec.Struct):
    target_version: Version
    local_checkpoint_dir: Path = ""
    source_dir: Path = ""


class _NewVersion(msgspec.Struct):
    new_version: Label
    abort_all_requests: bool = True


class _Check(msgspec.Struct):
    action: CheckAction = "checksum"


class _Name(msgspec.Struct):
    name: Name
    truncate_size: NumValues = 100


class _Weights:
    """The handlers; each returns what its reply has beside success and message."""

    def __init__(self, services: Services) -> None:
        self._access = services.access
        self._control = services.control
        self._engine = services.engine

    async def init_group(self, request: Request) -> dict[str, Any]:
        body = await read_body(request, _InitGroup)
        command = JoinGroup(
            name=body.group_name,
            address=body.master_address,
            port=body.master_port,
            rank_offset=body.rank_offset,
            world_size=body.world_size,
            backend=body.backend,
            timeout_s=body.timeout_s,
        )
        await self._access.check_join(command, caller(request))
        await self._control.send(command)
        return {"message": f"joined {body.group_name} of {body.world_size} ranks"}

    async def destroy_group(self, request: Request) -> dict[str, Any]:
        body = await read_body(request, _DestroyGroup)
        await self._control.send(LeaveGroup(name=body.group_name))
        return {"message": f"left {body.group_name}"}

    async def begin(self, request: Request) -> dict[str, Any]:
        body = await read_body(request, _Selector)
        _check_selector(body.selector)
        version = await self._control.begin()
        return {"message": f"update {version} is open"}

    async def end(self, _: Request) -> dict[str, Any]:
        report = await self._control.commit()
        return {"message": f"version {report.version} serves"}

    async def distributed(self, request: Request) -> dict[str, Any]:
        body = await read_body(request, _Distributed)
        if body.load_format not in (None, "", "auto", _FLAT):
            raise _unknown_format(body.load_format, f"null, {_FLAT!r}")
        dtypes = body.dtypes or [body.dtype or ""] * len(body.names)
        command = ReceiveBroadcast(
            group=body.group_name,
            tensors=pieces(body.names, dtypes, body.shapes),
            layout="flat" if body.load_format == _FLAT else "tensors",
            timeout_s=body.timeout_s,
        )
        return await self._feed(command, body)

    async def tensors(self, request: Request) -> dict[str, Any]:
        body = await read_body(request, _Tensors)
        if body.load_format not in (None, "", "auto", "direct", _FLAT):
            raise _unknown_format(body.load_format, f"null, 'direct', {_FLAT!r}")
        command = ReceiveIpc(
            payloads=[_base64(i, text) for i, text in enumerate(body.serialized_named_tensors)],
            format="sglang_bucket" if body.load_format == _FLAT else "sglang",
        )
        ranks = self._engine.facts.tp_size
        if len(command.payloads) != ranks:
            raise InvalidRequest(
                f"serialized_named_tensors has {len(command.payloads)} entries for {ranks} ranks",
                field="serialized_named_tensors",
            )
        return await self._feed(command, body)

    async def disk(self, request: Request) -> dict[str, Any]:
        body = await read_body(request, _Disk)
        await self._prepare(body)
        report = await self._control.load(body.model_path, body.weight_version)
        message = f"version {report.version} from {body.model_path} serves"
        return {"message": message, "num_paused_requests": 0}

    async def pull(self, request: Request) -> dict[str, Any]:
        body = await read_body(request, _Pull)
        folder = body.source_dir or body.local_checkpoint_dir
        if not folder:
            raise InvalidRequest("send source_dir, the folder of all versions", field="source_dir")
        path = f"{folder}/weight_v{body.target_version:06d}"
        report = await self._control.load(path, str(body.target_version))
        return {"message": f"version {report.version} from {path} serves"}

    async def new_version(self, request: Request) -> dict[str, Any]:
        body = await read_body(request, _NewVersion)
        if body.abort_all_requests:
            await self._engine.send(Abort(all=True, message="the weights have a new version"))
        await self._control.set_version(body.new_version)
        return {"new_version": body.new_version}

    async def check(self, request: Request) -> dict[str, Any]:
        body = await read_body(request, _Check)
        reply = await self._control.send(CheckWeights(action=body.action))
        differing = sorted({name for report in reply.weights for name in report.differing})
        found = check_summary(reply)
        if differing:
            names = ", ".join(differing[:8])
            found |= {"success": False, "message": f"{len(differing)} tensors differ: {names}"}
        return found

    async def post_process(self, _: Request) -> dict[str, Any]:
        # Parameters re-pack when they are placed; there is nothing to do around a bucket.
        return {"message": "nothing to do"}

    async def by_name(self, request: Request) -> Response:
        body = await read_body_or_query(request, _Name)
        command = GetWeight(name=body.name, count=body.truncate_size)
        reply = await self._control.send(command)
        return json_response(reply.weights[0].values if reply.weights else None)

    async def _feed(self, command: ReceiveBroadcast | ReceiveIpc, body: _Update) -> dict[str, Any]:
        await self._prepare(body)
        await self._control.feed(command, body.weight_version, last=body.flush_cache)
        return {"message": "received"}

    async def _prepare(self, body: _Update) -> None:
        _check_selector(body.selector)
        if body.abort_all_requests:
            await self._engine.send(Abort(all=True, message="aborted by a weight update"))


class _Selector(msgspec.Struct):
    selector: Literal["target", "draft", "all"] = "all"


def router(services: Services) -> APIRouter:
    """The weight routes of the dialect."""
    routes, weights = APIRouter(), _Weights(services)
    for path, handler in {
        "/init_weights_update_group": weights.init_group,
        "/destroy_weights_update_group": weights.destroy_group,
        "/begin_weight_update": weights.begin,
        "/end_weight_update": weights.end,
        "/update_weights_from_distributed": weights.distributed,
        "/update_weights_from_tensor": weights.tensors,
        "/update_weights_from_disk": weights.disk,
        "/weights_checker": weights.check,
        "/post_process_weights": weights.post_process,
        "/pull_weights": weights.pull,
    }.items():
        routes.add_api_route(path, admin(handler), methods=["POST"])
    by_name = weights.by_name
    routes.add_api_route("/get_weights_by_name", by_name, methods=["GET", "POST"])
    routes.add_api_route("/update_weight_version", admin(weights.new_version), methods=["POST"])
    return routes


def check_summary(reply: Reply) -> dict[str, Any]:
    """Checksums by rank, one digest a rank, and one of all ranks in order."""
    ranks = [_rank_summary(report) for report in reply.weights]
    whole = hashlib.sha256("".join(rank["per_gpu_checksum"] for rank in ranks).encode())
    return {"ranks": ranks, "per_engine_checksum": whole.hexdigest()}


def _rank_summary(report: WeightsReport) -> dict[str, Any]:
    checksums: Mapping[str, int] = dict(sorted(report.checksums.items()))
    return {
        "checksums": checksums,
        "per_gpu_checksum": hashlib.sha256(msgspec.json.encode(checksums)).hexdigest(),
        "parallelism_info": {"tp_rank": report.rank},
    }


def _check_selector(selector: str) -> None:
    if selector == "draft":
        raise UnsupportedOption("this server has no draft model", field="selector")


def _unknown_format(found: str, known: str) -> UnsupportedOption:
    return UnsupportedOption(
        f"load_format is {found!r}; this engine reads {known}", field="load_format"
    )


def _base64(index: int, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        field = f"serialized_named_tensors[{index}]"
        raise InvalidRequest(f"{field} is not base64: {error}", field=field) from error
