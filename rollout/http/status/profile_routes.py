"""POST /start_profile and /stop_profile, as SGLang has them; vLLM's have no body."""

from __future__ import annotations

import re
import uuid
from typing import Annotated, Any

import msgspec
from fastapi import Request
from msgspec import Meta

from engine.errors import InvalidRequest, UnsupportedOption
from engine.protocol import ProfileActivity, StartProfile, StopProfile
from engine.protocol.types import Name, NumSteps, Size
from engine.protocol.types import Path as FolderPath
from rollout.http.edge.read_body import read_body
from rollout.http.edge.routes import Routes
from rollout.http.openapi import takes
from rollout.http.services import Services
from rollout.http.sglang.admin_replies import admin
from rollout.requests.known_fields import UNSERVED

_SERVED: dict[str, ProfileActivity] = {"CPU": "cpu", "GPU": "gpu"}
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class _Start(msgspec.Struct, kw_only=True):
    """Names and meanings are SGLang's. output_dir: below the server's --profile-root.
    start_step: counts since the engine started. with_stack: off by default, since it slows every
    step down."""

    output_dir: FolderPath | None = None
    start_step: Size | None = None
    num_steps: NumSteps | None = None
    activities: Annotated[list[Name], Meta(max_length=16)] | None = None
    with_stack: bool | None = None
    record_shapes: bool | None = None
    profile_prefix: Name | None = None
    profile_id: Name | None = None
    profile_by_stage: bool | None = None
    profile_stages: list[Name] | None = None
    merge_profiles: bool | None = None


def router(services: Services) -> Routes:
    """The routes."""
    routes = Routes()
    access, lifecycle = services.access, services.lifecycle

    async def start(request: Request) -> dict[str, Any]:
        body = await read_body(request, _Start)
        for name in UNSERVED["control"]:
            if getattr(body, name):
                raise UnsupportedOption(f"{name} is not served; leave it out", field=name)
        command = StartProfile(
            folder=access.profile_folder(body.output_dir),
            name=_file_name(body),
            activities=_activities(body.activities or []),
            start_step=body.start_step,
            num_steps=body.num_steps,
            with_stack=bool(body.with_stack),
            record_shapes=bool(body.record_shapes),
        )
        await lifecycle.send(command)
        return {"message": f"profiling into {command.folder}", "output_dir": command.folder}

    async def stop(_: Request) -> dict[str, Any]:
        reply = await lifecycle.send(StopProfile())
        return {"message": "profile written", "traces": reply.traces}

    for path, handler, reads in (
        ("/start_profile", start, takes(_Start)),
        ("/stop_profile", stop, takes()),
    ):
        routes.add_api_route(path, admin(handler), methods=["POST"], openapi_extra=reads)
    return routes


def _activities(names: list[str]) -> list[ProfileActivity]:
    for name in names:
        if name.upper() not in _SERVED:
            raise UnsupportedOption(
                f"activity {name!r} is not served; known are {', '.join(_SERVED)}",
                field="activities",
            )
    return [_SERVED[name.upper()] for name in names]


def _file_name(body: _Start) -> str:
    """What the names of the traces begin with."""
    parts = {"profile_prefix": body.profile_prefix, "profile_id": body.profile_id}
    for field, part in parts.items():
        if part is not None and not _FILE_NAME.fullmatch(part):
            raise InvalidRequest(
                f"{field} is part of a file's name: letters, digits, '.', '_' and '-'", field=field
            )
    if body.profile_id is None:
        parts["profile_id"] = uuid.uuid4().hex
    return "-".join(part for part in parts.values() if part)
