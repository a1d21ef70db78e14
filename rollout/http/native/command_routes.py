"""POST /command: one command of the protocol in, its `Reply` out, both as JSON.

What a trainer that speaks the protocol itself uses. Byte fields are base64, as msgspec has
them. An answer may take minutes: a command ends by its own deadline, not by this route's, or, if
it waits for a peer, when its caller closes the connection.
"""

from __future__ import annotations

from fastapi import Request, Response

from engine.errors import InvalidRequest
from engine.protocol import ControlCommand, JoinGroup, Shutdown
from rollout.http.edge.access import caller
from rollout.http.edge.errors import json_response
from rollout.http.edge.routes import Routes
from rollout.http.openapi import takes
from rollout.http.services import Services
from rollout.http.updates import callers
from rollout.requests.json_types import decode_json
from rollout.requests.message_ranges import check_ranges


def router(services: Services) -> Routes:
    """The protocol's own control route."""
    routes = Routes()

    async def command(request: Request) -> Response:
        parsed = _parse_command(await request.body())
        if isinstance(parsed, JoinGroup):
            parsed = await services.access.checked_join(parsed, caller(request))
        return json_response(await callers.forward(services.lifecycle, parsed, request))

    routes.add_api_route("/command", command, methods=["POST"], openapi_extra=takes(ControlCommand))
    return routes


def _parse_command(body: bytes) -> ControlCommand:
    """The command a body holds. Raises InvalidRequest naming the field."""
    command: ControlCommand = decode_json(body, ControlCommand, what="the command")
    # What no bound of a type says: unsigned numbers end at 2**64.
    check_ranges(command)
    if isinstance(command, Shutdown):
        raise InvalidRequest("a server is stopped by its process: send SIGTERM", field="type")
    return command
