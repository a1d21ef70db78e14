"""SGLang's weight routes: bodies in, protocol commands out."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from fastapi import Request, Response
from msgspec import Meta

from engine.errors import InvalidRequest, QueueFull, UnsupportedOption, UpdateTimeout
from engine.protocol import (
    Abort,
    CheckWeights,
    GetWeight,
    JoinGroup,
    LeaveGroup,
    ReceiveBroadcast,
    ReceiveIpc,
    Reply,
    WeightsReport,
)
from engine.protocol.deadlines import capped
from engine.protocol.types import (
    GroupSize,
    Label,
    Name,
    Names,
    NumValues,
    Port,
    Rank,
    Seconds,
    Shapes,
)
from engine.protocol.types import Path as FolderPath
from rollout.http.edge.access import caller
from rollout.http.edge.errors import json_response
from rollout.http.edge.phase import holds
from rollout.http.edge.read_body import pieces, read_body, read_body_or_query
from rollout.http.edge.routes import Routes
from rollout.http.openapi import takes
from rollout.http.services import Services
from rollout.http.sglang.admin_replies import admin
from rollout.http.updates import callers
from rollout.http.updates.body_fields import PulledVersion, folder
from rollout.http.updates.daemon_thread import in_daemon_thread
from rollout.http.updates.operations import Operations
from rollout.http.updates.pull import publications, pull, require_pulled

_FLAT = "flattened_bucket"
_MOST_PULLS = 32
_GRACE_S = 5.0
"""By which a pull ends by itself after its deadline, if the file system answers."""


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
    """What every call that brings tensors has. flush_cache: while requests run, this is the
    last of them. partial: tensors that do not come keep their values. That and timeout_s, here
    and above, are no fields of SGLang's."""

    load_format: Name | None = None
    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: Label | None = None
    selector: Literal["target", "draft", "all"] = "all"
    partial: bool = False
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
    model_path: FolderPath


class _Pull(msgspec.Struct):
    """timeout_s is no field of SGLang's."""

    target_version: PulledVersion
    local_checkpoint_dir: FolderPath
    source_dir: FolderPath = ""
    timeout_s: Seconds = 3600.0


class _NewVersion(msgspec.Struct):
    new_version: Label
    abort_all_requests: bool = True


class _Check(msgspec.Struct):
    action: Literal["checksum", "snapshot", "reset_tensors", "compare"] = "checksum"


class _Name(msgspec.Struct):
    name: Name
    truncate_size: NumValues = 100


class _Weights:
    """The handlers; each returns what its reply has beside success and message."""

    def __init__(self, services: Services) -> None:
        self._access = services.access
        self._lifecycle = services.lifecycle
        self._engine = services.engine
        self._access = services.access
        self._base = services.config.engine.model
        self._operations = Operations()
        self._num_pulls = 0

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
        command = await self._access.checked_join(command, caller(request))
        await callers.join(self._lifecycle, command, request)
        return {"message": f"joined {body.group_name} of {body.world_size} ranks"}

    async def destroy_group(self, request: Request) -> dict[str, Any]:
        body = await read_body(request, _DestroyGroup)
        await self._lifecycle.send(LeaveGroup(name=body.group_name))
        return {"message": f"left {body.group_name}"}

    async def begin(self, request: Request) -> dict[str, Any]:
        body = await read_body(request, _Begin)
        _check_selector(body.selector)
        version = await self._lifecycle.updates.begin(partial=body.partial)
        return {"message": f"update {version} is open"}

    async def end(self, _: Request) -> dict[str, Any]:
        report = await self._lifecycle.updates.commit()
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
        feed = self._feed(command, body, request)
        return await callers.received(self._lifecycle, command, request, feed)

    async def tensors(self, request: Request) -> dict[str, Any]:
        body = await read_body(request, _Tensors)
        if body.load_format not in (None, "", "auto", "direct", _FLAT):
            raise _unknown_format(body.load_format, f"null, 'direct', {_FLAT!r}")
        command = ReceiveIpc(
            payloads=[_base64(i, text) for i, text in enumerate(body.serialized_named_tensors)],
            format="sglang_bucket" if body.load_format == _FLAT else "sglang",
        )
        facts = self._engine.facts
        # As many as one copy of the model has are for each of the copies.
        if len(command.payloads) not in (facts.num_ranks, facts.tp_size):
            raise InvalidRequest(
                f"serialized_named_tensors has {len(command.payloads)} entries for "
                f"{facts.num_ranks} ranks",
                field="serialized_named_tensors",
            )
        return await self._feed(command, body, request)

    async def disk(self, request: Request) -> dict[str, Any]:
        body = await read_body(request, _Disk)
        path = folder(body.model_path, "model_path")
        await asyncio.to_thread(require_pulled, Path(path))
        await self._prepare(body)
        report = await self._lifecycle.updates.load(
            path, body.weight_version, partial=body.partial, hold=holds(request)
        )
        if report is None:
            return {"message": "loaded; the update is not committed yet", "num_paused_requests": 0}
        message = f"version {report.version} from {path} serves"
        return {"message": message, "num_paused_requests": 0}

    async def pull(self, request: Request) -> dict[str, Any]:
        """Fill a folder of this machine; `/update_weights_from_disk` on it is what loads it."""
        body = await read_body(request, _Pull)
        local = Path(folder(body.local_checkpoint_dir, "local_checkpoint_dir"))
        source = Path(folder(body.source_dir, "source_dir")) if body.source_dir else None
        for path in (local, source) if source is not None else (local,):
            self._access.check_folder(str(path))
        await self._operations.run(self._pull(local, source, body))
        return {"message": f"{local} holds version {body.target_version}"}

    async def _pull(self, local: Path, source: Path | None, body: _Pull) -> None:
        limit_s = capped(body.timeout_s)
        run = partial(
            self._checked_pull,
            local,
            source=source,
            base=Path(self._base),
            version=body.target_version,
            timeout_s=limit_s,
        )
        if self._num_pulls >= _MOST_PULLS:
            raise QueueFull(
                f"{self._num_pulls} pulls are in progress; try again later", field="pull_weights"
            )
        self._num_pulls += 1
        try:
            await in_daemon_thread(run, timeout_s=limit_s + _GRACE_S)
        except TimeoutError as error:
            raise UpdateTimeout(
                f"the file system of {local} does not answer", field="local_checkpoint_dir"
            ) from error
        finally:
            self._num_pulls -= 1

    def _checked_pull(self, local: Path, *, source: Path | None, version: int, **more: Any) -> None:
        for place in (local, *publications(source, version)):
            self._access.check_links(str(place))
        pull(local, source=source, version=version, **more)

    async def new_version(self, request: Request) -> dict[str, Any]:
        body = await read_body(request, _NewVersion)
        if body.abort_all_requests:
            await self._engine.send(Abort(all=True, message="the weights have a new version"))
        await self._lifecycle.updates.set_version(body.new_version)
        return {"new_version": body.new_version}

    async def check(self, request: Request) -> dict[str, Any]:
        body = await read_body(request, _Check)
        reply = await self._lifecycle.send(CheckWeights(action=body.action))
        differing = sorted({name for report in reply.weights for name in report.differing})
        found = check_summary(reply, tp_size=self._engine.facts.tp_size)
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
        reply = await self._lifecycle.send(command)
        return json_response(reply.weights[0].values if reply.weights else None)

    async def _feed(
        self, command: ReceiveBroadcast | ReceiveIpc, body: _Update, request: Request
    ) -> dict[str, Any]:
        await self._prepare(body)
        report = await self._lifecycle.updates.feed(
            command,
            body.weight_version,
            last=body.flush_cache,
            partial=body.partial,
            peer=caller(request),
            hold=holds(request),
        )
        if report is None:
            return {"message": "received; the update is not committed yet"}
        return {"message": f"version {report.version} serves"}

    async def _prepare(self, body: _Update) -> None:
        _check_selector(body.selector)
        if body.abort_all_requests:
            await self._engine.send(Abort(all=True, message="aborted by a weight update"))


class _Begin(msgspec.Struct):
    """partial, which is not SGLang's: the end commits what came, whatever that is."""

    selector: Literal["target", "draft", "all"] = "all"
    partial: bool = True


def router(services: Services) -> Routes:
    """The weight routes of the dialect."""
    routes, weights = Routes(), _Weights(services)
    for path, (handler, reads) in {
        "/init_weights_update_group": (weights.init_group, takes(_InitGroup)),
        "/destroy_weights_update_group": (weights.destroy_group, takes(_DestroyGroup)),
        "/begin_weight_update": (weights.begin, takes(_Begin)),
        "/end_weight_update": (weights.end, takes()),
        "/update_weights_from_distributed": (weights.distributed, takes(_Distributed)),
        "/update_weights_from_tensor": (weights.tensors, takes(_Tensors)),
        "/update_weights_from_disk": (weights.disk, takes(_Disk)),
        "/weights_checker": (weights.check, takes(_Check)),
        "/post_process_weights": (weights.post_process, takes()),
        "/pull_weights": (weights.pull, takes(_Pull)),
    }.items():
        routes.add_api_route(path, admin(handler), methods=["POST"], openapi_extra=reads)
    for path, route, methods, reads in (
        ("/get_weights_by_name", weights.by_name, ["GET", "POST"], takes(_Name, query=_Name)),
        ("/update_weight_version", admin(weights.new_version), ["POST"], takes(_NewVersion)),
    ):
        routes.add_api_route(path, route, methods=methods, openapi_extra=reads)
    return routes


def check_summary(reply: Reply, *, tp_size: int) -> dict[str, Any]:
    """Checksums by rank, one digest a rank, and one of all ranks in order. tp_size: ranks that
    share a copy of the model."""
    ranks = [_rank_summary(report, tp_size) for report in reply.weights]
    whole = hashlib.sha256("".join(rank["per_gpu_checksum"] for rank in ranks).encode())
    return {"ranks": ranks, "per_engine_checksum": whole.hexdigest()}


def _rank_summary(report: WeightsReport, tp_size: int) -> dict[str, Any]:
    dp_rank, tp_rank = divmod(report.rank, tp_size)
    checksums: Mapping[str, int] = dict(sorted(report.checksums.items()))
    return {
        "checksums": checksums,
        "per_gpu_checksum": hashlib.sha256(msgspec.json.encode(checksums)).hexdigest(),
        "parallelism_info": {"tp_rank": tp_rank, "dp_rank": dp_rank},
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
