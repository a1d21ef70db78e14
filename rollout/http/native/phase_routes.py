"""The two phases of an update over a fleet, as a router asks for them.

POST /internal/prepare_update verifies the update that is open, POST /internal/commit_update makes
it serve, and again without effect, POST /internal/drop_update aborts it.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from msgspec import Struct

from engine.protocol.types import Version
from rollout.http.edge.errors import json_response
from rollout.http.openapi import takes
from rollout.http.services import Services
from rollout.http.updates.tracked_update import EndingCall
from rollout.requests.json_types import decode_json


class PrepareBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """held: only an update that was verified in place of being committed. explicit: also one that
    its caller ends. before: only an implicit one that this call commits, and which stays open
    where it is not whole: the reply has `gathers` and `missing` then."""

    held: bool = False
    explicit: bool = False
    before: EndingCall | None = None


class VersionBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """version: of the open update, as the first phase answered it."""

    version: Version


def router(services: Services) -> APIRouter:
    """The routes."""
    routes, updates = APIRouter(), services.lifecycle.updates

    async def prepare(request: Request) -> Response:
        body = decode_json(await request.body() or b"{}", PrepareBody)
        if body.before is not None:
            found = await updates.prepare_before(body.before)
            if found is not None and found.missing:
                told = {"version": None, "gathers": found.version, "missing": found.missing}
                return json_response(told)
            return json_response({"version": None if found is None else found.version})
        return json_response(
            {"version": await updates.prepare(held=body.held, explicit=body.explicit)}
        )

    async def commit(request: Request) -> Response:
        body = decode_json(await request.body(), VersionBody)
        version = await updates.commit_version(body.version)
        return json_response({"version": version, "weight_version": services.labels.text(version)})

    async def drop(request: Request) -> Response:
        body = decode_json(await request.body(), VersionBody)
        await updates.drop_version(body.version)
        return json_response({"version": None})

    for path, handler, reads in (
        ("/internal/prepare_update", prepare, takes(PrepareBody)),
        ("/internal/commit_update", commit, takes(VersionBody)),
        ("/internal/drop_update", drop, takes(VersionBody)),
    ):
        routes.add_api_route(path, handler, methods=["POST"], openapi_extra=reads)
    return routes
